#include "kvant/base/huge_page_arena.h"

#include <sys/mman.h>

#include <algorithm>

namespace kvant {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kPage = 4096;
constexpr int64_t kMappingBytes = int64_t{256} << 20;

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}
std::byte* round_up(std::byte* pointer, int64_t step) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return pointer + (round_up(static_cast<int64_t>(address), step) - static_cast<int64_t>(address));
}

}  // namespace

HugePageArena::~HugePageArena() {
  for (const Mapping& mapping : mappings_)
    munmap(mapping.base, static_cast<size_t>(mapping.mapped));
}

bool HugePageArena::add_mapping(int64_t bytes) {
  // Addresses only: pages become usable as buffers are cut from them.
  const int64_t size = std::max(kMappingBytes, round_up(bytes, kHugePage)) + kHugePage;
  void* base = mmap(nullptr, static_cast<size_t>(size), PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return false;
  Mapping mapping;
  mapping.base = static_cast<std::byte*>(base);
  mapping.mapped = size;
  mapping.next = mapping.usable = round_up(mapping.base, kHugePage);
  // A wish: kernels without huge pages refuse it, and everything works as before.
  madvise(base, static_cast<size_t>(size), MADV_HUGEPAGE);
  mappings_.push_back(mapping);
  return true;
}

void* HugePageArena::allocate(int64_t bytes) {
  bytes = round_up(bytes, kPage);
  const auto fits = [&](const Mapping& m) { return m.base + m.mapped - m.next >= bytes; };
  if (mappings_.empty() || !fits(mappings_.back())) {
    if (!add_mapping(bytes)) return nullptr;
  }
  Mapping& mapping = mappings_.back();
  std::byte* const end = mapping.next + bytes;
  if (end > mapping.usable) {
    // Whole huge pages at once, else the first touch of a half usable one would get small pages.
    std::byte* const usable = std::min(round_up(end, kHugePage), mapping.base + mapping.mapped);
    if (mprotect(mapping.usable, static_cast<size_t>(usable - mapping.usable),
                 PROT_READ | PROT_WRITE) != 0) {
      return nullptr;
    }
    mapping.usable = usable;
  }
  void* const buffer = mapping.next;
  mapping.next = end;
  ++mapping.buffers;
  return buffer;
}

bool HugePageArena::deallocate(void* pointer, int64_t bytes) {
  auto* const at = static_cast<std::byte*>(pointer);
  const auto mapping = std::find_if(mappings_.begin(), mappings_.end(), [&](const Mapping& m) {
    return at >= m.base && at < m.base + m.mapped;
  });
  if (mapping == mappings_.end()) return false;
  if (--mapping->buffers == 0) {
    munmap(mapping->base, static_cast<size_t>(mapping->mapped));
    mappings_.erase(mapping);
  } else {
    madvise(pointer, static_cast<size_t>(round_up(bytes, kPage)), MADV_DONTNEED);
  }
  return true;
}

}  // namespace kvant
