// A host cache in the `sm90` layout and a copy of its pages on the device, for tests: both get the
// same tables, the host is closed by the oracle, the device by kernels, then every byte is
// compared.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/memory.h"
#include "kvant/cache/kv_cache.h"

namespace kvant::backend::cuda::testing {

// Device memory of the length of a test.
class DeviceBytes {
 public:
  explicit DeviceBytes(int64_t bytes);
  DeviceBytes(const void* host, int64_t bytes);
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes();
  std::byte* data() const { return data_; }
  int64_t size() const { return bytes_; }
  void upload(const void* host, int64_t bytes) const;
  std::vector<std::byte> download() const;

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_;
};

// Host memory that knows where its pages are; they start as `poison`.
class RecordedMemory final : public MemoryResource {
 public:
  struct Slab {
    std::byte* host;
    int64_t bytes;
  };
  Result<void*> allocate(int64_t bytes, MemoryUse use) override;
  void deallocate(void* pointer, int64_t bytes, MemoryUse use) override;
  MemoryStats stats() const override { return memory_.stats(); }
  void copy(void* target, const void* source, int64_t bytes) override;
  std::span<const Slab> slabs() const { return slabs_; }

 private:
  HostMemory memory_;
  std::vector<Slab> slabs_;
};

class CacheMirror {
 public:
  // `config.layout` is set to sm90. The memory must outlive the mirror.
  static Result<std::unique_ptr<CacheMirror>> create(cache::CacheConfig config);

  cache::KvCache& cache() { return *cache_; }
  // The host's view with the device's pages; valid until the next call for that group.
  const cache::GroupView& device_view(int group);
  // "" if all pages on the device equal those of the host, else the first difference.
  std::string difference() const;

 private:
  RecordedMemory memory_;
  std::unique_ptr<cache::KvCache> cache_;
  std::vector<std::unique_ptr<DeviceBytes>> slabs_;
  struct DeviceView {
    std::vector<cache::PageKind> kinds;
    cache::GroupView view;
  };
  std::vector<std::unique_ptr<DeviceView>> views_;
};

}  // namespace kvant::backend::cuda::testing
