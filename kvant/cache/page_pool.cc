#include "kvant/cache/page_pool.h"

#include <string>

#include "kvant/base/check.h"

namespace kvant::cache {

int64_t PagePool::metadata_bytes(std::span<const ClassSpec> specs) {
  int64_t slots = 0;
  for (const ClassSpec& spec : specs) slots += spec.num_slots;
  return slots * 2 * static_cast<int64_t>(sizeof(uint32_t));
}

Result<PagePool> PagePool::create(std::span<const ClassSpec> specs, MemoryResource& memory,
                                  std::byte* metadata) {
  PagePool pool;
  uint32_t* next = reinterpret_cast<uint32_t*>(metadata);
  for (const ClassSpec& spec : specs) {
    KVANT_CHECK(spec.num_slots <= kMaxSlots, "slots fit a page-table entry");
    SlabClass slab_class;
    slab_class.spec = spec;
    if (spec.num_slots > 0) {
      KVANT_ASSIGN(slab_class.slab,
                   Buffer::create(memory, spec.page_bytes * spec.num_slots, MemoryUse::kPages));
    }
    slab_class.references = next;
    slab_class.next_free = next + spec.num_slots;
    next += 2 * spec.num_slots;
    pool.classes_.push_back(std::move(slab_class));
  }
  return pool;
}

uint32_t PagePool::allocate(int slab_class) {
  SlabClass& c = classes_[slab_class];
  uint32_t slot;
  if (c.first_free != 0) {
    slot = c.first_free - 1;
    c.first_free = c.next_free[slot];
  } else {
    KVANT_CHECK(c.ever_used < c.spec.num_slots, "free slots are counted before they are taken");
    slot = static_cast<uint32_t>(c.ever_used++);
  }
  c.references[slot] = 1;
  ++c.in_use;
  return slot;
}

void PagePool::retain(int slab_class, uint32_t slot) {
  SlabClass& c = classes_[slab_class];
  KVANT_CHECK(c.references[slot] > 0, "only a held page can be shared");
  ++c.references[slot];
}

bool PagePool::release(int slab_class, uint32_t slot) {
  SlabClass& c = classes_[slab_class];
  KVANT_CHECK(c.references[slot] > 0, "a page is released at most as often as it was taken");
  if (--c.references[slot] > 0) return false;
  c.next_free[slot] = c.first_free;
  c.first_free = slot + 1;
  --c.in_use;
  return true;
}

Status PagePool::check(const std::vector<std::vector<uint32_t>>& expected) const {
  for (size_t i = 0; i < classes_.size(); ++i) {
    const SlabClass& c = classes_[i];
    const std::string name = "slab class " + std::to_string(i);
    int64_t in_use = 0;
    for (int64_t slot = 0; slot < c.ever_used; ++slot) {
      if (c.references[slot] != expected[i][slot]) {
        return Error(ErrorCode::kInternal, name + ": slot " + std::to_string(slot) + " counts " +
                                               std::to_string(c.references[slot]) +
                                               " references, tables hold " +
                                               std::to_string(expected[i][slot]));
      }
      if (c.references[slot] > 0) ++in_use;
    }
    for (int64_t slot = c.ever_used; slot < c.spec.num_slots; ++slot) {
      if (expected[i][slot] != 0)
        return Error(ErrorCode::kInternal,
                     name + ": a table names slot " + std::to_string(slot) + ", never handed out");
    }
    if (in_use != c.in_use)
      return Error(ErrorCode::kInternal, name + ": " + std::to_string(c.in_use) +
                                             " slots counted in use, " + std::to_string(in_use) +
                                             " are");
    std::vector<bool> listed(c.ever_used, false);
    int64_t num_free = 0;
    for (uint32_t link = c.first_free; link != 0; link = c.next_free[link - 1]) {
      const uint32_t slot = link - 1;
      if (slot >= c.ever_used || c.references[slot] > 0 || listed[slot])
        return Error(ErrorCode::kInternal,
                     name + ": slot " + std::to_string(slot) + " is wrongly on the free list");
      listed[slot] = true;
      ++num_free;
    }
    if (num_free + c.in_use != c.ever_used)
      return Error(ErrorCode::kInternal, name + ": a slot is neither free nor in use");
  }
  return {};
}

}  // namespace kvant::cache
