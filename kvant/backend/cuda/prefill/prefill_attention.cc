#include "kvant/backend/cuda/prefill/prefill_attention.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <utility>

#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/prefill/attention_kernel.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {

namespace {

constexpr int64_t kAlignment = 256;
constexpr int kMaxRotaryDim = 512;
constexpr float kLog2e = 1.4426950408889634f;

int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int tile_tokens(int group) {
  return std::max(1, kTileRows / group);
}

int64_t max_table_bytes(const PrefillLimits& limits) {
  const int group = limits.num_query_heads / limits.num_kv_heads;
  const int64_t tiles = limits.max_rows / tile_tokens(group) + limits.max_sequences;
  const int64_t vectors = int64_t{4} * limits.num_kv_heads * (limits.head_dim + 1) * 4;
  // Batches that split a sequence list its tiles again.
  const int64_t splits = 2 + limits.max_pages * 2 *
                                 image_bytes(limits.head_dim, limits.page_tokens, limits.images) /
                                 limits.image_bytes;
  return aligned((limits.max_pages + limits.max_sequences) * int64_t{sizeof(ImageJob)}) +
         aligned(splits * tiles * int64_t{sizeof(QueryTile)}) +
         aligned(2 * splits * tiles * limits.num_kv_heads * int64_t{sizeof(WorkItem)}) +
         aligned(2 * splits * limits.max_sequences * limits.num_kv_heads *
                 int64_t{sizeof(ImageChunk)}) +
         aligned(vectors) + (64 << 10);
}

// One for each side of each page and KV head whose images fit.
int64_t ready_flags(const PrefillLimits& limits) {
  return limits.image_bytes / image_bytes(limits.head_dim, limits.page_tokens, limits.images);
}

// The workspace's parts, in order; the same function sizes and places them.
struct Parts {
  int64_t images, tables, state, references, frequencies, factors, sink_logits, out_of_range,
      counters, ready, end;
};

Parts parts_of(const PrefillLimits& limits) {
  Parts parts;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += aligned(bytes);
    return begin;
  };
  parts.images = take(limits.image_bytes);
  parts.tables = take(max_table_bytes(limits));
  parts.state = take(limits.max_rows * limits.num_query_heads * 4);
  parts.references = take(int64_t{limits.max_sequences} * limits.num_kv_heads *
                          reference_floats(limits.head_dim) * 4);
  parts.frequencies = take(kMaxRotaryDim / 2 * 8);
  parts.factors = take(kMaxRotaryDim / 2 * 4);
  parts.sink_logits = take(int64_t{limits.num_query_heads} * 4);
  parts.out_of_range = take(4);
  parts.counters = take(kCounters * 4);
  parts.ready = take(ready_flags(limits) * 4);
  parts.end = at;
  return parts;
}

Error unsupported(const std::string& message) {
  return Error(ErrorCode::kUnsupported, "prefill attention: " + message);
}

SideKind side_kind(const formats::SideFormat& format, int64_t codes, int64_t scales, int64_t mean) {
  SideKind side;
  side.format = format.base;
  side.mean = format.mean;
  side.bias = format.bias;
  side.smooth = format.smooth;
  side.rotate = format.rotate;
  side.codes = static_cast<int32_t>(codes);
  side.scales = static_cast<int32_t>(scales);
  side.mean_at = static_cast<int32_t>(mean);
  return side;
}

}  // namespace

// Where things are in the device's copy of the tables.
struct PrefillAttention::Tables {
  const ImageJob* jobs = nullptr;
  const ImageJob* references = nullptr;
  const QueryTile* tiles = nullptr;
  const WorkItem* items = nullptr;
  const ImageChunk* chunks = nullptr;
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const float* k_smooth = nullptr;
};

Status PrefillAttention::supports(int head_dim, int query_heads_per_kv_head, ImageType images) {
  if (!has_prefill_kernel(head_dim)) {
    return unsupported("head_dim is 64, 80, 96, 128, 192 or 256; found " +
                       std::to_string(head_dim));
  }
  if (images == ImageType::kE4m3 && device_traits().level != DeviceLevel::kHopper) {
    return unsupported("--attn fp8 needs a GPU of the Hopper generation; use --attn 16bit");
  }
  if (query_heads_per_kv_head < 1 || query_heads_per_kv_head > 16) {
    return unsupported("1 to 16 query heads share a KV head; found " +
                       std::to_string(query_heads_per_kv_head));
  }
  return {};
}

int64_t PrefillAttention::workspace_bytes(const PrefillLimits& limits) {
  return parts_of(limits).end;
}

Result<std::unique_ptr<PrefillAttention>> PrefillAttention::create(const PrefillLimits& limits,
                                                                   std::byte* workspace,
                                                                   int64_t bytes) {
  KVANT_CHECK(bytes >= workspace_bytes(limits), "the workspace is as large as was said");
  KVANT_TRY(supports(limits.head_dim, limits.num_query_heads / limits.num_kv_heads, limits.images));
  std::unique_ptr<PrefillAttention> prefill(new PrefillAttention);
  prefill->limits_ = limits;
  const Parts parts = parts_of(limits);
  prefill->images_ = workspace + parts.images;
  prefill->tables_ = workspace + parts.tables;
  prefill->state_ = reinterpret_cast<float*>(workspace + parts.state);
  prefill->references_ = reinterpret_cast<float*>(workspace + parts.references);
  prefill->frequencies_ = reinterpret_cast<double*>(workspace + parts.frequencies);
  prefill->factors_ = reinterpret_cast<float*>(workspace + parts.factors);
  prefill->sink_logits_ = reinterpret_cast<float*>(workspace + parts.sink_logits);
  prefill->out_of_range_ = reinterpret_cast<uint32_t*>(workspace + parts.out_of_range);
  prefill->counters_ = reinterpret_cast<int32_t*>(workspace + parts.counters);
  prefill->ready_ = reinterpret_cast<int32_t*>(workspace + parts.ready);
  prefill->table_bytes_ = max_table_bytes(limits);
  prefill->num_processors_ = device_traits().num_sms;
  for (HostSlot& slot : prefill->slots_) {
    void* data = nullptr;
    KVANT_TRY(cuda_status(cudaMallocHost(&data, static_cast<size_t>(prefill->table_bytes_)),
                          "allocating pinned memory for tables of prefill attention"));
    slot.data = static_cast<std::byte*>(data);
    KVANT_TRY(cuda_status(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming),
                          "creating an event"));
  }
  KVANT_TRY(cuda_status(cudaMemset(prefill->out_of_range_, 0, 4), "clearing the workspace"));
  KVANT_TRY(
      cuda_status(cudaMemset(prefill->counters_, 0, kCounters * 4), "clearing the workspace"));
  KVANT_TRY(
      cuda_status(cudaMemset(prefill->ready_, 0, static_cast<size_t>(ready_flags(limits) * 4)),
                  "clearing the workspace"));
  return prefill;
}

PrefillAttention::~PrefillAttention() {
  for (HostSlot& slot : slots_) {
    if (slot.copied != nullptr) {
      cudaEventSynchronize(slot.copied);
      cudaEventDestroy(slot.copied);
    }
    if (slot.data != nullptr) cudaFreeHost(slot.data);
  }
}

Status PrefillAttention::check(const AttentionArgs& args) const {
  const cache::GroupView& view = *args.view;
  KVANT_CHECK(view.head_dim == limits_.head_dim && view.page_tokens == limits_.page_tokens &&
                  view.num_kv_heads == limits_.num_kv_heads &&
                  args.params.num_query_heads == limits_.num_query_heads,
              "a step has the geometry that the workspace was made for");
  KVANT_CHECK(view.kinds.size() <= kMaxPrefillKinds, "page kinds fit the kernel's table");
  for (const cache::PageKind& kind : view.kinds) {
    if (kind.base != nullptr && kind.layout != cache::Layout::kSm90) {
      return Error(ErrorCode::kInvalidArgument,
                   "prefill attention on CUDA reads pages in sm90 layout; convert them first");
    }
  }
  int64_t rows = 0;
  for (const cache::SequenceView& seq : view.sequences) {
    rows += seq.num_new_tokens;
    if (seq.first_position + seq.num_new_tokens > (int64_t{1} << 30)) {
      return unsupported("positions beyond 2^30");
    }
  }
  if (rows > limits_.max_rows ||
      static_cast<int64_t>(view.sequences.size()) > limits_.max_sequences) {
    return Error(ErrorCode::kResourceExhausted,
                 "prefill attention was made for " + std::to_string(limits_.max_rows) +
                     " new tokens of " + std::to_string(limits_.max_sequences) +
                     " sequences in a step; found " + std::to_string(rows) + " of " +
                     std::to_string(view.sequences.size()));
  }
  const auto& rope = args.params.rope;
  if (view.kinds[cache::kKindStored].k_format[args.group_layer].pre_rope &&
      (rope.rotary_dim > kMaxRotaryDim || rope.rotary_dim > view.head_dim)) {
    return unsupported("rotary_dim above " + std::to_string(kMaxRotaryDim) + " or head_dim");
  }
  return {};
}

namespace {

// Writes tables one after the other into host memory, to be copied to `device`.
class TableWriter {
 public:
  TableWriter(std::vector<std::byte>& host, std::byte* device) : host_(host), device_(device) {
    host_.clear();
  }

  template <typename T>
  void copy(const std::vector<T>& values, const T*& on_device) {
    const size_t begin = host_.size();
    const size_t bytes = values.size() * sizeof(T);
    host_.resize(begin + static_cast<size_t>(aligned(static_cast<int64_t>(bytes))));
    if (bytes > 0) std::memcpy(host_.data() + begin, values.data(), bytes);
    on_device = reinterpret_cast<const T*>(device_ + begin);
  }

 private:
  std::vector<std::byte>& host_;
  std::byte* device_;
};

// [head][head_dim] of one of a side's vectors; empty if no head has it.
std::vector<float> gather(std::span<const formats::SideParams> heads, int head_dim,
                          const float* formats::SideParams::*vector) {
  std::vector<float> values;
  if (heads.empty() || heads[0].*vector == nullptr) return values;
  for (const formats::SideParams& head : heads) {
    values.insert(values.end(), head.*vector, head.*vector + head_dim);
  }
  return values;
}

std::vector<float> global_scales(std::span<const formats::SideParams> heads, int num_heads) {
  std::vector<float> values;
  for (int h = 0; h < num_heads; ++h) {
    values.push_back(heads.empty() ? 1.0f : heads[static_cast<size_t>(h)].global_scale);
  }
  return values;
}

}  // namespace

Status PrefillAttention::upload(const AttentionArgs& args, cudaStream_t stream, Tables& tables) {
  const cache::GroupView& view = *args.view;
  TableWriter writer(written_, tables_);
  writer.copy(plan_.jobs, tables.jobs);
  writer.copy(plan_.references, tables.references);
  writer.copy(plan_.tiles, tables.tiles);
  writer.copy(plan_.items, tables.items);
  writer.copy(plan_.chunks, tables.chunks);
  const auto& layer = view.layers[static_cast<size_t>(args.group_layer)];
  const auto vector = [&](const std::vector<float>& values, const float*& on_device) {
    if (!values.empty()) writer.copy(values, on_device);
  };
  vector(global_scales(layer.k, view.num_kv_heads), tables.k_scale);
  vector(global_scales(layer.v, view.num_kv_heads), tables.v_scale);
  vector(gather(layer.k, view.head_dim, &formats::SideParams::bias), tables.k_bias);
  vector(gather(layer.v, view.head_dim, &formats::SideParams::bias), tables.v_bias);
  vector(gather(layer.k, view.head_dim, &formats::SideParams::smooth), tables.k_smooth);
  if (written_ == sent_) return {};  // as for most layers of a step
  KVANT_TRY(send(written_, stream));
  std::swap(written_, sent_);
  return {};
}

Status PrefillAttention::send(std::span<const std::byte> bytes, cudaStream_t stream) {
  if (static_cast<int64_t>(bytes.size()) > table_bytes_) {
    return Error(ErrorCode::kResourceExhausted,
                 "the tables of this prefill step take " + std::to_string(bytes.size()) +
                     " bytes, there is room for " + std::to_string(table_bytes_) +
                     "; its sequences have more pages than was planned for");
  }
  sent_.clear();  // unknown until the copy is enqueued
  HostSlot& slot = slots_[next_slot_];
  next_slot_ = (next_slot_ + 1) % kSlots;
  KVANT_TRY(cuda_status(cudaEventSynchronize(slot.copied), "waiting for tables to be copied"));
  std::memcpy(slot.data, bytes.data(), bytes.size());
  KVANT_TRY(
      cuda_status(cudaMemcpyAsync(tables_, slot.data, bytes.size(), cudaMemcpyHostToDevice, stream),
                  "copying tables of prefill attention"));
  return cuda_status(cudaEventRecord(slot.copied, stream), "recording an event");
}

void PrefillAttention::fill_dequantise(const AttentionArgs& args, const Tables& tables,
                                       DequantiseArgs& out) const {
  const cache::GroupView& view = *args.view;
  const auto layer = static_cast<size_t>(args.group_layer);
  out.num_kv_heads = view.num_kv_heads;
  out.head_dim = view.head_dim;
  out.page_tokens = view.page_tokens;
  for (size_t i = 0; i < view.kinds.size(); ++i) {
    const cache::PageKind& kind = view.kinds[i];
    if (kind.base == nullptr) continue;
    const formats::UnitSections& unit = kind.units[layer];
    out.kinds[i].k = side_kind(kind.k_format[layer], unit.k_codes, unit.k_scales, unit.k_mean);
    out.kinds[i].v = side_kind(kind.v_format[layer], unit.v_codes, unit.v_scales, 0);
    out.kinds[i].base = kind.base + kind.layer_offset[layer];
    out.kinds[i].page_bytes = kind.page_bytes;
    out.kinds[i].unit_bytes = unit.bytes;
  }
  out.k_scale = tables.k_scale;
  out.v_scale = tables.v_scale;
  out.k_bias = tables.k_bias;
  out.v_bias = tables.v_bias;
  out.k_smooth = tables.k_smooth;
  const auto& rope = args.params.rope;
  if (view.kinds[cache::kKindStored].k_format[layer].pre_rope) {
    out.rope_frequency = frequencies_;
    out.rope_half = rope.rotary_dim / 2;
    out.rope_magnitude = rope.attention_factor;
  }
  out.references = references_;
  out.type = limits_.images;
  out.images = images_;
  out.out_of_range = out_of_range_;
}

bool PrefillAttention::writes_in_background(const AttentionArgs& args) const {
  const cache::GroupView& view = *args.view;
  const auto layer = static_cast<size_t>(args.group_layer);
  const cache::PageKind& stored = view.kinds[cache::kKindStored];
  const bool plain = stored.base == nullptr;  // closed pages are BF16
  const formats::SideFormat k = plain ? formats::SideFormat{} : stored.k_format[layer];
  const formats::SideFormat v = plain ? formats::SideFormat{} : stored.v_format[layer];
  return device_traits().level == DeviceLevel::kHopper && limits_.images == ImageType::kF16 &&
         background_allowed_ && launch_images_ && launch_attention_ &&
         args.params.softcap <= 0.0f && view.kinds.size() <= 3 && !k.rotate && !v.rotate &&
         !view.kinds[cache::kKindStored].k_format[layer].pre_rope &&
         has_background_images(view.head_dim, k.base, v.base);
}

Status PrefillAttention::run_passes(const AttentionArgs& args, const Tables& tables, float* lse,
                                    cudaStream_t stream) {
  const cache::GroupView& view = *args.view;
  const auto& params = args.params;
  BackgroundImages images;
  DequantiseArgs& dequantise = images.dequantise;
  fill_dequantise(args, tables, dequantise);
  dequantise.jobs = tables.references;
  dequantise.num_jobs = static_cast<int>(plan_.references.size());
  if (launch_images_) KVANT_TRY(launch_references(dequantise, stream));

  PrefillKernelArgs kernel;
  kernel.images = images_;
  kernel.page_tokens = view.page_tokens;
  kernel.page_shift = std::countr_zero(static_cast<unsigned>(view.page_tokens));
  kernel.slice_shift = std::min(
      kernel.page_shift,
      std::countr_zero(static_cast<unsigned>(key_tile_tokens(view.head_dim, limits_.images))));
  kernel.q = static_cast<const float*>(args.q);
  kernel.out = static_cast<float*>(args.out);
  kernel.state = state_;
  kernel.lse = lse;
  kernel.num_query_heads = params.num_query_heads;
  kernel.num_kv_heads = view.num_kv_heads;
  kernel.group = params.num_query_heads / view.num_kv_heads;
  kernel.group_inverse = static_cast<uint32_t>((65536 + kernel.group - 1) / kernel.group);
  kernel.references = references_;
  kernel.cap = params.softcap * kLog2e;
  kernel.q_scale = params.softcap > 0.0f ? params.scale / params.softcap : params.scale * kLog2e;
  kernel.window = view.window;
  kernel.sink_tokens = view.window > 0 ? params.sink_tokens : 0;
  kernel.sink_logits = params.sink_logits == nullptr ? nullptr : sink_logits_;
  const bool background = writes_in_background(args);
  const int64_t unit = 2 * image_bytes(view.head_dim, view.page_tokens, limits_.images);
  kernel.counters = counters_;
  for (const PrefillPass& pass : plan_.passes) {
    const PrefillBatch& batch = plan_.batches[pass.batch];
    dequantise.jobs = tables.jobs + batch.first_job;
    dequantise.num_jobs = static_cast<int>(batch.num_jobs);
    dequantise.first_head = kernel.first_head = pass.first_head;
    dequantise.num_heads = pass.num_heads;
    dequantise.head_stride = kernel.head_stride = batch.images_per_head * unit;
    kernel.items = tables.items + pass.first_item;
    kernel.tiles = tables.tiles + batch.first_tile;
    kernel.num_items = static_cast<int>(pass.num_items);
    if (background) {
      images.chunks = tables.chunks + pass.first_chunk;
      images.num_chunks = static_cast<int>(pass.num_chunks);
      images.num_units = 2 * dequantise.num_jobs * pass.num_heads;
      images.ready = ready_;
      images.epoch = ++epoch_;
      images.images_per_head = batch.images_per_head;
    } else if (launch_images_) {
      KVANT_TRY(launch_dequantise(dequantise, num_processors_, stream));
    }
    if (!launch_attention_) continue;
    KVANT_TRY(launch_pass(kernel, background ? &images : nullptr, stream));
  }
  return {};
}

Status PrefillAttention::launch_pass(const PrefillKernelArgs& kernel,
                                     const BackgroundImages* images, cudaStream_t stream) const {
  const int head_dim = limits_.head_dim;
  if (limits_.images == ImageType::kE4m3)
    return launch_prefill_attention_e4m3(head_dim, kernel, num_processors_, stream);
  if (device_traits().level != DeviceLevel::kHopper)
    return launch_prefill_attention_generic(head_dim, kernel, num_processors_, stream);
  return launch_prefill_attention(head_dim, kernel, images, num_processors_, stream);
}

Status PrefillAttention::run(const AttentionArgs& args, cudaStream_t stream, float* lse) {
  KVANT_TRY(check(args));
  const cache::GroupView& view = *args.view;
  PrefillPlanArgs plan_args;
  plan_args.view = &view;
  plan_args.num_query_heads = args.params.num_query_heads;
  plan_args.sink_tokens = args.params.sink_tokens;
  plan_args.workspace_bytes = limits_.image_bytes;
  plan_args.images = limits_.images;
  plan_args.num_processors = num_processors_;
  KVANT_TRY(make_prefill_plan(plan_args, plan_));
  if (plan_.tiles.empty()) return {};
  Tables tables;
  KVANT_TRY(upload(args, stream, tables));
  const auto& rope = args.params.rope;
  if (view.kinds[cache::kKindStored].k_format[static_cast<size_t>(args.group_layer)].pre_rope) {
    if (rope.frequency_factors != nullptr) {
      KVANT_TRY(cuda_status(
          cudaMemcpyAsync(factors_, rope.frequency_factors,
                          static_cast<size_t>(rope.rotary_dim / 2) * 4, cudaMemcpyDefault, stream),
          "copying frequency factors"));
    }
    KVANT_TRY(launch_rope_frequencies(rope.rotary_dim, rope.base, rope.position_scale,
                                      rope.frequency_factors == nullptr ? nullptr : factors_,
                                      frequencies_, stream));
  }
  if (args.params.sink_logits != nullptr) {
    KVANT_TRY(cuda_status(cudaMemcpyAsync(sink_logits_, args.params.sink_logits,
                                          static_cast<size_t>(args.params.num_query_heads) * 4,
                                          cudaMemcpyDefault, stream),
                          "copying sink logits"));
  }
  return run_passes(args, tables, lse, stream);
}

Status PrefillAttention::check_range(cudaStream_t stream) {
  uint32_t out_of_range = 0;
  KVANT_TRY(
      cuda_status(cudaMemcpyAsync(&out_of_range, out_of_range_, 4, cudaMemcpyDeviceToHost, stream),
                  "reading the range flag"));
  KVANT_TRY(cuda_status(cudaMemsetAsync(out_of_range_, 0, 4, stream), "clearing the range flag"));
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "prefill attention"));
  if (out_of_range == 0) return {};
  if (limits_.images == ImageType::kE4m3) {
    return Error(ErrorCode::kNumericError,
                 "a key or value is beyond the range of prefill attention in FP8 (56 times the "
                 "largest of its sequence's reference page, keys less the reference key); use "
                 "--attn 16bit");
  }
  return Error(ErrorCode::kNumericError,
               "a key or value is beyond the FP16 range of prefill attention (65504 from the "
               "sequence's reference key, or 8000 times its reference page's largest value)");
}

Status launch_prefill_attention(int head_dim, const PrefillKernelArgs& args,
                                const BackgroundImages* images, int num_processors,
                                cudaStream_t stream) {
  if (images != nullptr) {
    return launch_prefill_attention_with_images(args, *images, num_processors, stream);
  }
  return for_head_dim(head_dim, [&](auto dim) {
    return launch_prefill_attention_of<decltype(dim)::value>(args, num_processors, stream);
  });
}

Status launch_prefill_attention_e4m3(int head_dim, const PrefillKernelArgs& args,
                                     int num_processors, cudaStream_t stream) {
  return for_head_dim(head_dim, [&](auto dim) {
    return launch_prefill_attention_e4m3_of<decltype(dim)::value>(args, num_processors, stream);
  });
}

}  // namespace kvant::backend::cuda
