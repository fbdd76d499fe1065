// What becomes of reusable pages, told to whoever routes or counts: KV events, metrics, lower
// tiers.
//
// Called by the prefix tree and the tiers on the engine thread, in the order in which things
// happen: for each page and medium exactly one `stored` until it is `removed`, parents before
// children. The spans are valid during the call only.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "kvant/cache/fingerprint.h"

namespace kvant::cache {

enum class Medium : uint8_t { kDevice = 0, kHost = 1, kDisk = 2, kRemote = 3 };
inline constexpr int kNumMedia = 4;

// Consecutive pages of one layer group.
struct StoredPages {
  Medium medium = Medium::kDevice;
  int group = 0;
  int window = 0;                       // of the group; 0: full attention
  PageKey parent_key{};                 // of the first page; all zeros: it begins a sequence
  std::span<const PageKey> keys;        // [pages]
  std::span<const uint32_t> token_ids;  // [pages][page_tokens]
  std::string_view salt;
};

struct RemovedPages {
  Medium medium = Medium::kDevice;
  int group = 0;
  int window = 0;
  std::span<const PageKey> keys;
};

class PageObserver {
 public:
  virtual ~PageObserver() = default;
  virtual void pages_stored(const StoredPages& pages) = 0;
  virtual void pages_removed(const RemovedPages& pages) = 0;
  virtual void all_cleared(Medium medium) = 0;
};

}  // namespace kvant::cache
