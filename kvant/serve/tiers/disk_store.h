// Pages on a local disk: slab files in one folder, one for each slot size, least recently used out
// first when the size limit is reached. A restart finds what was written before; the order of use
// begins anew. Single-thread.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvant/serve/tiers/page_store.h"
#include "kvant/serve/tiers/slab_file.h"

namespace kvant::serve {

class DiskStore final : public PageStore {
 public:
  struct Recovery {
    int64_t pages = 0;      // found
    int64_t bad_slots = 0;  // torn or damaged: freed
    int64_t bad_files = 0;  // not slab files: left alone and not used
  };

  // Creates the folder if needed. kInvalidArgument if another process uses it, kIoError if it
  // cannot be written.
  static Result<std::unique_ptr<DiskStore>> open(const std::string& folder, int64_t limit_bytes);
  ~DiskStore() override;

  const Recovery& recovery() const { return recovery_; }
  std::vector<cache::PageObjectHeader> headers() const override;
  int64_t damaged_pages() const override { return recovery_.bad_slots; }

  cache::Medium medium() const override { return cache::Medium::kDisk; }
  Result<ObjectBytes> get(const PageName& name) override;
  Result<Put> put(const PageName& name, const ObjectBytes& object) override;
  bool contains(const PageName& name) override { return pages_.contains(name); }
  void remove(const PageName& name) override;
  Status clear() override;
  StoreUsage usage() const override {
    return {static_cast<int64_t>(pages_.size()), bytes_, limit_bytes_};
  }
  std::vector<EvictedPage> take_evicted() override { return std::exchange(evicted_, {}); }

 private:
  struct Slab {
    SlabFile file;
    std::vector<int64_t> free_slots;
  };
  struct Page {
    int64_t slot_bytes = 0;
    int64_t slot = 0;
    std::list<PageName>::iterator use;
  };

  DiskStore() = default;
  Status recover_slab(int64_t slot_bytes, SlabFile file);
  Result<Slab*> slab_for(int64_t slot_bytes);
  void evict_oldest();
  std::string slab_path(int64_t slot_bytes) const;

  std::string folder_;
  int lock_ = -1;
  int64_t limit_bytes_ = 0;
  int64_t bytes_ = 0;  // of slots in use
  Recovery recovery_;
  std::map<int64_t, Slab> slabs_;  // by slot bytes
  std::unordered_map<PageName, Page, PageNameHash> pages_;
  std::list<PageName> uses_;  // least recently used first
  std::vector<EvictedPage> evicted_;
};

}  // namespace kvant::serve
