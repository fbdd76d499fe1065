#include "kvant/backend/cuda/testing/cache_on_device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvant/backend/cuda/device.h"
#include "kvant/base/check.h"
#include "kvant/cache/scalar_append.h"

namespace kvant::backend::cuda::testing {

Result<void*> TrackingMemory::allocate(int64_t bytes, MemoryUse use) {
  KVANT_ASSIGN(void* data, memory_.allocate(bytes, use));
  if (use == MemoryUse::kPages) {
    std::memset(data, 0xff, static_cast<size_t>(bytes));
    pages_.push_back({static_cast<std::byte*>(data), bytes});
  }
  return data;
}

void TrackingMemory::deallocate(void* pointer, int64_t bytes, MemoryUse use) {
  std::erase_if(pages_, [&](const Block& block) { return block.data == pointer; });
  memory_.deallocate(pointer, bytes, use);
}

void TrackingMemory::copy(void* target, const void* source, int64_t bytes) {
  memory_.copy(target, source, bytes);
}

DeviceBuffer::DeviceBuffer(int64_t bytes) : bytes_(bytes) {
  const cudaError_t error = cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
  KVANT_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

DeviceBuffer::DeviceBuffer(const void* source, int64_t bytes) : DeviceBuffer(bytes) {
  const cudaError_t error =
      cudaMemcpy(data_, source, static_cast<size_t>(bytes), cudaMemcpyHostToDevice);
  KVANT_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) cudaFree(data_);
}

void DeviceBuffer::read(void* target) const {
  const cudaError_t error =
      cudaMemcpy(target, data_, static_cast<size_t>(bytes_), cudaMemcpyDeviceToHost);
  KVANT_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

void DeviceBuffer::fill(int byte) const {
  const cudaError_t error = cudaMemset(data_, byte, static_cast<size_t>(bytes_));
  KVANT_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

std::string no_device_reason() {
  const auto device = find_device();
  return device ? "" : device.error().message();
}

std::string no_hopper_reason() {
  const std::string reason = no_device_reason();
  if (!reason.empty() || device_traits().level == DeviceLevel::kHopper) return reason;
  return "the kernels are those of the Hopper generation";
}

namespace {

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

float about_normal(uint64_t hash) {
  float x = -2.0f;
  for (int i = 0; i < 4; ++i) x += static_cast<float>((hash >> (16 * i)) & 0xffff) / 65536.0f;
  return x * 1.7f;
}

formats::QuantPlan make_plan(const CacheShape& shape) {
  formats::QuantPlan plan;
  plan.layers.resize(1);
  for (formats::SidePlan* side : {&plan.layers[0].k, &plan.layers[0].v}) {
    const float g = side == &plan.layers[0].k ? 0.03f : 0.011f;
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      side->global_scale.push_back(g * static_cast<float>(h + 1));
    }
    for (int i = 0; i < shape.num_kv_heads * shape.head_dim; ++i) {
      side->bias.push_back(0.3f * about_normal(mix(static_cast<uint64_t>(i) + 7000)));
      side->smooth.push_back(std::exp2(0.5f * about_normal(mix(static_cast<uint64_t>(i) + 90000))));
    }
  }
  return plan;
}

}  // namespace

float row_value(Rows kind, int sequence, int head, int64_t position, int channel) {
  const auto k = static_cast<uint64_t>(kind);
  uint64_t h = mix(k * 1000003 + static_cast<uint64_t>(sequence * 1009 + head));
  h = mix(h ^ static_cast<uint64_t>(position * 512 + channel));
  const float x = about_normal(h);
  if (kind != Rows::kKeys) return x;
  const uint64_t c = mix(static_cast<uint64_t>(head * 131 + channel));
  return (c % 13 == 0 ? 2.0f * x : x) + (c % 11 == 0 ? 4.0f : 0.0f);
}

CacheOnDevice::CacheOnDevice(const CacheShape& shape) : shape_(shape), plan_(make_plan(shape)) {
  auto format = formats::parse_cache_format(shape.kv);
  KVANT_CHECK(format.has_value(), format ? "" : format.error().message().c_str());
  cache::CacheConfig config;
  config.layers.push_back({shape.num_kv_heads, shape.head_dim, shape.cache_window});
  config.format = *format;
  config.plan = &plan_;
  config.page_tokens = shape.page_tokens;
  config.layout = cache::Layout::kSm90;
  std::vector<int> history, chunks;
  for (const CacheShape::Sequence& seq : shape.sequences) {
    history.push_back(seq.history);
    chunks.push_back(seq.new_tokens);
    config.max_tokens += seq.history + seq.new_tokens + 2 * shape.page_tokens;
    config.max_step_tokens += seq.history + seq.new_tokens;
    num_rows_ += seq.new_tokens;
  }
  config.max_sequences = static_cast<int>(shape.sequences.size());
  auto cache = cache::KvCache::create(config, memory_);
  KVANT_CHECK(cache.has_value(), cache ? "" : cache.error().message().c_str());
  cache_ = std::move(cache).value();
  for (size_t s = 0; s < shape.sequences.size(); ++s) {
    ids_.push_back(cache_->add_sequence().value());
  }
  append(history);
  cache_->commit_step();
  append(chunks);
  for (const TrackingMemory::Block& block : memory_.page_blocks()) {
    pages_.emplace_back(block.data, block.bytes);
  }
  for (const cache::PageKind& kind : view().kinds) {
    device_kinds_.push_back(kind);
    for (size_t b = 0; b < pages_.size(); ++b) {
      const TrackingMemory::Block& block = memory_.page_blocks()[b];
      if (kind.base >= block.data && kind.base < block.data + block.bytes) {
        device_kinds_.back().base = pages_[b].as<std::byte>() + (kind.base - block.data);
      }
    }
  }
}

CacheOnDevice::~CacheOnDevice() = default;

void CacheOnDevice::append(std::span<const int> new_tokens) {
  std::vector<cache::StepSequence> step;
  for (size_t s = 0; s < new_tokens.size(); ++s) {
    if (new_tokens[s] > 0) step.push_back({ids_[s], new_tokens[s]});
  }
  const Status begun = cache_->begin_step(step);
  KVANT_CHECK(begun.has_value(), begun ? "" : begun.error().message().c_str());
  const std::vector<float> k = rows_of(Rows::kKeys, shape_.num_kv_heads, new_tokens);
  const std::vector<float> v = rows_of(Rows::kValues, shape_.num_kv_heads, new_tokens);
  const auto stats = cache::scalar_append(cache_->view(0), 0, k.data(), v.data());
  KVANT_CHECK(stats.has_value(), stats ? "" : stats.error().message().c_str());
}

std::vector<float> CacheOnDevice::rows_of(Rows kind, int num_heads,
                                          std::span<const int> new_tokens) const {
  std::vector<float> values;
  for (size_t s = 0; s < new_tokens.size(); ++s) {
    const int64_t first = cache_->length(ids_[s]);
    for (int t = 0; t < new_tokens[s]; ++t) {
      for (int h = 0; h < num_heads; ++h) {
        for (int c = 0; c < shape_.head_dim; ++c) {
          values.push_back(row_value(kind, static_cast<int>(s), h, first + t, c));
        }
      }
    }
  }
  return values;
}

std::vector<float> CacheOnDevice::rows(Rows kind, int num_heads) const {
  std::vector<int> chunks;
  for (const CacheShape::Sequence& seq : shape_.sequences) chunks.push_back(seq.new_tokens);
  return rows_of(kind, num_heads, chunks);
}

cache::GroupView CacheOnDevice::device_view() const {
  cache::GroupView view = this->view();
  view.kinds = device_kinds_;
  return view;
}

}  // namespace kvant::backend::cuda::testing
