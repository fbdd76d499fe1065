#include "kvant/backend/cuda/attention.h"

#include <algorithm>
#include <string>

#include "kvant/backend/cuda/decode/combine.h"
#include "kvant/backend/cuda/decode/residency.h"
#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/launch.h"
#include "kvant/base/check.h"
#include "kvant/formats/format.h"
#include "kvant/formats/transform.h"

namespace kvant::backend::cuda {
namespace {

using formats::FormatId;
using formats::SideFormat;

KeyKernel key_kernel(FormatId base) {
  switch (base) {
    case FormatId::kBf16: return KeyKernel::kBf16;
    case FormatId::kF16: return KeyKernel::kF16;
    case FormatId::kFp8:
    case FormatId::kFp8Head: return KeyKernel::kE4m3;
    case FormatId::kFp8Token: return KeyKernel::kE4m3Token;
    case FormatId::kFp8E5m2: return KeyKernel::kE5m2;
    case FormatId::kMxfp8: return KeyKernel::kMxfp8;
    case FormatId::kInt8: return KeyKernel::kInt8;
    case FormatId::kInt4: return KeyKernel::kInt4;
    case FormatId::kInt4Channel: return KeyKernel::kInt4Channel;
    case FormatId::kInt3Channel: return KeyKernel::kInt3Channel;
    case FormatId::kInt2Channel: return KeyKernel::kInt2Channel;
    case FormatId::kNvfp4: return KeyKernel::kNvfp4;
    case FormatId::kMxfp4: return KeyKernel::kMxfp4;
  }
  return KeyKernel::kAny;
}

// Per-channel formats are keys' only: spec.h refuses them for values.
ValueKernel value_kernel(FormatId base) {
  switch (base) {
    case FormatId::kBf16: return ValueKernel::kBf16;
    case FormatId::kF16: return ValueKernel::kF16;
    case FormatId::kFp8:
    case FormatId::kFp8Head: return ValueKernel::kE4m3;
    case FormatId::kFp8Token: return ValueKernel::kE4m3Token;
    case FormatId::kFp8E5m2: return ValueKernel::kE5m2;
    case FormatId::kMxfp8: return ValueKernel::kMxfp8;
    case FormatId::kInt8: return ValueKernel::kInt8;
    case FormatId::kInt4: return ValueKernel::kInt4;
    case FormatId::kNvfp4: return ValueKernel::kNvfp4;
    case FormatId::kMxfp4: return ValueKernel::kMxfp4;
    default: return ValueKernel::kAny;
  }
}

StoredSections sections_of(const formats::UnitSections& unit, const SideFormat& k) {
  StoredSections sections;
  sections.k_bytes = static_cast<int32_t>(unit.v_codes);
  sections.k_scales = static_cast<int32_t>(unit.k_scales);
  sections.k_mean = k.mean ? static_cast<int32_t>(unit.k_mean) : 0;
  sections.v_start = static_cast<int32_t>(unit.v_codes);
  sections.v_bytes = static_cast<int32_t>(unit.bytes - unit.v_codes);
  sections.v_scales = static_cast<int32_t>(unit.v_scales - unit.v_codes);
  return sections;
}

Error unsupported(const std::string& what) {
  return Error(ErrorCode::kUnsupported, "CUDA decode attention does not support " + what);
}

// What was done to keys as a layer's plan says, and what attention undoes on the queries, where
// keys are stored after RoPE, and on the outputs, instead of on pages.
bool transforms_keys(const SideFormat& k) {
  return k.smooth || k.rotate || k.bias;
}
bool transforms_queries(const SideFormat& k) {
  return !k.pre_rope && transforms_keys(k);
}
bool transforms_values(const SideFormat& v) {
  return v.rotate || v.bias;
}

const SideFormat& stored_keys(const AttentionArgs& args) {
  return args.view->kinds[cache::kKindStored].k_format[args.group_layer];
}
const SideFormat& stored_values(const AttentionArgs& args) {
  return args.view->kinds[cache::kKindStored].v_format[args.group_layer];
}

// Of a page's angles, which follow its keys where these are stored before RoPE.
int angle_bytes(const AttentionArgs& args) {
  return stored_keys(args).pre_rope ? args.params.rope.rotary_dim / 2 * int{sizeof(float2)} : 0;
}

// Stored pages of these formats are read by tiles, as open ones are: they have nothing beside them.
bool read_by_tile(const SideFormat& k, const SideFormat& v) {
  return k.base == v.base && is_16_bit(key_kernel(k.base));
}

// A slot takes a page or a tile of 16-bit values (ring.cuh), or half of it.
int slot_bytes_of(const AttentionArgs& args, bool takes_steps) {
  const int tile_bytes = 16 * args.view->head_dim * 2;
  int bytes = takes_steps ? 2 * tile_bytes : tile_bytes;
  if (!read_by_tile(stored_keys(args), stored_values(args))) {
    const StoredSections sections = sections_of(
        args.view->kinds[cache::kKindStored].units[args.group_layer], stored_keys(args));
    bytes = takes_steps ? std::max(bytes, sections.k_bytes + sections.v_bytes)
                        : std::max({bytes, sections.k_bytes, sections.v_bytes});
  }
  return bytes + (angle_bytes(args) + 127) / 128 * 128;
}

Residency residency_of(const DecodeVariant& variant, const AttentionArgs& args) {
  return residency_of(variant, slot_bytes_of(args, variant.slots_take_steps));
}

}  // namespace

Result<std::unique_ptr<CudaAttention>> CudaAttention::create() {
  const int num_sms = device_traits().num_sms;
  if (num_sms == 0) return Error(ErrorCode::kDeviceError, "CUDA: there is no device");
  return std::unique_ptr<CudaAttention>(new CudaAttention(num_sms));
}

CudaAttention::~CudaAttention() {
  cudaFree(owned_partials_);
}

Status CudaAttention::supports(const formats::CacheFormat& format, int head_dim, int group) const {
  const KeyKernel keys = key_kernel(format.k.base);
  if ((read_by_tile(format.k, format.v) && (format.k.mean || transforms_keys(format.k))) ||
      (is_16_bit(keys) && transforms_queries(format.k)))
    return unsupported(
        "+mean, +smooth, +rot or +bias of keys in 16 bits; use a format without them, or --device "
        "cpu");
  if (is_channel(keys) && format.k.bias && !format.k.pre_rope)
    return unsupported(
        "+bias of keys with a zero per channel; use a format without it, or "
        "--device cpu");
  if (group > 16)
    return unsupported(std::to_string(group) + " query heads per KV head (at most 16)");
  VariantQuery query;
  query.key = key_kernel(format.k.base);
  query.value = value_kernel(format.v.base);
  query.head_dim = head_dim;
  query.rows = group;
  query.pre_rope = format.k.pre_rope;
  if (find_variant(query) == nullptr)
    return unsupported("head_dim " + std::to_string(head_dim) +
                       " (it has 64, 80, 96, 128, 192 and 256)");
  return {};
}

Status CudaAttention::supports(const AttentionArgs& args) const {
  const cache::GroupView& view = *args.view;
  formats::CacheFormat format;
  format.k = stored_keys(args);
  format.v = stored_values(args);
  KVANT_TRY(supports(format, view.head_dim, args.params.num_query_heads / view.num_kv_heads));
  if (format.k.pre_rope) KVANT_TRY(check_key_rotation(args.params.rope, view.head_dim));
  const Result<const DecodeVariant*> variant = choose_variant(args);
  return variant ? Status() : variant.error();
}

// The kernel for a layer's format and the most query rows of a tile in the step.
Result<const DecodeVariant*> CudaAttention::choose_variant(const AttentionArgs& args) const {
  const cache::GroupView& view = *args.view;
  const SideFormat& k = stored_keys(args);
  const int group = args.params.num_query_heads / view.num_kv_heads;
  VariantQuery query;
  query.key = key_kernel(k.base);
  query.value = value_kernel(stored_values(args).base);
  query.head_dim = view.head_dim;
  query.page_tokens = view.page_tokens;
  query.rows = group;
  if (!deterministic_) {
    for (const cache::SequenceView& sequence : view.sequences)
      query.rows = std::max(query.rows, group * sequence.num_new_tokens);
    query.fast_pages = fast_pages_of(view);
  }
  query.rows = std::min(16, query.rows);
  query.pre_rope = k.pre_rope;
  query.any = k.pre_rope
                  ? k.mean || transforms_keys(k) || args.params.rope.rotary_dim != view.head_dim
                  : k.mean && is_channel(query.key);
  const DecodeVariant* variant = find_variant(query);
  if (variant != nullptr && residency_of(*variant, args).blocks == 0) {
    query.any = true;  // its slots are smaller
    variant = find_variant(query);
  }
  if (variant == nullptr)
    return unsupported("head_dim " + std::to_string(view.head_dim) + " with " +
                       std::to_string(group) + " query heads per KV head");
  if (residency_of(*variant, args).blocks == 0)
    return unsupported(
        "pages of " + std::to_string(view.kinds[cache::kKindStored].units[args.group_layer].bytes) +
        " bytes per KV head; use smaller pages");
  return variant;
}

// What sequences of the step share, if there is a kernel for it.
Status CudaAttention::prepare_shared(const AttentionArgs& args) {
  shared_ = {};
  num_sharing_ = 0;
  const cache::GroupView& view = *args.view;
  const SideFormat& k = view.kinds[cache::kKindStored].k_format[args.group_layer];
  const SideFormat& v = view.kinds[cache::kKindStored].v_format[args.group_layer];
  // A cache in BF16 stores its pages as it keeps open ones.
  const bool bf16 = k.base == FormatId::kBf16 && v.base == FormatId::kBf16;
  shared_kind_ = bf16 ? cache::kKindBf16 : cache::kKindStored;
  const cache::PageKind& stored = view.kinds[shared_kind_];
  shared_variant_ = find_shared_variant(key_kernel(k.base), value_kernel(v.base), view.head_dim);
  if (device_traits().level != DeviceLevel::kHopper || sharing_ == PageSharing::kNever ||
      deterministic_ || shared_variant_ == nullptr || k.mean || k.pre_rope || transforms_keys(k) ||
      transforms_values(v) || view.page_tokens != kSharedPageTokens || args.params.softcap != 0.0f)
    return {};
  SharedPlanShape shape;
  shape.group = args.params.num_query_heads / view.num_kv_heads;
  shape.num_multiprocessors = num_sms_;
  shape.stored_bytes = stored.units[args.group_layer].bytes;
  shape.bf16_bytes = view.kinds[cache::kKindBf16].units[args.group_layer].bytes;
  shape.kind = shared_kind_;
  shape.page_factor = shared_variant_->page_factor;
  shape.always = sharing_ == PageSharing::kWherePossible;
  shape.blocks = std::min(shared_blocks_, num_sms_ - 1);
  shared_ = make_shared_plan(view, shape);
  // The merge takes so many results of a unit, decode's among them.
  const auto most = std::max_element(shared_.num_parts.begin(), shared_.num_parts.end());
  if (!shared_.empty() && *most > kMaxCombined / 2) shared_ = {};
  if (shared_.empty()) return {};
  for (const ReadElsewhere& sequence : shared_.sequences)
    num_sharing_ += sequence.first_page > 0 ? 1 : 0;
  shared_params_ = {};
  shared_params_.sections = sections_of(stored.units[args.group_layer], k);
  shared_params_.group = shape.group;
  shared_params_.page_bytes = static_cast<int32_t>(shape.stored_bytes);
  const int left = device_traits().shared_per_sm - kReservedShared - shared_variant_->fixed_bytes;
  shared_params_.num_slots = std::min(kMaxSharedSlots, left / shared_params_.page_bytes);
  KVANT_CHECK(shared_params_.num_slots >= 3, "pages of these formats fit");
  shared_smem_bytes_ =
      shared_variant_->fixed_bytes + shared_params_.num_slots * shared_params_.page_bytes;
  return cuda_status(
      cudaFuncSetAttribute(shared_variant_->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared_smem_bytes_),
      "setting the shared memory of attention on shared pages");
}

// What depends on formats and geometry: the kernel, its ring, where sections lie.
Status CudaAttention::configure(const AttentionArgs& args, int layer) {
  const cache::GroupView& view = *args.view;
  const cache::PageKind& stored = view.kinds[cache::kKindStored];
  const SideFormat& k = stored.k_format[layer];
  const SideFormat& v = stored.v_format[layer];
  const int group = args.params.num_query_heads / view.num_kv_heads;
  KVANT_ASSIGN(const DecodeVariant* const variant, choose_variant(args));
  if (variant != variant_) {
    cudaFuncAttributes compiled = {};
    KVANT_TRY(cuda_status(cudaFuncGetAttributes(&compiled, variant->kernel),
                          "asking about a decode kernel"));
    num_threads_ = compiled.maxThreadsPerBlock;
    variant_ = variant;
  }

  k_format_ = k;
  v_format_ = v;
  params_ = {};
  params_.stored = sections_of(stored.units[layer], k);
  params_.key_kernel = key_kernel(k.base);
  params_.value_kernel = value_kernel(v.base);
  params_.stored_by_tile = read_by_tile(k, v);
  params_.stored_is_f16 = params_.key_kernel == KeyKernel::kF16;
  params_.page_tokens = view.page_tokens;
  params_.head_dim = view.head_dim;
  params_.num_query_heads = args.params.num_query_heads;
  params_.group = group;
  params_.max_rows = variant_->max_rows;
  params_.window = view.window;
  params_.sink_tokens = args.params.sink_tokens;
  params_.by_position = deterministic_;
  params_.beside_shared = !shared_.empty();

  if (k.pre_rope) {
    KVANT_TRY(check_key_rotation(args.params.rope, view.head_dim));
    params_.pre_rope.octets = args.params.rope.rotary_dim / 16;
    params_.pre_rope.row_bytes = angle_bytes(args);
    params_.pre_rope.rotated = k.rotate;
    params_.pre_rope.rotation_scale =
        formats::rotation_scale(formats::rotation_block(view.head_dim));
  }
  const Residency residency = residency_of(*variant_, args);
  params_.slot_bytes = residency.slot_bytes;
  blocks_of_sm_ = residency.blocks;
  params_.teams = residency.teams;
  params_.num_slots = residency.slots;
  params_.spare_slots = residency.spare_slots;
  smem_bytes_ = params_.teams * (params_.num_slots * params_.slot_bytes + variant_->team_bytes);
  return cuda_status(cudaFuncSetAttribute(variant_->kernel,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes_),
                     "setting the shared memory of a decode kernel");
}

// The work of the multiprocessors that the shared kernel leaves. Sequences go unshared where their
// results would not fit the workspace.
DecodePlan CudaAttention::make_plan(const cache::GroupView& view, PlanShape& shape) {
  for (;;) {
    const int most_blocks = (num_sms_ - static_cast<int>(shared_.starts.size())) * blocks_of_sm_;
    num_blocks_ = most_blocks;
    if (shared_.empty())
      num_blocks_ -= blocks_to_leave(view, *variant_, params_.group, most_blocks);
    shape.num_workers = num_blocks_ * params_.teams;
    shape.spare_blocks = spare_blocks_of(*variant_, num_blocks_);
    shape.elsewhere = shared_.sequences;
    DecodePlan plan = make_decode_plan(view, shape);
    // Each block cuts a unit at most twice: 2 partial results of blocks, and one sum per worker.
    num_partials_ = std::max(2 * num_blocks_, plan.num_partials);
    const int64_t rows = int64_t{num_partials_ + shape.num_workers} * shape.max_rows;
    const bool fits = rows * row_bytes(view.head_dim) <= partial_bytes_;
    if (fits || shared_.empty() || partials_ == nullptr || owned_partials_ != nullptr) {
      if (has_few_pages(plan, most_blocks * params_.teams)) params_.spare_slots = 0;
      return plan;
    }
    shared_ = {};
    num_sharing_ = 0;
    params_.beside_shared = false;
  }
}

Status CudaAttention::prepare(const AttentionArgs& args, cudaStream_t stream) {
  const cache::GroupView& view = *args.view;
  view_ = nullptr;
  KVANT_TRY(prepare_shared(args));
  KVANT_TRY(configure(args, args.group_layer));
  const cache::PageKind& stored = view.kinds[cache::kKindStored];
  const cache::PageKind& bf16 = view.kinds[cache::kKindBf16];
  PlanShape shape;
  shape.group = params_.group;
  shape.max_rows = variant_->max_rows;
  shape.block_workers = params_.teams;
  shape.sink_tokens = args.params.sink_tokens;
  shape.stored_bytes = stored.units[args.group_layer].bytes;
  shape.bf16_bytes = bf16.units[args.group_layer].bytes;
  shape.change_bytes = kChangeBytes;
  shape.merge_bytes = kMergeBytes;
  shape.by_position = deterministic_;
  shape.values_apart = transforms_values(v_format_);
  shape.most_partials =
      static_cast<int>(kPositionPartialBytes / (int64_t{shape.max_rows} * view.head_dim * 4));
  const DecodePlan plan = make_plan(view, shape);
  const int64_t num_rows = int64_t{num_partials_ + shape.num_workers} * shape.max_rows;
  num_rows_ = 0;
  for (const cache::SequenceView& sequence : view.sequences)
    num_rows_ = std::max<int64_t>(num_rows_, sequence.first_row + sequence.num_new_tokens);
  const int64_t num_queries =
      transforms_queries(k_format_) ? num_rows_ * args.params.num_query_heads : 0;
  KVANT_TRY(reserve_partials((num_rows + num_queries) * row_bytes(view.head_dim), stream));

  factors_.clear();
  for (const cache::LayerParams& layer : view.layers) {
    for (int head = 0; head < view.num_kv_heads; ++head)
      factors_.push_back({layer.k[head].global_scale,
                          layer.v[head].global_scale * value_unit(params_.value_kernel)});
  }
  upload_.clear();
  const int64_t segments = upload_.add(plan.segments);
  const int64_t workers = upload_.add(plan.workers);
  const int64_t split_units = upload_.add(plan.split_units);
  const int64_t entries = upload_.add(plan.entries);
  factors_offset_ = upload_.add(factors_);
  using formats::SideParams;
  smooth_offset_ = k_format_.smooth ? add_terms(view, true, &SideParams::smooth, smooth_) : -1;
  key_bias_offset_ = k_format_.bias ? add_terms(view, true, &SideParams::bias, key_bias_) : -1;
  value_bias_offset_ = v_format_.bias ? add_terms(view, false, &SideParams::bias, value_bias_) : -1;
  int64_t starts = 0, items = 0, queries = 0, partial_rows = 0, shared_entries = 0;
  if (!shared_.empty()) {
    place_shared_rows(view, shape, plan, args.params.num_query_heads, shared_);
    starts = upload_.add(shared_.starts);
    items = upload_.add(shared_.items);
    queries = upload_.add(shared_.queries);
    partial_rows = upload_.add(shared_.partial_rows);
    shared_entries = upload_.add(shared_.entries);
  }
  KVANT_TRY(upload_.send(stream));
  shared_params_.starts = upload_.device<SharedStart>(starts);
  shared_params_.items = upload_.device<SharedItem>(items);
  shared_params_.queries = upload_.device<int32_t>(queries);
  shared_params_.partial_rows = upload_.device<int32_t>(partial_rows);
  shared_params_.entries = upload_.device<uint32_t>(shared_entries);
  shared_params_.max_rows = shape.max_rows;
  params_.segments = upload_.device<Segment>(segments);
  params_.workers = upload_.device<WorkerStart>(workers);
  params_.split_units = upload_.device<SplitUnit>(split_units);
  params_.entries = upload_.device<uint32_t>(entries);
  params_.partial_sums = reinterpret_cast<float*>(partials_);
  params_.partial_states =
      reinterpret_cast<float2*>(params_.partial_sums + num_rows * view.head_dim);
  params_.worker_sums =
      params_.partial_sums + int64_t{num_partials_} * shape.max_rows * view.head_dim;
  stored_q_ = reinterpret_cast<float*>(params_.partial_states + num_rows);
  q_bias_ = stored_q_ + num_queries * view.head_dim;
  launches_ = plan.launches;
  for (const PlannedLaunch& part : launches_) {
    if (part.most_partials > kMaxCombined)
      return unsupported("devices of more than " + std::to_string(kMaxCombined) + " blocks");
  }
  KVANT_TRY(prepare_rotations(args, stream));
  view_ = args.view;
  return {};
}

// What keys before RoPE are rotated by, for all pages of the step.
Status CudaAttention::prepare_rotations(const AttentionArgs& args, cudaStream_t stream) {
  if (!k_format_.pre_rope) return {};
  const cache::GroupView& view = *args.view;
  int64_t most_tokens = 0;
  for (const cache::SequenceView& sequence : view.sequences)
    most_tokens = std::max(most_tokens, sequence.first_position + sequence.num_new_tokens);
  const int64_t num_pages = (most_tokens + view.page_tokens - 1) / view.page_tokens;
  KVANT_ASSIGN(const KeyRotations::Tables tables,
               rotations_.get(args.params.rope, view.page_tokens, num_pages, stream));
  params_.pre_rope.pages = tables.pages;
  params_.pre_rope.tokens = tables.tokens;
  rope_ = args.params.rope;
  return {};
}

// A vector of each KV head of all layers, for the step's upload; layers without have no effect.
int64_t CudaAttention::add_terms(const cache::GroupView& view, bool keys,
                                 const float* formats::SideParams::*term,
                                 std::vector<float>& values) {
  values.clear();
  const float none = term == &formats::SideParams::smooth ? 1.0f : 0.0f;
  for (const cache::LayerParams& layer : view.layers) {
    for (const formats::SideParams& head : (keys ? layer.k : layer.v).first(view.num_kv_heads)) {
      const float* vector = head.*term;
      if (vector != nullptr) {
        values.insert(values.end(), vector, vector + view.head_dim);
      } else {
        values.insert(values.end(), static_cast<size_t>(view.head_dim), none);
      }
    }
  }
  return upload_.add(values);
}

// Those of the layer, on the device.
const float* CudaAttention::terms_of(int64_t offset, const AttentionArgs& args) const {
  if (offset < 0) return nullptr;
  const cache::GroupView& view = *args.view;
  return upload_.device<float>(offset) +
         static_cast<int64_t>(args.group_layer) * view.num_kv_heads * view.head_dim;
}

Status CudaAttention::launch_transform(const AttentionArgs& args, const DecodeParams& params,
                                       cudaStream_t stream) const {
  QueryTransform transform;
  transform.q = params.q;
  transform.stored_q = stored_q_;
  transform.q_bias = k_format_.bias ? q_bias_ : nullptr;
  transform.smooth = terms_of(smooth_offset_, args);
  transform.bias = terms_of(key_bias_offset_, args);
  if (k_format_.rotate) transform.rotation_block = formats::rotation_block(params.head_dim);
  transform.rotation_scale = formats::rotation_scale(formats::rotation_block(params.head_dim));
  transform.num_rows = num_rows_;
  transform.num_query_heads = params.num_query_heads;
  transform.group = params.group;
  transform.head_dim = params.head_dim;
  return transform_queries(transform, stream);
}

DecodeParams CudaAttention::params_of(const AttentionArgs& args) const {
  DecodeParams params = params_;
  const cache::GroupView& view = *args.view;
  for (int kind = 0; kind < kMaxPageKinds && kind < static_cast<int>(view.kinds.size()); ++kind) {
    const cache::PageKind& pages = view.kinds[kind];
    if (pages.base == nullptr) continue;
    params.slabs[kind] = {pages.base + pages.layer_offset[args.group_layer], pages.page_bytes,
                          pages.units[args.group_layer].bytes};
  }
  params.q = params.stored_q = static_cast<const float*>(args.q);
  if (k_format_.pre_rope) {
    params.pre_rope.smooth = terms_of(smooth_offset_, args);
    params.pre_rope.bias = terms_of(key_bias_offset_, args);
  } else {
    if (transforms_keys(k_format_)) params.stored_q = stored_q_;
    if (k_format_.bias) params.q_bias = q_bias_;
  }
  params.out = static_cast<float*>(args.out);
  params.lse = lse_;
  params.sink_logits = args.params.sink_logits;
  params.factors = upload_.device<HeadFactors>(factors_offset_) +
                   static_cast<int64_t>(args.group_layer) * view.num_kv_heads;
  params.scale_log2 = args.params.scale * 1.4426950408889634f;
  params.softcap = args.params.softcap;
  return params;
}

Status CudaAttention::launch_shared(const AttentionArgs& args, const DecodeParams& decode,
                                    cudaStream_t stream) {
  SharedParams params = shared_params_;
  params.q = static_cast<const float*>(args.q);
  params.partial_sums = decode.partial_sums;
  params.partial_states = decode.partial_states;
  params.factors = decode.factors;
  params.stored = decode.slabs[shared_kind_];
  params.scale_log2 = decode.scale_log2;
  void* arguments[] = {&params};
  return launch_overlapped(
      "attention on shared pages", shared_variant_->kernel,
      {dim3(static_cast<unsigned>(shared_.starts.size())), shared_variant_->threads,
       static_cast<size_t>(shared_smem_bytes_), stream},
      arguments);
}

Status CudaAttention::launch(const AttentionArgs& args, cudaStream_t stream) {
  if (args.view != view_)
    return Error(ErrorCode::kInternal, "attention was not prepared for this step");
  const DecodeParams params = params_of(args);
  if (transforms_queries(k_format_)) KVANT_TRY(launch_transform(args, params, stream));
  if (!shared_.empty()) KVANT_TRY(launch_shared(args, params, stream));
  for (const PlannedLaunch& part : launches_) KVANT_TRY(launch_part(part, args, params, stream));
  return {};
}

Status CudaAttention::launch_part(const PlannedLaunch& part, const AttentionArgs& args,
                                  const DecodeParams& of_step, cudaStream_t stream) {
  DecodeParams params = of_step;
  params.workers += part.first_worker;
  params.split_units += part.first_split_unit;
  void* arguments[] = {&params};
  const LaunchShape shape = {dim3(static_cast<unsigned>(num_blocks_)), num_threads_,
                             static_cast<size_t>(smem_bytes_), stream};
  const Status launched = launch_overlapped("decode attention", variant_->kernel, shape, arguments);
  if (!launched) {
    return Error(launched.error().code(), launched.error().message() + ", keys " +
                                              kernel_name(params.key_kernel) + ", values " +
                                              kernel_name(params.value_kernel));
  }
  if (part.num_split_units == 0) return {};
  if (transforms_values(v_format_)) {
    const int block = formats::rotation_block(params.head_dim);
    ValueTransform transform;
    transform.bias = terms_of(value_bias_offset_, args);
    if (v_format_.rotate) transform.rotation_block = block;
    transform.rotation_scale = formats::rotation_scale(block);
    void* both[] = {&params, &transform};
    const CombineLaunch combine = combine_values_launch(part.num_split_units, part.most_rows);
    return launch_overlapped("the merge of transformed values", combine.kernel,
                             {combine.grid, kCombineThreads, 0, stream}, both);
  }
  const CombineLaunch combine =
      combine_launch(part.num_split_units, part.most_rows,
                     deterministic_ ? kMaxCombined : part.most_partials, params.head_dim);
  return launch_overlapped("the merge of partial results", combine.kernel,
                           {combine.grid, kCombineThreads, 0, stream}, arguments);
}

Status CudaAttention::run(const AttentionArgs& args, cudaStream_t stream) {
  const cache::PageKind& stored = args.view->kinds[cache::kKindStored];
  const bool same_format = args.view == view_ && stored.k_format[args.group_layer] == k_format_ &&
                           stored.v_format[args.group_layer] == v_format_ &&
                           (!k_format_.pre_rope || same_rope(args.params.rope, rope_));
  if (args.group_layer == 0 || !same_format) KVANT_TRY(prepare(args, stream));
  return launch(args, stream);
}

}  // namespace kvant::backend::cuda
