// Memory of one CUDA device: what backend.h's memory() is on it.
//
// Tables (MemoryUse::kTables) are pinned host memory, which the host and kernels read at the same
// address; everything else lies on the device. Zero-filled and aligned to at least 256 bytes.
// Thread-safe.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <string>

#include "kvant/base/memory.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

class DeviceMemory final : public MemoryResource {
 public:
  // `stream` orders the fills and copies with the backend's work; limit in bytes, 0: none.
  DeviceMemory(cudaStream_t stream, int64_t limit_bytes)
      : stream_(stream), limit_bytes_(limit_bytes) {}

  Result<void*> allocate(int64_t bytes, MemoryUse use) override;
  // Waits for the device, which may still use the memory.
  void deallocate(void* pointer, int64_t bytes, MemoryUse use) override;
  MemoryStats stats() const override;
  // Counts memory that the driver takes for itself as if it had been allocated here: within the
  // limit, or an error. uncount() gives it back.
  Status count(int64_t bytes, MemoryUse use);
  void uncount(int64_t bytes, MemoryUse use);
  // The source may be memory of the host or of the device; host memory may be reused on return.
  // A failure stays with the device: take_error().
  void copy(void* target, const void* source, int64_t bytes) override;
  void read(void* target, const void* source, int64_t bytes) override;
  // The first failure of a copy or read, once.
  Status take_error();

 private:
  void remember(cudaError_t error);
  Status check_limit(int64_t bytes, const std::string& asked) const;  // with mutex_ held, as below
  void add(int64_t bytes, MemoryUse use);

  const cudaStream_t stream_;
  const int64_t limit_bytes_;
  mutable std::mutex mutex_;  // guards what follows
  MemoryStats stats_;
  cudaError_t copy_error_ = cudaSuccess;
};

// Pinned host memory from which small arrays go to the device in stream order without waiting.
// Not of a MemoryResource: its size does not depend on model or context.
class UploadRing {
 public:
  UploadRing() = default;
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;
  ~UploadRing();
  Status create(int64_t bytes);

  // Room for `bytes` (at most capacity()), aligned to 256; waits for the stream if all is in use.
  Result<void*> take(int64_t bytes, cudaStream_t stream);
  // Copies host values to the device through the ring.
  Status upload(void* target, const void* source, int64_t bytes, cudaStream_t stream);
  // The stream has been waited for: all of it is free.
  void reset() { used_ = 0; }
  int64_t capacity() const { return capacity_; }

 private:
  void* base_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
};

}  // namespace kvant::backend::cuda
