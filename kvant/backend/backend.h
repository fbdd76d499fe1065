// What a model needs from the machine it runs on: memory, weights, dense operators, cache
// operators.
//
// model/ sees only this header; backend/{reference,cpu,cuda} implement it. Operators are enqueued
// in order on the backend's one stream and are complete after synchronize(); on CPUs they are
// complete on return. Pointers in argument structs are memory of memory() unless said otherwise.
// One thread at a time (thread-compatible). Activations are rows of activation_type() values,
// row-major.
//
// Promise of every operator (ADR 0003): the bits of a row do not depend on which other rows are in
// the call, on their number, or on the number of threads. CUDA devices keep it with
// BackendOptions::deterministic; without it rows are equal within rounding there, and the same step
// twice gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <tuple>

#include "kvant/attention/problem.h"
#include "kvant/base/memory.h"
#include "kvant/base/result.h"
#include "kvant/cache/view.h"
#include "kvant/formats/weight_types.h"

namespace kvant::backend {

enum class ActivationType { kF32, kBf16 };

struct BackendInfo {
  std::string name;         // "cpu", "reference", "cuda"
  std::string description;  // e.g. "AVX-512, 2 threads"
  ActivationType activation_type = ActivationType::kF32;
  cache::Layout page_layout = cache::Layout::kCpu;
  bool host_memory = true;   // memory() is the host's, and host memory is memory()'s
  bool has_queries = false;  // answer_queries() is faster than reading the rows
  int step_tokens = 512;     // new tokens of a step from which on larger steps gain little
  int64_t memory_total = 0;  // bytes of the machine or device; 0 unknown
  int64_t memory_free = 0;
};

// A matrix of a model file: `rows` outputs x `cols` inputs, row-major blocks of `type`. The bytes
// stay valid while the model is loaded (a mapped file).
struct MatrixSource {
  std::string_view name;
  formats::WeightType type = formats::WeightType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  std::span<const std::byte> bytes = {};
  // Row r of the loaded matrix is row row_order[r] of the file; empty: the same order. Copied from.
  // (GGUF files of the llama architecture store Q and K rows in the order of adjacent RoPE pairs.)
  std::span<const int32_t> row_order = {};
};

// A loaded matrix in the backend's own layout.
class Matrix {
 public:
  virtual ~Matrix() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t cols() const = 0;
  virtual int64_t memory_bytes()
      const = 0;  // of MemoryUse::kWeights; 0 if it reads the file in place
};

// y = x W^T (+ bias); several of them may share x, so that x is prepared once.
struct LinearTarget {
  const Matrix* matrix = nullptr;
  const float* bias = nullptr;  // [rows of the matrix] or null
  void* out = nullptr;          // [num_rows][rows of the matrix]
  bool accumulate = false;      // out += instead of out =
};

struct RmsNormArgs {
  const void* x = nullptr;        // [num_rows][dim]
  const float* weight = nullptr;  // [dim]
  void* out = nullptr;            // may be x
  int64_t num_rows = 0;
  int dim = 0;
  float epsilon = 1e-6f;
};

// In place on q [num_rows][num_query_heads][head_dim] and k [num_rows][num_kv_heads][head_dim].
struct RopeArgs {
  void* q = nullptr;
  void* k = nullptr;
  const int64_t* positions = nullptr;  // host memory, [num_rows]
  int64_t num_rows = 0;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  attention::RopeParams rope;
};

enum class GateKind { kSilu, kGeluTanh };

// The first half of a feed-forward part: act(gate x') * up x' of the normed rows x' of norm.x.
struct GatedArgs {
  RmsNormArgs norm;  // norm.out may hold x' afterwards, or what it held
  GateKind kind = GateKind::kSilu;
  const Matrix* gate = nullptr;
  const Matrix* up = nullptr;  // as large as gate
  void* out = nullptr;         // [num_rows][rows of gate]
  void* up_scratch = nullptr;  // like out, overwritten
};

// Mixture of experts: out = sum over the chosen experts of weight_e * down_e(act(gate_e x) * up_e
// x).
struct MoeArgs {
  const void* x = nullptr;  // [num_rows][dim]
  void* out = nullptr;      // [num_rows][dim]
  int64_t num_rows = 0;
  int num_experts = 0;
  int num_experts_used = 0;
  bool normalize_weights = true;  // chosen weights are scaled to sum to 1
  GateKind gate = GateKind::kSilu;
  const Matrix* router = nullptr;            // [num_experts][dim]
  std::span<const Matrix* const> gate_proj;  // [num_experts]
  std::span<const Matrix* const> up_proj;
  std::span<const Matrix* const> down_proj;
};

// Appends K and V of all new tokens of a group's sequences in one layer, then encodes the pages
// that fill (view.closes). q, k and v have the activations' row order; k is after RoPE (before it
// with +prerope). What could not be encoded is counted: see take_encode_stats.
struct AppendArgs {
  const cache::GroupView* view = nullptr;
  int group_layer = 0;      // index of the layer in its group
  const void* k = nullptr;  // [num_rows][num_kv_heads][head_dim]
  const void* v = nullptr;
};

struct AttentionArgs {
  const cache::GroupView* view = nullptr;
  int group_layer = 0;
  attention::AttentionParams params;
  const void* q = nullptr;  // [num_rows][num_query_heads][head_dim]
  void* out = nullptr;      // like q
};

// The greatest of a row of values: of equals the first.
struct RowMaximum {
  float value = 0.0f;
  int32_t index = -1;  // -1: some value of the row is infinite or not a number
};
// On the host.
RowMaximum greatest_value(std::span<const float> values);

// What answer_queries() finds of a row in place of its values: as much as choosing a token takes.
// Weights and their sums are those of base/row_weight.h.
struct RowQuery {
  enum class Kind : int32_t {
    kGreatest,  // the greatest value, which every query gives
    kDraw,      // an index at random, by weight
    kTopK,      // the `top_k` greatest values
    kNear,      // values of (greatest + below) or more
    kTopP,      // the fewest greatest values that hold the share `top_p` of all weights
  };
  Kind kind = Kind::kGreatest;
  int32_t top_k = 0;   // 1 to kMostCandidates
  float below = 0.0f;  // 0 or less
  float scale = 1.0f;  // above 0; of kDraw and kTopP
  double top_p = 1.0;  // below 1
  double uniform = 0;  // of kDraw, [0, 1): what is drawn is where this share of all weights lies,
                       // taken off by blocks, then by values
};
inline constexpr int kMostCandidates = 1024;
struct RowChoice {
  int32_t drawn = -1;          // kDraw
  int32_t num_candidates = 0;  // kTopK, kNear, kTopP
  double total = 0;            // kDraw, kTopP: the sum of all weights
  constexpr bool found() const { return drawn >= 0 || num_candidates > 0; }
};
// On the host, by sorting; nothing is found where `candidates` have no room for all.
RowChoice answer_query(std::span<const float> values, const RowQuery& query,
                       std::span<RowMaximum> candidates);
// Where answers go: memory of MemoryUse::kTables or, of a backend of the host, any.
struct RowAnswers {
  RowMaximum* maxima = nullptr;      // [num_rows]
  RowChoice* choices = nullptr;      // [num_rows]
  RowMaximum* candidates = nullptr;  // [num_rows][kMostCandidates], greatest first, then by index
  float* values = nullptr;           // [num_rows][num_cols], where nothing was found
};

// What repeat() tells calls apart by.
struct RepeatKey {
  const void* owner = nullptr;  // whose operators they are; it outlives its last call
  int64_t part = 0;             // which of the owner's
  int64_t num_rows = 0;
  friend bool operator<(const RepeatKey& a, const RepeatKey& b) {
    return std::tie(a.num_rows, a.owner, a.part) < std::tie(b.num_rows, b.owner, b.part);
  }
};

struct WorkspaceNeeds {
  int num_layers = 0;
  int64_t max_rows = 0;     // rows of one step
  int64_t max_context = 0;  // longest sequence in tokens
  int max_cols = 0;         // widest input of a linear operator
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 0;
  int max_sequences = 1;
  int num_experts = 0;
  int num_experts_used = 0;
  int expert_dim = 0;
  bool transforms = false;  // some layer has +smooth, +rot or +bias
  bool pre_rope = false;    // some layer stores keys before RoPE
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const BackendInfo& info() const = 0;
  virtual MemoryResource& memory() = 0;

  // kUnsupported names the first format, option or geometry that this backend cannot serve.
  virtual Status supports(const formats::CacheFormat& format, int head_dim,
                          int query_heads_per_kv_head) const = 0;

  // Scratch memory for everything below, allocated once; the planner calls workspace_bytes.
  virtual int64_t workspace_bytes(const WorkspaceNeeds& needs) const = 0;
  virtual Status reserve_workspace(const WorkspaceNeeds& needs) = 0;

  // Bytes of MemoryUse::kWeights that load_matrix would take.
  virtual int64_t matrix_bytes(const MatrixSource& source) const = 0;
  virtual Result<std::unique_ptr<Matrix>> load_matrix(const MatrixSource& source) = 0;

  // ---- dense operators ----
  // out[row] = scale * dequantised row ids[row] of the table, [num_rows][cols]. `ids` in host
  // memory.
  virtual Status embed(const MatrixSource& table, std::span<const int32_t> ids, float scale,
                       void* out) = 0;
  virtual Status rms_norm(const RmsNormArgs& args) = 0;
  virtual Status linear(const void* x, int64_t num_rows, std::span<const LinearTarget> targets) = 0;
  // linear() of norm.out after rms_norm(norm). A backend that need not write norm.out does not.
  virtual Status norm_linear(const RmsNormArgs& norm, std::span<const LinearTarget> targets);
  virtual Status rope(const RopeArgs& args) = 0;
  virtual Status gate(GateKind kind, const void* gate, const void* up, void* out,
                      int64_t num_values) = 0;                         // out = act(gate) * up
  virtual Status norm_gated(const GatedArgs& args);                    // norm_linear(), then gate()
  virtual Status add(const void* x, void* y, int64_t num_values) = 0;  // y += x
  virtual Status moe(const MoeArgs& args) = 0;
  // out[i] = x[rows[i]], `dim` values each; `rows` in host memory.
  virtual Status gather_rows(const void* x, std::span<const int64_t> rows, int dim, void* out) = 0;

  // maxima[i] = the greatest of row i of x [num_rows][num_cols], once synchronize() or another
  // operator that waits has returned. `maxima` is memory of MemoryUse::kTables or, of a backend of
  // the host, any.
  virtual Status greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                                  RowMaximum* maxima);
  // The same, and what `queries` [num_rows] (in memory as answers are) ask of the rows. Nothing is
  // found, and the row copied, where candidates are more than there is room for or would have to be
  // sought among so many.
  virtual Status answer_queries(const void* x, int64_t num_rows, int64_t num_cols,
                                const RowQuery* queries, const RowAnswers& answers);
  // Calls `enqueue`, or does what its last call with this key did. It calls dense operators but
  // moe() and what takes or gives host memory; with the same key always the same ones in the same
  // order, with the same arguments, until reserve_workspace(). That a device may keep, and enqueue
  // it as a whole.
  virtual Status repeat(const RepeatKey& key, const std::function<Status()>& enqueue);

  // ---- cache operators ----
  virtual Status append(const AppendArgs& args) = 0;
  virtual Status rope_append(const RopeArgs& rope,
                             const AppendArgs& args);  // rope(), then append()
  // What all appends since the last call could not encode, once they are done (it waits for them).
  // The caller fails the step if non_finite > 0.
  virtual Result<formats::EncodeStats> take_encode_stats() = 0;
  virtual Status attention(const AttentionArgs& args) = 0;

  // ---- host exchange ----
  // Complete on return.
  virtual Status download_f32(const void* activations, int64_t num_values, float* host) = 0;
  virtual Status upload_f32(const float* host, int64_t num_values, void* activations) = 0;
  virtual Status synchronize() = 0;
};

int64_t activation_bytes(ActivationType type, int64_t num_values);

// Whether a device keeps what repeat() is given.
enum class Repetition { kWherePays, kWherePossible, kNever };

// Whether pages that sequences of a batch have in common are read once for all of them.
enum class PageSharing { kWherePays, kWherePossible, kNever };

// What prompts' attention multiplies on GPUs: 16-bit numbers, or E4M3 at twice the rate with an
// error of some percent.
enum class PromptAttention { k16Bit, kFp8 };

struct BackendOptions {
  std::string name = "cpu";
  int num_threads = 0;       // CPU: 0 = one per processor
  int64_t memory_limit = 0;  // bytes; 0: none
  // GPUs: bytes for copies of the pages that a long step attends to, in 16 bit or as
  // `prompt_attention` says. More of them are copied piece by piece. 0: 512 MiB, or what the
  // context needs if that is less.
  int64_t prefill_workspace = 0;
  PromptAttention prompt_attention = PromptAttention::k16Bit;
  bool deterministic = false;
  // GPUs; for tests and measurements.
  PageSharing page_sharing = PageSharing::kWherePays;
  Repetition repetition = Repetition::kWherePays;
  bool row_queries = true;  // BackendInfo::has_queries, where the backend could
};

// Explicit table of backends (registry.cc); kUnsupported names those that exist in this build.
Result<std::unique_ptr<Backend>> create_backend(const BackendOptions& options);

}  // namespace kvant::backend
