#include "kvant/backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "kvant/backend/cuda/dense/choose.h"
#include "kvant/backend/cuda/dense/matrix.h"
#include "kvant/backend/cuda/dense/operators.h"
#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/backend/host.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

constexpr int64_t kRingBytes = int64_t{64} << 20;
constexpr int64_t kStagingBytes = int64_t{16} << 20;
// Steps whose dense operators are enqueued as graphs: shorter ones are few kernels that overlap,
// longer ones keep the device busy for longer than the host needs to enqueue them.
constexpr int64_t kLeastKeptRows = 5;
constexpr int64_t kMostKeptRows = 256;

int64_t round_up(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Nothing to attend to without heads: max_rows is 0 then. `image_bytes_asked`: 0 for the default.
PrefillLimits prefill_limits(const WorkspaceNeeds& needs, int64_t image_bytes_asked,
                             ImageType images) {
  PrefillLimits limits;
  limits.images = images;
  if (needs.num_kv_heads == 0) return limits;
  limits.max_rows = needs.max_rows;
  limits.max_sequences = needs.max_sequences;
  limits.num_query_heads = needs.num_query_heads;
  limits.num_kv_heads = needs.num_kv_heads;
  limits.head_dim = needs.head_dim;
  limits.page_tokens = needs.page_tokens;
  const int64_t pages = ceil_div(needs.max_context, needs.page_tokens) * needs.max_sequences;
  const int64_t new_pages = ceil_div(needs.max_rows, needs.page_tokens) + 2 * needs.max_sequences;
  limits.max_pages = pages + 2 * new_pages;
  if (image_bytes_asked > 0) limits.image_bytes = image_bytes_asked;
  // Short contexts need less.
  limits.image_bytes =
      std::min(limits.image_bytes, limits.max_pages * limits.num_kv_heads * 2 *
                                       image_bytes(needs.head_dim, needs.page_tokens, images));
  return limits;
}

// The new tokens of a step, of one sequence and KV head, and a few pages beside them.
int64_t least_image_bytes(const WorkspaceNeeds& needs, ImageType images) {
  if (needs.num_kv_heads == 0) return 0;
  return (ceil_div(needs.max_rows, needs.page_tokens) + 4) * 2 *
         image_bytes(needs.head_dim, needs.page_tokens, images);
}

bool rotates_nothing(const RopeArgs& args) {
  return args.num_rows == 0 || args.num_query_heads + args.num_kv_heads == 0;
}

const float* floats(const void* p) {
  return static_cast<const float*>(p);
}
float* floats(void* p) {
  return static_cast<float*>(p);
}

}  // namespace

Result<std::unique_ptr<Backend>> CudaBackend::create(const BackendOptions& options) {
  std::unique_ptr<CudaBackend> backend(new CudaBackend());
  KVANT_TRY(backend->start(options));
  return std::unique_ptr<Backend>(std::move(backend));
}

Status CudaBackend::start(const BackendOptions& options) {
  KVANT_ASSIGN(const cudaDeviceProp properties, find_device());
  num_sms_ = properties.multiProcessorCount;
  KVANT_TRY(
      cuda_status(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"));
  prefill_workspace_ = options.prefill_workspace;
  if (options.prompt_attention == PromptAttention::kFp8) images_ = ImageType::kE4m3;
  deterministic_ = options.deterministic;
  repetition_ = options.repetition;
  memory_ = std::make_unique<DeviceMemory>(stream_, options.memory_limit);
  own_memory_ = std::make_unique<DeviceMemory>(stream_, 0);
  KVANT_TRY(ring_.create(kRingBytes));
  KVANT_ASSIGN(staging_, Buffer::create(*own_memory_, kStagingBytes, MemoryUse::kOther));
  KVANT_TRY(linear_.create(num_sms_, options.deterministic));
  KVANT_ASSIGN(append_, CacheAppend::create());
  KVANT_ASSIGN(decode_, CudaAttention::create());
  decode_->set_sharing(options.page_sharing);
  decode_->set_deterministic(options.deterministic);
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  KVANT_TRY(cuda_status(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for free memory"));
  free_at_start_ = static_cast<int64_t>(free_bytes);
  info_.name = "cuda";
  info_.description = std::string(properties.name) + ", " + std::to_string(num_sms_) +
                      " multiprocessors" +
                      (device_traits().level == DeviceLevel::kHopper ? "" : ", generic kernels");
  info_.activation_type = ActivationType::kF32;
  info_.page_layout = cache::Layout::kSm90;
  info_.host_memory = false;
  info_.has_queries = options.row_queries;
  // A token at a time, longer steps gain nothing in attention and take larger tables.
  info_.step_tokens = deterministic_ ? 256 : 2048;
  info_.memory_total = static_cast<int64_t>(total_bytes);
  update_free_memory();
  return {};
}

CudaBackend::~CudaBackend() {
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  static_cast<void>(graphs_.clear(stream_));
  prefill_ = nullptr;
  decode_ = nullptr;
  append_ = nullptr;
  workspace_ = Buffer();
  staging_ = Buffer();
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

// What weights have left.
void CudaBackend::update_free_memory() {
  info_.memory_free = std::max<int64_t>(1, free_at_start_ - memory_->stats().total_now);
}

Status CudaBackend::supports(const formats::CacheFormat& format, int head_dim,
                             int query_heads_per_kv_head) const {
  if (!deterministic_) {
    return PrefillAttention::supports(head_dim, query_heads_per_kv_head, images_);
  }
  const Status status = decode_->supports(format, head_dim, query_heads_per_kv_head);
  if (status) return {};
  return Error(status.error().code(), "--deterministic: " + status.error().message());
}

// ---- memory ----

CudaBackend::WorkspaceParts CudaBackend::parts_of(const WorkspaceNeeds& needs) const {
  const bool prefills = needs.num_kv_heads > 0 && !deterministic_;
  return {round_up(CudaLinear::workspace_bytes(needs.max_rows, needs.max_cols)),
          RopeTables::workspace_bytes(needs.max_rows, needs.head_dim),
          round_up(CudaMoe::workspace_bytes(needs)),
          round_up(needs.max_rows * int64_t{sizeof(int64_t)}),
          decode_->workspace_bytes(needs),
          prefills ? PrefillAttention::workspace_bytes(
                         prefill_limits(needs, prefill_workspace_, images_))
                   : 0,
          most_graphs(needs) * KeptGraphs::kBytesOfGraph};
}

int64_t CudaBackend::most_graphs(const WorkspaceNeeds& needs) const {
  if (repetition_ == Repetition::kNever) return 0;
  const bool always = repetition_ == Repetition::kWherePossible;
  return KeptGraphs::most_graphs(needs, always ? 1 : kLeastKeptRows,
                                 always ? needs.max_rows : kMostKeptRows);
}

int64_t CudaBackend::workspace_bytes(const WorkspaceNeeds& needs) const {
  return parts_of(needs).total();
}

Status CudaBackend::reserve_workspace(const WorkspaceNeeds& needs) {
  const int64_t least = least_image_bytes(needs, images_);
  if (prefill_workspace_ > 0 && !deterministic_ && prefill_workspace_ < least) {
    return Error(ErrorCode::kInvalidArgument,
                 "prefill workspace: expected at least " + std::to_string(least) +
                     " bytes for steps of " + std::to_string(needs.max_rows) + " tokens, found " +
                     std::to_string(prefill_workspace_) + "; raise --prefill-workspace");
  }
  const WorkspaceParts parts = parts_of(needs);
  KVANT_TRY(graphs_.clear(stream_));
  prefill_ = nullptr;
  decode_->set_workspace(nullptr, needs);
  workspace_ = Buffer();  // given back first, so that the peak is the larger of the two
  memory_->uncount(std::exchange(graph_bytes_, 0), MemoryUse::kWorkspace);
  graphs_.set_most(0);
  max_rows_ = 0;
  if (parts.total() == 0) return {};
  KVANT_ASSIGN(workspace_, Buffer::create(*memory_, parts.allocated(), MemoryUse::kWorkspace));
  KVANT_TRY(memory_->count(parts.graphs, MemoryUse::kWorkspace));
  graph_bytes_ = parts.graphs;
  graphs_.set_most(most_graphs(needs));
  std::byte* at = workspace_.data();
  linear_.set_workspace(at, needs.max_rows, needs.max_cols);
  rope_tables_.set_workspace(at += parts.linear, needs.max_rows, needs.head_dim);
  moe_.set_workspace(at += parts.rope, needs);
  row_indices_ = reinterpret_cast<int64_t*>(at += parts.moe);
  if (parts.decode > 0) decode_->set_workspace(at += parts.rows, needs);
  if (parts.prefill > 0) {
    KVANT_ASSIGN(prefill_,
                 PrefillAttention::create(prefill_limits(needs, prefill_workspace_, images_),
                                          at + parts.decode, parts.prefill));
  }
  max_rows_ = needs.max_rows;
  return {};
}

int64_t CudaBackend::matrix_bytes(const MatrixSource& source) const {
  return CudaMatrix::bytes_for(source);
}

Result<std::unique_ptr<Matrix>> CudaBackend::load_matrix(const MatrixSource& source) {
  KVANT_ASSIGN(std::unique_ptr<CudaMatrix> matrix,
               CudaMatrix::load(source, *memory_, ring_, staging_, stream_));
  update_free_memory();
  return std::unique_ptr<Matrix>(std::move(matrix));
}

// ---- dense operators ----

// Rows go to the device as they are in the file and are dequantised there.
Status CudaBackend::embed(const MatrixSource& table, std::span<const int32_t> ids, float scale,
                          void* out) {
  KVANT_TRY(check_embed(table, ids));
  const int64_t row_bytes = formats::weight_bytes(table.type, table.cols);
  const auto num_rows = static_cast<int64_t>(ids.size());
  const int64_t step = kStagingBytes / row_bytes;
  if (step == 0) {
    return Error(ErrorCode::kUnsupported, "embeddings of " + std::to_string(row_bytes) +
                                              " bytes; the CUDA backend takes at most " +
                                              std::to_string(kStagingBytes));
  }
  for (int64_t first = 0; first < num_rows; first += step) {
    const int64_t count = std::min(step, num_rows - first);
    KVANT_ASSIGN(void* const rows, ring_.take(count * row_bytes, stream_));
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = ids[static_cast<size_t>(first + i)];
      const int64_t row = table.row_order.empty() ? id : table.row_order[static_cast<size_t>(id)];
      std::memcpy(static_cast<std::byte*>(rows) + i * row_bytes,
                  table.bytes.data() + row * row_bytes, static_cast<size_t>(row_bytes));
    }
    KVANT_TRY(
        cuda_status(cudaMemcpyAsync(staging_.data(), rows, static_cast<size_t>(count * row_bytes),
                                    cudaMemcpyHostToDevice, stream_),
                    "copying embeddings to the device"));
    KVANT_TRY(dequantize_rows(table.type, staging_.as<uint8_t>(), count, table.cols, scale,
                              floats(out) + first * table.cols, stream_));
  }
  return {};
}

Status CudaBackend::rms_norm(const RmsNormArgs& args) {
  return cuda::rms_norm(args, stream_);
}

Status CudaBackend::linear(const void* x, int64_t num_rows, std::span<const LinearTarget> targets) {
  return linear_.run(floats(x), num_rows, targets, stream_);
}

Status CudaBackend::norm_linear(const RmsNormArgs& norm, std::span<const LinearTarget> targets) {
  if (!linear_.rounds(norm.num_rows, targets)) {
    return linear_.can_norm(targets) ? linear_.run_normed(norm, targets, stream_)
                                     : Backend::norm_linear(norm, targets);
  }
  return norm.num_rows <= max_rows_ ? linear_.run_rounded(norm, targets, stream_)
                                    : Backend::norm_linear(norm, targets);
}

Status CudaBackend::norm_gated(const GatedArgs& args) {
  if (!linear_.can_gate(args)) return Backend::norm_gated(args);
  return linear_.run_gated(args, stream_);
}

Result<const float*> CudaBackend::rope_table_for(const RopeArgs& args) {
  const std::span positions(args.positions, static_cast<size_t>(args.num_rows));
  return rope_tables_.get(args.rope, positions, ring_, stream_);
}

Status CudaBackend::rope(const RopeArgs& args) {
  if (rotates_nothing(args)) return {};
  KVANT_ASSIGN(const float* const table, rope_table_for(args));
  return cuda::rope(args, table, stream_);
}

Status CudaBackend::gate(GateKind kind, const void* gate, const void* up, void* out,
                         int64_t num_values) {
  return cuda::gate(kind, floats(gate), floats(up), floats(out), num_values, stream_);
}

Status CudaBackend::add(const void* x, void* y, int64_t num_values) {
  return cuda::add(floats(x), floats(y), num_values, stream_);
}

Status CudaBackend::moe(const MoeArgs& args) {
  return moe_.run(args, linear_, ring_, stream_);
}

Status CudaBackend::gather_rows(const void* x, std::span<const int64_t> rows, int dim, void* out) {
  const auto num_rows = static_cast<int64_t>(rows.size());
  KVANT_CHECK(num_rows <= max_rows_, "reserve_workspace covers the rows");
  KVANT_TRY(ring_.upload(row_indices_, rows.data(), num_rows * int64_t{sizeof(int64_t)}, stream_));
  return cuda::gather_rows(floats(x), row_indices_, num_rows, dim, floats(out), stream_);
}

Status CudaBackend::greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                                     RowMaximum* maxima) {
  return cuda::greatest_in_rows(floats(x), num_rows, num_cols, maxima, stream_);
}

Status CudaBackend::answer_queries(const void* x, int64_t num_rows, int64_t num_cols,
                                   const RowQuery* queries, const RowAnswers& answers) {
  return cuda::answer_queries(floats(x), num_rows, num_cols, queries, answers, stream_);
}

Status CudaBackend::repeat(const RepeatKey& key, const std::function<Status()>& enqueue) {
  const bool kept = repetition_ == Repetition::kWherePossible ||
                    (repetition_ == Repetition::kWherePays && key.num_rows >= kLeastKeptRows &&
                     key.num_rows <= kMostKeptRows);
  return kept ? graphs_.run(key, stream_, enqueue) : enqueue();
}

// ---- cache operators ----

Status CudaBackend::append(const AppendArgs& args) {
  return append_->run(args, stream_);
}

Status CudaBackend::rope_append(const RopeArgs& rope_args, const AppendArgs& args) {
  if (rotates_nothing(rope_args)) return append(args);
  KVANT_ASSIGN(const float* const table, rope_table_for(rope_args));
  const AppendRotation rotation = {.q = floats(rope_args.q),
                                   .k = floats(rope_args.k),
                                   .table = table,
                                   .num_rows = static_cast<int>(rope_args.num_rows),
                                   .num_query_heads = rope_args.num_query_heads,
                                   .rotate_keys = rope_args.num_kv_heads > 0,
                                   .rotary_dim = rope_args.rope.rotary_dim};
  KVANT_ASSIGN(const bool done, append_->run_rotated(args, rotation, stream_));
  return done ? Status() : Backend::rope_append(rope_args, args);
}

Result<formats::EncodeStats> CudaBackend::take_encode_stats() {
  KVANT_ASSIGN(const formats::EncodeStats stats, append_->take_stats(stream_));
  // Asked for in any case, so that the next step starts afresh.
  Status in_range;
  if (std::exchange(prefilled_, false)) in_range = prefill_->check_range(stream_);
  if (stats.non_finite == 0) KVANT_TRY(std::move(in_range));
  return stats;
}

// Steps of few new tokens read pages as they are; what those kernels lack, and longer steps, goes
// through images. Both round in other places and divide their work by the step, so that
// --deterministic has all steps read pages as they are.
Status CudaBackend::attention(const AttentionArgs& args) {
  const cache::GroupView& view = *args.view;
  int most_tokens = 0;
  for (const cache::SequenceView& sequence : view.sequences) {
    most_tokens = std::max(most_tokens, sequence.num_new_tokens);
  }
  if (deterministic_ || (most_tokens <= kMostDecodeTokens && decode_->supports(args))) {
    return decode_->run(args, stream_);
  }
  KVANT_CHECK(prefill_ != nullptr, "reserve_workspace covers attention");
  prefilled_ = true;
  return prefill_->run(args, stream_);
}

// ---- host exchange ----

Status CudaBackend::download_f32(const void* activations, int64_t num_values, float* host) {
  KVANT_TRY(cuda_status(cudaMemcpyAsync(host, activations, sizeof(float) * num_values,
                                        cudaMemcpyDeviceToHost, stream_),
                        "copying from the device"));
  return synchronize();
}

Status CudaBackend::upload_f32(const float* host, int64_t num_values, void* activations) {
  return ring_.upload(activations, host, num_values * int64_t{sizeof(float)}, stream_);
}

Status CudaBackend::synchronize() {
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream_), "waiting for the device"));
  ring_.reset();
  return memory_->take_error();
}

}  // namespace kvant::backend::cuda
