#include "kvant/backend/cuda/upload.h"

#include <algorithm>
#include <cstring>

namespace kvant::backend::cuda {

Upload::~Upload() {
  cudaFree(owned_);
  for (int i = 0; i < 2; ++i) {
    cudaFreeHost(pinned_[i]);
    if (copied_[i] != nullptr) cudaEventDestroy(copied_[i]);
  }
}

int64_t Upload::add(const void* data, int64_t bytes) {
  const int64_t offset = size_;
  pieces_.push_back({data, bytes, offset});
  size_ = (offset + bytes + 127) / 128 * 128;
  return offset;
}

void Upload::use(std::byte* memory, int64_t bytes) {
  cudaFree(owned_);
  owned_ = nullptr;
  device_ = memory;
  device_bytes_ = bytes;
}

Status Upload::grow(cudaStream_t stream) {
  if (size_ <= pinned_bytes_ && size_ <= device_bytes_) return {};
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for tables in use"));
  const int64_t room = std::max<int64_t>(size_ + size_ / 2, 65536);
  if (size_ > device_bytes_) {
    use(nullptr, 0);
    KVANT_TRY(cuda_status(cudaMalloc(reinterpret_cast<void**>(&owned_), room),
                          "allocating tables on the device"));
    device_ = owned_;
    device_bytes_ = room;
  }
  if (size_ <= pinned_bytes_) return {};
  pinned_bytes_ = 0;
  for (int i = 0; i < 2; ++i) {
    cudaFreeHost(pinned_[i]);
    pinned_[i] = nullptr;
    KVANT_TRY(cuda_status(cudaMallocHost(reinterpret_cast<void**>(&pinned_[i]), room),
                          "allocating pinned memory for tables"));
    if (copied_[i] == nullptr) {
      KVANT_TRY(cuda_status(cudaEventCreateWithFlags(&copied_[i], cudaEventDisableTiming),
                            "creating an event"));
    }
  }
  pinned_bytes_ = room;
  return {};
}

Status Upload::send(cudaStream_t stream) {
  KVANT_TRY(grow(stream));
  turn_ ^= 1;
  KVANT_TRY(cuda_status(cudaEventSynchronize(copied_[turn_]), "waiting for a copy of tables"));
  for (const Piece& piece : pieces_) {
    if (piece.bytes > 0)
      std::memcpy(pinned_[turn_] + piece.offset, piece.data, static_cast<size_t>(piece.bytes));
  }
  KVANT_TRY(cuda_status(cudaMemcpyAsync(device_, pinned_[turn_], static_cast<size_t>(size_),
                                        cudaMemcpyHostToDevice, stream),
                        "copying tables to the device"));
  return cuda_status(cudaEventRecord(copied_[turn_], stream), "recording an event");
}

}  // namespace kvant::backend::cuda
