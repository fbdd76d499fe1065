#include "kvant/backend/cuda/testing/cache_mirror.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "kvant/base/check.h"

namespace kvant::backend::cuda::testing {
namespace {

void require(cudaError_t error) {
  KVANT_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

}  // namespace

DeviceBytes::DeviceBytes(int64_t bytes) : bytes_(bytes) {
  require(cudaMalloc(&data_, std::max<int64_t>(bytes, 1)));
}
DeviceBytes::DeviceBytes(const void* host, int64_t bytes) : DeviceBytes(bytes) {
  upload(host, bytes);
}
DeviceBytes::~DeviceBytes() {
  cudaFree(data_);
}
void DeviceBytes::upload(const void* host, int64_t bytes) const {
  require(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice));
}
std::vector<std::byte> DeviceBytes::download() const {
  std::vector<std::byte> host(bytes_);
  require(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
  return host;
}

Result<void*> RecordedMemory::allocate(int64_t bytes, MemoryUse use) {
  KVANT_ASSIGN(void* data, memory_.allocate(bytes, use));
  if (use == MemoryUse::kPages) slabs_.push_back({static_cast<std::byte*>(data), bytes});
  return data;
}
void RecordedMemory::deallocate(void* pointer, int64_t bytes, MemoryUse use) {
  std::erase_if(slabs_, [&](const Slab& slab) { return slab.host == pointer; });
  memory_.deallocate(pointer, bytes, use);
}
void RecordedMemory::copy(void* target, const void* source, int64_t bytes) {
  memory_.copy(target, source, bytes);
}

Result<std::unique_ptr<CacheMirror>> CacheMirror::create(cache::CacheConfig config) {
  config.layout = cache::Layout::kSm90;
  std::unique_ptr<CacheMirror> mirror(new CacheMirror());
  KVANT_ASSIGN(mirror->cache_, cache::KvCache::create(config, mirror->memory_));
  for (const RecordedMemory::Slab& slab : mirror->memory_.slabs())
    mirror->slabs_.push_back(std::make_unique<DeviceBytes>(slab.host, slab.bytes));
  mirror->views_.resize(mirror->cache_->num_groups());
  for (auto& view : mirror->views_) view = std::make_unique<DeviceView>();
  return mirror;
}

const cache::GroupView& CacheMirror::device_view(int group) {
  const cache::GroupView& host = cache_->view(group);
  DeviceView& device = *views_[group];
  device.kinds.assign(host.kinds.begin(), host.kinds.end());
  const auto slabs = memory_.slabs();
  for (cache::PageKind& kind : device.kinds) {
    std::byte* base = nullptr;
    for (size_t i = 0; i < slabs.size(); ++i) {
      const int64_t offset = kind.base - slabs[i].host;
      if (kind.base != nullptr && offset >= 0 && offset < slabs[i].bytes)
        base = slabs_[i]->data() + offset;
    }
    kind.base = base;
  }
  device.view = host;
  device.view.kinds = device.kinds;
  return device.view;
}

std::string CacheMirror::difference() const {
  const auto slabs = memory_.slabs();
  for (size_t i = 0; i < slabs.size(); ++i) {
    const std::vector<std::byte> device = slabs_[i]->download();
    if (std::memcmp(device.data(), slabs[i].host, device.size()) == 0) continue;
    size_t at = 0;
    int64_t count = 0;
    for (size_t b = device.size(); b-- > 0;) {
      if (device[b] != slabs[i].host[b]) at = b, ++count;
    }
    return "slab " + std::to_string(i) + ": " + std::to_string(count) + " of " +
           std::to_string(device.size()) + " bytes differ, the first at " + std::to_string(at) +
           ": device " + std::to_string(static_cast<int>(device[at])) + ", host " +
           std::to_string(static_cast<int>(slabs[i].host[at]));
  }
  return {};
}

}  // namespace kvant::backend::cuda::testing
