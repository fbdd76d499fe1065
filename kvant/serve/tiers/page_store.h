// One tier of pages outside the cache: page objects by page key and layer group.
//
// Stores are used by their tier's worker thread only (single-thread); the engine talks to them
// through Tier (tier.h). A page that cannot be had, whatever the reason, is a miss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/page_events.h"
#include "kvant/cache/page_object.h"

namespace kvant::serve {

// Names one page object.
struct PageName {
  cache::PageKey key{};
  uint32_t group = 0;

  bool operator==(const PageName&) const = default;
};

struct PageNameHash {
  size_t operator()(const PageName& name) const {
    uint64_t word;  // keys are SHA-256: any eight bytes are a hash
    std::memcpy(&word, name.key.data(), sizeof(word));
    return word ^ (name.group * 0x9e3779b97f4a7c15ull);
  }
};

using ObjectBytes = std::shared_ptr<const std::vector<std::byte>>;  // tiers and queues share them

struct StoreUsage {
  int64_t pages = 0, bytes = 0;
  int64_t limit_bytes = 0;  // 0: unknown
};

// What a store gave up to make room; `object` where it was at hand, for the next tier.
struct EvictedPage {
  PageName name;
  ObjectBytes object;
};

class PageStore {
 public:
  enum class Put { kStored, kAlreadyThere };
  enum class Held { kNo, kYes, kUnknown };  // kUnknown: because of a fault

  virtual ~PageStore() = default;
  virtual cache::Medium medium() const = 0;
  // kNotFound: a miss; any other error is a fault of the tier, and a miss as well.
  virtual Result<ObjectBytes> get(const PageName& name) = 0;
  // kResourceExhausted: no room even after eviction.
  virtual Result<Put> put(const PageName& name, const ObjectBytes& object) = 0;
  virtual bool contains(const PageName& name) = 0;
  virtual void remove(const PageName& name) = 0;
  virtual Status clear() = 0;
  virtual StoreUsage usage() const = 0;
  // Of pages that were there when the store was opened.
  virtual std::vector<cache::PageObjectHeader> headers() const { return {}; }
  // Pages that were found damaged then, and dropped.
  virtual int64_t damaged_pages() const { return 0; }
  // Pages evicted since the last call, oldest first.
  virtual std::vector<EvictedPage> take_evicted() { return {}; }
  // The same for several at once, for stores that save round trips: one result each. Last first, so
  // that of a run of pages the first is the one used last, and goes last.
  virtual std::vector<Result<ObjectBytes>> get_many(std::span<const PageName> names) {
    std::vector<Result<ObjectBytes>> objects(names.size(), ObjectBytes());
    for (size_t i = names.size(); i-- > 0;) objects[i] = get(names[i]);
    return objects;
  }
  virtual std::vector<Held> contains_many(std::span<const PageName> names) {
    std::vector<Held> found;
    for (const PageName& name : names) found.push_back(contains(name) ? Held::kYes : Held::kNo);
    return found;
  }
};

// The error of a page that is not there.
inline Error not_stored() {
  return Error(ErrorCode::kNotFound, "the tier does not hold the page");
}

}  // namespace kvant::serve
