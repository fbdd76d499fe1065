// Tables that the host makes for a step and the device reads: one pinned buffer, one copy.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {

// Pieces are added, then sent together. The pinned side is double: a piece may be written while the
// copy of the step before still runs. Grows when a step needs more (never in steady state); its
// device side only if it does not fit the memory that it is given.
class Upload {
 public:
  Upload() = default;
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;
  ~Upload();

  // Device memory to work in, whose owner keeps it; null takes it away. Nothing may be in use.
  void use(std::byte* memory, int64_t bytes);
  bool outgrew() const { return owned_ != nullptr; }

  // Starts a new set of pieces.
  void clear() { size_ = 0, pieces_.clear(); }
  // Returns the piece's offset in the device buffer; pieces are aligned to 128 bytes. `data` is
  // read by send().
  int64_t add(const void* data, int64_t bytes);
  template <typename T>
  int64_t add(const std::vector<T>& values) {
    return add(values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
  }
  Status send(cudaStream_t stream);

  template <typename T>
  const T* device(int64_t offset) const {
    return reinterpret_cast<const T*>(device_ + offset);
  }

 private:
  struct Piece {
    const void* data;
    int64_t bytes;
    int64_t offset;
  };
  Status grow(cudaStream_t stream);

  std::vector<Piece> pieces_;
  int64_t size_ = 0;
  int64_t pinned_bytes_ = 0;  // of each buffer
  int64_t device_bytes_ = 0;
  std::byte* device_ = nullptr;  // owned_, or the memory given
  std::byte* owned_ = nullptr;
  std::byte* pinned_[2] = {nullptr, nullptr};
  cudaEvent_t copied_[2] = {nullptr, nullptr};
  int turn_ = 0;
};

}  // namespace kvant::backend::cuda
