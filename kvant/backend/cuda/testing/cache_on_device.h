// For tests and benchmarks of CUDA attention: a KvCache in host memory with pages in `sm90` layout,
// filled by the scalar oracle, and a copy of its pages in device memory behind a second view.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvant/attention/problem.h"
#include "kvant/base/memory.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/formats/plan.h"

namespace kvant::backend::cuda::testing {

// Remembers where pages are and fills them with NaN: reading what was never written shows.
class TrackingMemory final : public MemoryResource {
 public:
  struct Block {
    std::byte* data;
    int64_t bytes;
  };

  Result<void*> allocate(int64_t bytes, MemoryUse use) override;
  void deallocate(void* pointer, int64_t bytes, MemoryUse use) override;
  MemoryStats stats() const override { return memory_.stats(); }
  void copy(void* target, const void* source, int64_t bytes) override;
  const std::vector<Block>& page_blocks() const { return pages_; }

 private:
  HostMemory memory_;
  std::vector<Block> pages_;
};

// Device memory of one size, freed at the end. Null where allocation failed.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t bytes);
  DeviceBuffer(const void* source, int64_t bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer();

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  void read(void* target) const;
  void fill(int byte) const;

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Why CUDA tests cannot run here; empty if they can.
std::string no_device_reason();
// The same of tests of kernels that only Hopper has.
std::string no_hopper_reason();

// Reproducible values, about normal; keys have channels with an offset and larger ones.
enum class Rows { kQueries, kKeys, kValues };
float row_value(Rows kind, int sequence, int head, int64_t position, int channel);

struct CacheShape {
  std::string kv = "bf16";
  int num_kv_heads = 2;
  int head_dim = 128;
  int page_tokens = 64;
  int cache_window = 0;  // 0: the cache keeps all pages
  struct Sequence {
    int history = 0;
    int new_tokens = 0;
  };
  std::vector<Sequence> sequences;
};

// One layer. After construction a step with all new tokens is open and appended; view() is in host
// memory, device_view() the same with pages on the device.
class CacheOnDevice {
 public:
  explicit CacheOnDevice(const CacheShape& shape);
  ~CacheOnDevice();

  const cache::GroupView& view() const { return cache_->view(0); }
  cache::GroupView device_view() const;
  int num_rows() const { return num_rows_; }
  // [row][head][head_dim] of the open step.
  std::vector<float> rows(Rows kind, int num_heads) const;

 private:
  void append(std::span<const int> new_tokens);
  std::vector<float> rows_of(Rows kind, int num_heads, std::span<const int> new_tokens) const;

  CacheShape shape_;
  TrackingMemory memory_;
  formats::QuantPlan plan_;
  std::unique_ptr<cache::KvCache> cache_;
  std::vector<cache::SequenceId> ids_;
  int num_rows_ = 0;
  std::vector<DeviceBuffer> pages_;  // of page_blocks()
  std::vector<cache::PageKind> device_kinds_;
};

}  // namespace kvant::backend::cuda::testing
