#include "kvant/base/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "kvant/base/check.h"

namespace kvant {
namespace {

void* map(int64_t bytes) {
  void* const pointer = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pointer == MAP_FAILED ? nullptr : pointer;
}

// The same, aligned to 2 MiB, with a wish for huge pages on every whole 2 MiB. The rest keeps small
// pages, so resident memory is never above `bytes`; where pages are touched from the start of the
// buffer on, it is less than 2 MiB above what was touched.
void* map_on_huge_pages(int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  constexpr int64_t kPage = 4096;
  if (bytes < kHugePage) return map(bytes);
  bytes = (bytes + kPage - 1) / kPage * kPage;
  auto* const base = static_cast<std::byte*>(map(bytes + kHugePage));
  if (base == nullptr) return nullptr;
  const auto skipped = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(base) % kHugePage);
  std::byte* const pointer = base + skipped;
  // What freeing the buffer will not find. Kernels that refuse the wish use small pages.
  if (skipped > 0) munmap(base, static_cast<size_t>(skipped));
  munmap(pointer + bytes, static_cast<size_t>(kHugePage - skipped));
  madvise(pointer, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
  return pointer;
}

}  // namespace

std::string_view memory_use_name(MemoryUse use) {
  switch (use) {
    case MemoryUse::kWeights: return "weights";
    case MemoryUse::kPages: return "pages";
    case MemoryUse::kTables: return "tables";
    case MemoryUse::kWorkspace: return "workspace";
    case MemoryUse::kOther: return "other";
  }
  return "other";
}

Result<void*> HostMemory::allocate(int64_t bytes, MemoryUse use) {
  KVANT_CHECK(bytes > 0, "allocations have a positive size");
  const std::lock_guard lock(mutex_);
  if (limit_bytes_ > 0 && bytes > limit_bytes_ - stats_.total_now) {
    return Error(ErrorCode::kResourceExhausted,
                 "out of memory: " + std::to_string(bytes) + " bytes asked for " +
                     std::string(memory_use_name(use)) + ", " + std::to_string(stats_.total_now) +
                     " in use, limit " + std::to_string(limit_bytes_) +
                     "; lower the context or raise the limit");
  }
  // Zero-filled, page-aligned and given back to the system when freed.
  void* const pointer = use == MemoryUse::kWeights ? weights_.allocate(bytes)
                        : use == MemoryUse::kPages ? map_on_huge_pages(bytes)
                                                   : map(bytes);
  if (pointer == nullptr) {
    return Error(ErrorCode::kResourceExhausted,
                 "the system refused " + std::to_string(bytes) + " bytes for " +
                     std::string(memory_use_name(use)) + "; lower the context or free memory");
  }
  const size_t index = static_cast<size_t>(use);
  stats_.bytes_now[index] += bytes;
  stats_.bytes_peak[index] = std::max(stats_.bytes_peak[index], stats_.bytes_now[index]);
  stats_.total_now += bytes;
  stats_.total_peak = std::max(stats_.total_peak, stats_.total_now);
  return pointer;
}

void HostMemory::deallocate(void* pointer, int64_t bytes, MemoryUse use) {
  if (pointer == nullptr) return;
  const std::lock_guard lock(mutex_);
  if (use != MemoryUse::kWeights || !weights_.deallocate(pointer, bytes)) {
    munmap(pointer, static_cast<size_t>(bytes));
  }
  stats_.bytes_now[static_cast<size_t>(use)] -= bytes;
  stats_.total_now -= bytes;
}

MemoryStats HostMemory::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void MemoryResource::read(void* target, const void* source, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
}

void HostMemory::copy(void* target, const void* source, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
}

Result<Buffer> Buffer::create(MemoryResource& memory, int64_t bytes, MemoryUse use) {
  KVANT_ASSIGN(void* data, memory.allocate(bytes, use));
  Buffer buffer;
  buffer.memory_ = &memory;
  buffer.data_ = data;
  buffer.bytes_ = bytes;
  buffer.use_ = use;
  return buffer;
}

}  // namespace kvant
