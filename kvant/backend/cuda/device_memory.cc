#include "kvant/backend/cuda/device_memory.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

// cudaMalloc aligns to 256 bytes, cudaHostAlloc to a page.
Result<void*> allocate_zeroed(int64_t bytes, bool on_host, cudaStream_t stream) {
  const auto size = static_cast<size_t>(bytes);
  void* pointer = nullptr;
  if (on_host) {
    KVANT_TRY(cuda_status(cudaHostAlloc(&pointer, size, cudaHostAllocPortable),
                          "allocating pinned host memory"));
    std::memset(pointer, 0, size);
    return pointer;
  }
  if (cudaError_t error = cudaMalloc(&pointer, size); error != cudaSuccess) {
    cudaGetLastError();  // it does not stay: a smaller request may succeed
    return cuda_status(error, "allocating device memory").error();
  }
  const cudaError_t filled = cudaMemsetAsync(pointer, 0, size, stream);
  if (filled != cudaSuccess) {
    cudaFree(pointer);
    return cuda_status(filled, "clearing device memory").error();
  }
  return pointer;
}

std::string asked_for(int64_t bytes, MemoryUse use) {
  return std::to_string(bytes) + " bytes asked for " + std::string(memory_use_name(use));
}

}  // namespace

Status DeviceMemory::check_limit(int64_t bytes, const std::string& asked) const {
  if (limit_bytes_ == 0 || bytes <= limit_bytes_ - stats_.total_now) return {};
  return Error(ErrorCode::kResourceExhausted, "out of memory: " + asked + ", " +
                                                  std::to_string(stats_.total_now) +
                                                  " in use, limit " + std::to_string(limit_bytes_) +
                                                  "; lower the context or raise the limit");
}

void DeviceMemory::add(int64_t bytes, MemoryUse use) {
  const auto index = static_cast<size_t>(use);
  stats_.bytes_now[index] += bytes;
  stats_.bytes_peak[index] = std::max(stats_.bytes_peak[index], stats_.bytes_now[index]);
  stats_.total_now += bytes;
  stats_.total_peak = std::max(stats_.total_peak, stats_.total_now);
}

Result<void*> DeviceMemory::allocate(int64_t bytes, MemoryUse use) {
  KVANT_CHECK(bytes > 0, "allocations have a positive size");
  const std::lock_guard lock(mutex_);
  const std::string asked = asked_for(bytes, use);
  KVANT_TRY(check_limit(bytes, asked));
  Result<void*> pointer = allocate_zeroed(bytes, use == MemoryUse::kTables, stream_);
  if (!pointer && pointer.error().code() == ErrorCode::kResourceExhausted) {
    return Error(ErrorCode::kResourceExhausted,
                 "the device refused memory: " + asked + ", " + std::to_string(stats_.total_now) +
                     " in use; lower the context or free memory of the device (nvidia-smi shows "
                     "who uses it)");
  }
  KVANT_TRY(pointer);
  add(bytes, use);
  return pointer;
}

void DeviceMemory::deallocate(void* pointer, int64_t bytes, MemoryUse use) {
  if (pointer == nullptr) return;
  const std::lock_guard lock(mutex_);
  if (use == MemoryUse::kTables) {
    cudaStreamSynchronize(stream_);
    cudaFreeHost(pointer);
  } else {
    cudaFree(pointer);  // waits for the device
  }
  stats_.bytes_now[static_cast<size_t>(use)] -= bytes;
  stats_.total_now -= bytes;
}

Status DeviceMemory::count(int64_t bytes, MemoryUse use) {
  const std::lock_guard lock(mutex_);
  KVANT_TRY(check_limit(bytes, asked_for(bytes, use)));
  add(bytes, use);
  return {};
}

void DeviceMemory::uncount(int64_t bytes, MemoryUse use) {
  const std::lock_guard lock(mutex_);
  stats_.bytes_now[static_cast<size_t>(use)] -= bytes;
  stats_.total_now -= bytes;
}

MemoryStats DeviceMemory::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void DeviceMemory::remember(cudaError_t error) {
  const std::lock_guard lock(mutex_);
  if (copy_error_ == cudaSuccess) copy_error_ = error;
}

void DeviceMemory::copy(void* target, const void* source, int64_t bytes) {
  remember(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_));
}

void DeviceMemory::read(void* target, const void* source, int64_t bytes) {
  copy(target, source, bytes);
  remember(cudaStreamSynchronize(stream_));
}

Status DeviceMemory::take_error() {
  const std::lock_guard lock(mutex_);
  const cudaError_t error = std::exchange(copy_error_, cudaSuccess);
  return cuda_status(error, "copying into or out of device memory");
}

UploadRing::~UploadRing() {
  if (base_ != nullptr) cudaFreeHost(base_);
}

Status UploadRing::create(int64_t bytes) {
  KVANT_TRY(cuda_status(cudaHostAlloc(&base_, static_cast<size_t>(bytes), cudaHostAllocPortable),
                        "allocating pinned host memory"));
  capacity_ = bytes;
  return {};
}

Result<void*> UploadRing::take(int64_t bytes, cudaStream_t stream) {
  KVANT_CHECK(bytes <= capacity_, "uploads fit the ring");
  if (used_ + bytes > capacity_) {
    KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for uploads"));
    used_ = 0;
  }
  void* const piece = static_cast<char*>(base_) + used_;
  used_ += (bytes + 255) / 256 * 256;
  return piece;
}

Status UploadRing::upload(void* target, const void* source, int64_t bytes, cudaStream_t stream) {
  for (int64_t done = 0; done < bytes;) {
    const int64_t part = std::min(bytes - done, capacity_ / 2);
    KVANT_ASSIGN(void* const staged, take(part, stream));
    std::memcpy(staged, static_cast<const char*>(source) + done, static_cast<size_t>(part));
    KVANT_TRY(
        cuda_status(cudaMemcpyAsync(static_cast<char*>(target) + done, staged,
                                    static_cast<size_t>(part), cudaMemcpyHostToDevice, stream),
                    "copying to the device"));
    done += part;
  }
  return {};
}

}  // namespace kvant::backend::cuda
