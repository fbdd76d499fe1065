// Where pages live: one slab class per page size in bytes, slots, reference counts, free lists.
//
// A page-table entry names a slot; a page kind names the class. Classes are reserved whole at
// creation, but a slot is only touched when it is first handed out, lowest first, so that a large
// reservation costs no memory until it is used. Used by KvCache (single-thread).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvant/base/memory.h"
#include "kvant/base/result.h"

namespace kvant::cache {

class PagePool {
 public:
  struct ClassSpec {
    int64_t page_bytes = 0;  // a multiple of 128
    int64_t num_slots = 0;
  };
  static constexpr int64_t kMaxSlots = (1 << 24) - 1;  // PageEntry::kNoSlot is not a slot

  // Bytes of host memory for counts and lists of these classes.
  static int64_t metadata_bytes(std::span<const ClassSpec> specs);

  // `metadata` is zero-filled host memory of metadata_bytes(specs), which must outlive the pool.
  static Result<PagePool> create(std::span<const ClassSpec> specs, MemoryResource& memory,
                                 std::byte* metadata);

  int num_classes() const { return static_cast<int>(classes_.size()); }
  std::byte* base(int slab_class) const { return classes_[slab_class].slab.data(); }
  std::byte* page(int slab_class, uint32_t slot) const {
    return base(slab_class) + slot * classes_[slab_class].spec.page_bytes;
  }
  int64_t num_slots(int slab_class) const { return classes_[slab_class].spec.num_slots; }
  int64_t slots_in_use(int slab_class) const { return classes_[slab_class].in_use; }
  int64_t free_slots(int slab_class) const {
    return num_slots(slab_class) - slots_in_use(slab_class);
  }

  // A slot with one reference. There must be a free one.
  uint32_t allocate(int slab_class);
  void retain(int slab_class, uint32_t slot);
  // True if that was the last reference and the slot is free now.
  bool release(int slab_class, uint32_t slot);
  uint32_t references(int slab_class, uint32_t slot) const {
    return classes_[slab_class].references[slot];
  }

  // `expected[class][slot]` is how often page tables name each slot. kInternal names the first
  // class and slot whose count, free list or occupancy disagrees.
  Status check(const std::vector<std::vector<uint32_t>>& expected) const;

 private:
  struct SlabClass {
    ClassSpec spec;
    Buffer slab;
    uint32_t* references = nullptr;  // [num_slots]
    uint32_t* next_free = nullptr;   // [num_slots], slot + 1 of the next free one, 0 ends the list
    uint32_t first_free = 0;         // slot + 1
    int64_t ever_used = 0;           // slots [ever_used, num_slots) were never handed out
    int64_t in_use = 0;
  };

  PagePool() = default;
  std::vector<SlabClass> classes_;
};

}  // namespace kvant::cache
