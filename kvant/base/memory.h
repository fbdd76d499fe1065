// Where large buffers come from, and how many bytes each purpose holds now and held at most.
//
// Everything that scales with model, context or batch (weights that are repacked, pages, workspace)
// is allocated through a MemoryResource, so that the memory plan can be compared with what
// happened. A device backend implements the same interface for its own memory. Thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>

#include "kvant/base/huge_page_arena.h"
#include "kvant/base/result.h"

namespace kvant {

// What a buffer is for; the lines of the memory plan. kTables is memory that the host reads and
// writes directly, for every backend.
enum class MemoryUse { kWeights, kPages, kTables, kWorkspace, kOther };
inline constexpr int kNumMemoryUses = 5;
std::string_view memory_use_name(MemoryUse use);  // "weights", "pages", ...

struct MemoryStats {
  std::array<int64_t, kNumMemoryUses> bytes_now{};
  std::array<int64_t, kNumMemoryUses> bytes_peak{};  // per use, each at its own time
  int64_t total_now = 0;
  int64_t total_peak = 0;  // high-water mark of the sum
};

class MemoryResource {
 public:
  virtual ~MemoryResource() = default;

  // `bytes` > 0, aligned to at least 128 and zero-filled. kResourceExhausted names what was asked,
  // what is in use and the limit.
  virtual Result<void*> allocate(int64_t bytes, MemoryUse use) = 0;
  virtual void deallocate(void* pointer, int64_t bytes, MemoryUse use) = 0;
  virtual MemoryStats stats() const = 0;
  // Copies within this memory or from host memory into it, in order with the backend's other work.
  virtual void copy(void* target, const void* source, int64_t bytes) = 0;
  // Copies out of this memory to host memory, after all work before it; complete on return. This is
  // what host memory does.
  virtual void read(void* target, const void* source, int64_t bytes);
};

// Host memory with an optional limit in bytes (0: none). Memory is touched only when written (pages
// of the cache 2 MiB at a time), so a large reservation costs nothing until it is used.
class HostMemory final : public MemoryResource {
 public:
  explicit HostMemory(int64_t limit_bytes = 0) : limit_bytes_(limit_bytes) {}

  Result<void*> allocate(int64_t bytes, MemoryUse use) override;
  void deallocate(void* pointer, int64_t bytes, MemoryUse use) override;
  MemoryStats stats() const override;
  void copy(void* target, const void* source, int64_t bytes) override;

 private:
  const int64_t limit_bytes_;
  mutable std::mutex mutex_;  // guards what follows
  MemoryStats stats_;
  HugePageArena weights_;  // every token reads all of them
};

// Owns one allocation of a MemoryResource, which must outlive it. Movable.
class Buffer {
 public:
  Buffer() = default;
  static Result<Buffer> create(MemoryResource& memory, int64_t bytes, MemoryUse use);
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer(std::move(other)).swap(*this);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) memory_->deallocate(data_, bytes_, use_);
  }

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(use_, other.use_);
  }
  MemoryResource* memory_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  MemoryUse use_ = MemoryUse::kOther;
};

}  // namespace kvant
