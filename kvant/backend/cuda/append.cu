#include "kvant/backend/cuda/append.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/quant/append_kernels.cuh"
#include "kvant/backend/cuda/quant/close_kernels.cuh"
#include "kvant/backend/cuda/status.h"
#include "kvant/backend/cuda/step_tables.h"
#include "kvant/formats/sections.h"
#include "kvant/formats/transform.h"

namespace kvant::backend::cuda {

using cache::GroupView;
using cache::PageKind;
using formats::SideParams;
using quant::AppendRowsArgs;
using quant::CloseArgs;
using quant::CloseSide;
using quant::DeviceSideParams;
using quant::EncodeCounters;

namespace {

// The plan's terms of one layer in device memory.
class DeviceParams {
 public:
  DeviceParams() = default;
  DeviceParams(const DeviceParams&) = delete;
  DeviceParams& operator=(const DeviceParams&) = delete;
  ~DeviceParams() { cudaFree(device_); }

  // Sends the terms if they are not those already there.
  Status update(const GroupView& view, int layer, cudaStream_t stream);
  const DeviceSideParams* keys() const {
    return reinterpret_cast<const DeviceSideParams*>(device_);
  }
  const DeviceSideParams* values() const { return keys() + num_kv_heads_; }
  // Whether all global scales are powers of two.
  bool short_scales() const { return short_scales_; }

  const GroupView* view = nullptr;
  int layer = 0;

 private:
  std::vector<float> terms_;  // of all heads, keys then values: g, and the vectors it has
  std::vector<uint8_t> has_;  // per head: bit 0 bias, bit 1 smooth
  int num_kv_heads_ = 0;
  bool short_scales_ = false;
  int64_t capacity_ = 0;
  std::byte* device_ = nullptr;
};

Status DeviceParams::update(const GroupView& view, int layer, cudaStream_t stream) {
  std::vector<float> terms;
  std::vector<uint8_t> has;
  const cache::LayerParams& params = view.layers[layer];
  for (const auto& side : {params.k, params.v}) {
    for (const SideParams& p : side.first(view.num_kv_heads)) {
      terms.push_back(p.global_scale);
      if (p.bias != nullptr) terms.insert(terms.end(), p.bias, p.bias + view.head_dim);
      if (p.smooth != nullptr) terms.insert(terms.end(), p.smooth, p.smooth + view.head_dim);
      has.push_back(
          static_cast<uint8_t>((p.bias != nullptr ? 1 : 0) | (p.smooth != nullptr ? 2 : 0)));
    }
  }
  if (device_ != nullptr && has == has_ && terms.size() == terms_.size() &&
      std::memcmp(terms.data(), terms_.data(), terms.size() * sizeof(float)) == 0) {
    return {};
  }
  const auto head_bytes = static_cast<int64_t>(has.size() * sizeof(DeviceSideParams));
  const auto bytes = head_bytes + static_cast<int64_t>(terms.size() * sizeof(float));
  if (bytes > capacity_) {
    cudaFree(std::exchange(device_, nullptr));
    capacity_ = 0;
    KVANT_TRY(cuda_status(cudaMalloc(&device_, bytes), "allocating the plan's terms"));
    capacity_ = bytes;
  }
  std::vector<std::byte> host(bytes);
  const float* vectors = reinterpret_cast<const float*>(device_ + head_bytes);
  for (size_t i = 0, at = 0; i < has.size(); ++i) {
    DeviceSideParams p = {terms[at++], nullptr, nullptr};
    if ((has[i] & 1) != 0) p.bias = vectors + std::exchange(at, at + view.head_dim);
    if ((has[i] & 2) != 0) p.smooth = vectors + std::exchange(at, at + view.head_dim);
    std::memcpy(host.data() + i * sizeof(p), &p, sizeof(p));
  }
  std::memcpy(host.data() + head_bytes, terms.data(), terms.size() * sizeof(float));
  // From pageable memory: staged before the call returns.
  KVANT_TRY(
      cuda_status(cudaMemcpyAsync(device_, host.data(), bytes, cudaMemcpyHostToDevice, stream),
                  "copying the plan's terms"));
  terms_ = std::move(terms);
  has_ = std::move(has);
  num_kv_heads_ = view.num_kv_heads;
  const auto is_short = [](const SideParams& p) {
    int exponent = 0;
    return std::frexp(p.global_scale, &exponent) == 0.5f;
  };
  short_scales_ = std::ranges::all_of(params.k.first(view.num_kv_heads), is_short) &&
                  std::ranges::all_of(params.v.first(view.num_kv_heads), is_short);
  return {};
}

CloseSide make_close_side(const GroupView& view, int layer, bool keys,
                          const DeviceSideParams* params) {
  const PageKind& kind = view.kinds[cache::kKindStored];
  const formats::UnitSections& at = kind.units[layer];
  CloseSide side;
  side.format = (keys ? kind.k_format : kind.v_format)[layer];
  side.map = make_side_map({side.format, keys ? cache::SideRole::kKeys : cache::SideRole::kValues,
                            view.page_tokens, view.head_dim});
  side.rotation_scale = formats::rotation_scale(formats::rotation_block(view.head_dim));
  side.source_at = keys ? 0 : view.page_tokens * view.head_dim * 2;
  side.codes_at = static_cast<int>(keys ? at.k_codes : at.v_codes);
  side.scales_at = static_cast<int>(keys ? at.k_scales : at.v_scales);
  side.mean_at = static_cast<int>(keys ? at.k_mean : at.bytes);
  side.end_at = static_cast<int>(keys ? at.v_codes : at.bytes);
  side.params = params;
  return side;
}

void fill_kinds(const GroupView& view, int layer, quant::DeviceKind* kinds) {
  for (int i = 0; i < quant::kNumKinds && i < static_cast<int>(view.kinds.size()); ++i) {
    const PageKind& kind = view.kinds[i];
    kinds[i] = {kind.base + (kind.base != nullptr ? kind.layer_offset[layer] : 0), kind.page_bytes,
                kind.units[layer].bytes};
  }
}

Status check_view(const GroupView& view) {
  for (const PageKind& kind : view.kinds) {
    if (kind.base != nullptr && kind.layout != cache::Layout::kSm90)
      return Error(ErrorCode::kUnsupported, "pages of a CUDA device have the layout sm90");
  }
  if (view.strict) {
    for (const auto& side :
         {view.kinds[cache::kKindStored].k_format, view.kinds[cache::kKindStored].v_format}) {
      for (const formats::SideFormat& format : side) {
        const formats::FormatInfo& info = formats::format_info(format.base);
        if (info.axis == formats::BlockAxis::kToken || format.mean) {
          return Error(ErrorCode::kUnsupported,
                       "+strict quantises token by token; " + std::string(info.name) +
                           " needs the whole page: leave +strict out or choose a format whose "
                           "blocks lie within one token");
        }
      }
    }
  }
  return {};
}

}  // namespace

struct CacheAppend::State {
  StepTables tables;
  std::vector<std::unique_ptr<DeviceParams>> params;
  EncodeCounters* counters = nullptr;
  EncodeCounters* host_counters = nullptr;  // pinned

  ~State() {
    cudaFree(counters);
    cudaFreeHost(host_counters);
  }
  Result<const DeviceParams*> layer_params(const GroupView& view, int layer, cudaStream_t stream);
};

Result<const DeviceParams*> CacheAppend::State::layer_params(const GroupView& view, int layer,
                                                             cudaStream_t stream) {
  DeviceParams* found = nullptr;
  for (const auto& known : params) {
    if (known->view == &view && known->layer == layer) found = known.get();
  }
  if (found == nullptr) {
    params.push_back(std::make_unique<DeviceParams>());
    found = params.back().get();
    found->view = &view;
    found->layer = layer;
  }
  KVANT_TRY(found->update(view, layer, stream));
  return found;
}

CacheAppend::CacheAppend() : state_(std::make_unique<State>()) {}
CacheAppend::~CacheAppend() = default;

Result<std::unique_ptr<CacheAppend>> CacheAppend::create() {
  std::unique_ptr<CacheAppend> append(new CacheAppend());
  State& s = *append->state_;
  KVANT_TRY(cuda_status(cudaMalloc(&s.counters, sizeof(EncodeCounters)), "allocating counters"));
  KVANT_TRY(cuda_status(cudaMallocHost(&s.host_counters, sizeof(EncodeCounters)),
                        "allocating pinned counters"));
  KVANT_TRY(cuda_status(cudaMemset(s.counters, 0, sizeof(EncodeCounters)), "clearing counters"));
  KVANT_TRY(quant::allow_shared_memory());
  return Result<std::unique_ptr<CacheAppend>>(std::move(append));
}

Status CacheAppend::run(const AppendArgs& args, cudaStream_t stream) {
  return launch(args, {}, stream);
}

Result<bool> CacheAppend::run_rotated(const AppendArgs& args, const AppendRotation& rotation,
                                      cudaStream_t stream) {
  if (args.view->strict) return false;
  KVANT_ASSIGN(const StepTables::Table table, state_->tables.get(*args.view, stream));
  if (table.closes_append) return false;
  KVANT_TRY(launch(args, rotation, stream));
  return true;
}

// With a table in `rotation`: see run_rotated().
Status CacheAppend::launch(const AppendArgs& args, const AppendRotation& rotation,
                           cudaStream_t stream) {
  const GroupView& view = *args.view;
  const int layer = args.group_layer;
  KVANT_TRY(check_view(view));
  KVANT_ASSIGN(const StepTables::Table table, state_->tables.get(view, stream));
  KVANT_ASSIGN(const DeviceParams* params, state_->layer_params(view, layer, stream));
  AppendRowsArgs rows = {};
  rows.items = table.rows;
  rows.num_items = table.num_rows;
  rows.num_kv_heads = view.num_kv_heads;
  rows.head_dim = view.head_dim;
  rows.page_tokens = view.page_tokens;
  rows.rows[0] = static_cast<const float*>(args.k);
  rows.rows[1] = static_cast<const float*>(args.v);
  rows.counters = state_->counters;
  fill_kinds(view, layer, rows.kinds);
  rows.sides[0] = make_close_side(view, layer, true, params->keys());
  rows.sides[1] = make_close_side(view, layer, false, params->values());

  const int num_runs = table.num_rows * view.num_kv_heads * 2;
  if (num_runs > 0 && view.strict) {
    KVANT_TRY(launch_overlapped("append_strict_kernel", quant::append_strict_kernel,
                                {static_cast<unsigned>(num_runs), kLanes, 0, stream}, rows));
  } else if (rotation.table != nullptr) {
    constexpr int kWarps = quant::kAppendThreads / kLanes;
    const int warps = num_runs + rotation.num_rows * rotation.num_query_heads;
    const auto blocks = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
    KVANT_TRY(launch_overlapped("rotate_append_kernel", quant::rotate_append_kernel,
                                {blocks, quant::kAppendThreads, 0, stream}, rows, rotation));
  } else if (num_runs > 0) {
    constexpr int kWarps = quant::kAppendThreads / kLanes;
    const auto blocks = static_cast<unsigned>((num_runs + kWarps - 1) / kWarps);
    KVANT_TRY(launch_overlapped("append_rows_kernel", quant::append_rows_kernel,
                                {blocks, quant::kAppendThreads, 0, stream}, rows));
  }
  const int num_sides = table.num_closes * view.num_kv_heads * 2;
  if (num_sides == 0) return {};
  const CloseSide& k = rows.sides[0];
  const CloseSide& v = rows.sides[1];
  const auto kernel = quant::find_close_kernel(k.format, v.format, params->short_scales());
  const int scratch = quant::close_scratch_bytes(view.page_tokens, view.head_dim,
                                                 std::max(k.map.code_bits, v.map.code_bits));
  return launch_overlapped("close_kernel", kernel,
                           {static_cast<unsigned>(num_sides), quant::kCloseThreads,
                            static_cast<size_t>(scratch), stream},
                           CloseArgs{rows, table.closes});
}

Result<formats::EncodeStats> CacheAppend::take_stats(cudaStream_t stream) {
  State& s = *state_;
  KVANT_TRY(cuda_status(cudaMemcpyAsync(s.host_counters, s.counters, sizeof(EncodeCounters),
                                        cudaMemcpyDeviceToHost, stream),
                        "reading counters"));
  KVANT_TRY(cuda_status(cudaMemsetAsync(s.counters, 0, sizeof(EncodeCounters), stream),
                        "clearing counters"));
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "appending to the cache"));
  return formats::EncodeStats{.non_finite = static_cast<int64_t>(s.host_counters->non_finite),
                              .saturated = static_cast<int64_t>(s.host_counters->saturated)};
}

}  // namespace kvant::backend::cuda
