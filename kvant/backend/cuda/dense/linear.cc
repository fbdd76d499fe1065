#include "kvant/backend/cuda/dense/linear.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/cuda/dense/decoded_product.h"
#include "kvant/backend/cuda/dense/matrix.h"
#include "kvant/backend/cuda/dense/operators.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

// Where products that read the stored weights are faster than cuBLASLt, which reads BF16 as it is
// and everything else once more than that. Measured on an H100 (docs/kernels/cuda-linear.md).
constexpr int64_t kMostGroups = kPreparedRows / kGroupRows;
// A strip costs them a fixed time beside that of its inputs, so that those of more inputs stand
// more groups of rows; up to so many turns what cuBLASLt needs in any case is more than all of
// that.
constexpr int64_t kLeastGroups = 2;
constexpr int64_t kColsOfGroup = 288;
constexpr int64_t kFewTurns = 3;
constexpr int64_t kFewRowsBf16 = 8;
constexpr int64_t kMostFewRowsBf16 = 16;
constexpr int64_t kMostColsBf16 = 2048;
constexpr int64_t kBlasWorkspace = int64_t{32} << 20;     // cuBLASLt's advice for Hopper
constexpr size_t kMaxAlgorithms = 4096;                   // remembered
constexpr int64_t kDequantisedPiece = int64_t{64} << 20;  // of BF16 weights

// With products that decode weights, which multiply at least 16 rows, so many are always few; above
// that estimates are compared.
constexpr int64_t kFewRowsDecoded = 8;

// Of products of few rows, if they are more than that: launches, and strips times groups of rows.
int64_t few_rows_nanoseconds(int64_t strips, int64_t groups, int64_t cols) {
  constexpr int64_t kLaunches = 3600;
  const int64_t picoseconds = std::max<int64_t>(8400, 4000 + 4300 * cols / 1024);
  return kLaunches + groups * strips * picoseconds / 1000;
}

int64_t padded(int64_t cols) {
  WeightTiles tiles;
  tiles.cols = cols;
  return tiles.padded_cols();
}

// Rows of a matrix that are dequantised at a time.
int64_t piece_rows(int64_t cols) {
  return std::max<int64_t>(1, kDequantisedPiece / (2 * padded(cols)) / kStripRows) * kStripRows;
}

// Of rows of activations in 16 bits, as cuBLASLt or products that decode weights take them.
int64_t rounded_bytes(int64_t rows, int64_t cols) {
  return (half_rows_bytes(rows, padded(cols)) + 255) / 256 * 256;
}

// Whether a matrix is decoded on its way to the tensor cores where rows are many.
bool is_decoded(const LinearTarget& target) {
  return has_decoded_product(tiles_of(target.matrix).type);
}
bool any_is_decoded(std::span<const LinearTarget> targets) {
  return std::ranges::any_of(targets, is_decoded);
}

Status blas_status(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  return Error(ErrorCode::kDeviceError,
               std::string("cuBLASLt, ") + what + ": " + cublasLtGetStatusString(status));
}

template <typename T, cublasStatus_t (*kDestroy)(T)>
struct Destroy {
  void operator()(T object) const { kDestroy(object); }
};
using Operation = std::unique_ptr<cublasLtMatmulDescOpaque_t,
                                  Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t,
                               Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Preference =
    std::unique_ptr<cublasLtMatmulPreferenceOpaque_t,
                    Destroy<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

Result<Layout> make_layout(cudaDataType_t type, int64_t rows, int64_t cols, int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  KVANT_TRY(blas_status(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows),
                                                   static_cast<uint64_t>(cols), stride),
                        "describing a matrix"));
  return Layout(layout);
}

template <typename T>
Status set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, T value) {
  return blas_status(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)),
                     "describing a product");
}

// Row-major out = x W^T is column-major out^T = W x^T with W transposed as stored.
Result<Operation> make_operation(const float* bias) {
  cublasLtMatmulDesc_t raw = nullptr;
  KVANT_TRY(blas_status(cublasLtMatmulDescCreate(&raw, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                        "describing a product"));
  Operation operation(raw);
  KVANT_TRY(set(raw, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T));
  if (bias == nullptr) return operation;
  KVANT_TRY(set(raw, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS));
  KVANT_TRY(set(raw, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F));
  KVANT_TRY(set(raw, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias));
  return operation;
}

}  // namespace

CudaLinear::~CudaLinear() {
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

Status CudaLinear::create(int num_sms, bool deterministic) {
  num_sms_ = num_sms;
  deterministic_ = deterministic;
  return blas_status(cublasLtCreate(&handle_), "starting");
}

int64_t CudaLinear::workspace_bytes(int64_t max_rows, int64_t max_cols) {
  if (max_rows <= 0 || max_cols <= 0) return 0;
  return kBlasWorkspace + rounded_bytes(max_rows, max_cols) +
         2 * piece_rows(max_cols) * padded(max_cols);
}

void CudaLinear::set_workspace(std::byte* workspace, int64_t max_rows, int64_t max_cols) {
  max_rows_ = max_rows;
  max_cols_ = max_cols;
  blas_workspace_ = workspace;
  rounded_x_ = reinterpret_cast<uint16_t*>(workspace + kBlasWorkspace);
  weights_ =
      reinterpret_cast<uint16_t*>(workspace + kBlasWorkspace + rounded_bytes(max_rows, max_cols));
}

Status CudaLinear::run(const float* x, int64_t num_rows, std::span<const LinearTarget> targets,
                       cudaStream_t stream) {
  if (num_rows == 0 || targets.empty()) return {};
  if (!rounds(num_rows, targets)) return run_exact(x, num_rows, targets, stream);
  const int64_t cols = targets[0].matrix->cols();
  KVANT_CHECK(max_rows_ > 0 && cols <= max_cols_, "reserve_workspace covers the products");
  std::vector<LinearTarget> parts;
  for (int64_t first = 0; first < num_rows; first += max_rows_) {
    const int64_t count = std::min(max_rows_, num_rows - first);
    parts.assign(targets.begin(), targets.end());
    for (LinearTarget& part : parts) {
      part.out = static_cast<float*>(part.out) + first * part.matrix->rows();
    }
    KVANT_TRY(run_many(x + first * cols, count, {}, parts, stream));
  }
  return {};
}

bool CudaLinear::rounds(int64_t num_rows, std::span<const LinearTarget> targets) const {
  if (deterministic_) return false;
  const int64_t cols = targets[0].matrix->cols();
  const int64_t groups = num_row_groups(num_rows);
  int64_t strips = 0;
  for (const LinearTarget& target : targets) strips += tiles_of(target.matrix).num_strips();
  if (any_is_decoded(targets)) {
    if (num_rows <= kFewRowsDecoded) return false;
    if (num_rows > kPreparedRows) return true;
    const WeightTiles& tiles = tiles_of(targets[0].matrix);
    const int64_t decoded = decoded_product_nanoseconds({.num_rows = num_rows,
                                                         .num_strips = strips,
                                                         .num_tiles = tiles.num_tiles(),
                                                         .strip_bytes = tiles.strip_bytes(),
                                                         .num_sms = num_sms_});
    return decoded < few_rows_nanoseconds(strips, groups, cols);
  }
  const bool few_turns = strips * groups <= kFewTurns * num_teams(num_sms_);
  if (tiles_of(targets[0].matrix).type == formats::WeightType::kBF16) {
    const bool more = few_turns && cols <= kMostColsBf16;
    return num_rows > (more ? kMostFewRowsBf16 : kFewRowsBf16);
  }
  return groups >
         (few_turns ? kMostGroups : std::clamp(cols / kColsOfGroup, kLeastGroups, kMostGroups));
}

Status CudaLinear::run_rounded(const RmsNormArgs& norm, std::span<const LinearTarget> targets,
                               cudaStream_t stream) {
  KVANT_CHECK(norm.num_rows <= max_rows_ && norm.dim <= max_cols_,
              "reserve_workspace covers the products");
  if (any_is_decoded(targets) && !can_norm(targets)) {
    KVANT_TRY(rms_norm(norm, stream));
    return run(static_cast<const float*>(norm.out), norm.num_rows, targets, stream);
  }
  std::vector<LinearTarget> parts(targets.begin(), targets.end());
  return run_many(static_cast<const float*>(norm.x), norm.num_rows, {norm.weight, norm.epsilon},
                  parts, stream);
}

// Rows are made ready once for each of the two ways.
Status CudaLinear::run_many(const float* x, int64_t num_rows, const RowNorm& norm,
                            std::span<LinearTarget> targets, cudaStream_t stream) {
  const auto others = std::ranges::stable_partition(targets, is_decoded);
  const auto decoded = targets.first(targets.size() - others.size());
  if (!decoded.empty()) {
    RowProduct product = decoded_product_of(x, num_rows);
    product.norm = norm;
    KVANT_TRY(run_decoded(product, decoded, stream));
  }
  if (others.empty()) return {};
  const int64_t cols = targets[0].matrix->cols();
  if (norm.weight != nullptr) {
    const RmsNormArgs args = {.x = x,
                              .weight = norm.weight,
                              .num_rows = num_rows,
                              .dim = static_cast<int>(cols),
                              .epsilon = norm.epsilon};
    KVANT_TRY(rounded_rms_norm(args, padded(cols), rounded_x_, stream));
  } else {
    KVANT_TRY(round_rows(x, num_rows, cols, padded(cols), rounded_x_, stream));
  }
  return run_targets(num_rows, std::span<LinearTarget>(others), stream);
}

bool CudaLinear::can_norm(std::span<const LinearTarget> targets) const {
  return blas_workspace_ != nullptr &&
         std::ranges::all_of(targets, [&](const LinearTarget& target) {
           return cuda::can_norm(tiles_of(target.matrix));
         });
}

Status CudaLinear::run_normed(const RmsNormArgs& norm, std::span<const LinearTarget> targets,
                              cudaStream_t stream) {
  RowProduct product = product_of(static_cast<const float*>(norm.x), norm.num_rows);
  product.norm = {norm.weight, norm.epsilon};
  return run_product(product, targets, stream);
}

bool CudaLinear::can_gate(const GatedArgs& args) const {
  const WeightTiles& gate = tiles_of(args.gate);
  const WeightTiles& up = tiles_of(args.up);
  const std::array<LinearTarget, 2> targets = {{{.matrix = args.gate}, {.matrix = args.up}}};
  return gate.type == up.type && gate.rows == up.rows && can_norm(targets) &&
         (!rounds(args.norm.num_rows, targets) ||
          (any_is_decoded(targets) && args.norm.num_rows <= max_rows_));
}

Status CudaLinear::run_gated(const GatedArgs& args, cudaStream_t stream) {
  const std::array<LinearTarget, 2> targets = {{
      {.matrix = args.gate, .out = args.out},
      {.matrix = args.up, .out = args.up_scratch},
  }};
  const auto* const x = static_cast<const float*>(args.norm.x);
  const bool decoded = rounds(args.norm.num_rows, targets);
  RowProduct product =
      decoded ? decoded_product_of(x, args.norm.num_rows) : product_of(x, args.norm.num_rows);
  product.norm = {args.norm.weight, args.norm.epsilon};
  product.gated = true;
  product.gate = args.kind;
  return decoded ? run_decoded(product, targets, stream) : run_product(product, targets, stream);
}

RowProduct CudaLinear::product_of(const float* x, int64_t num_rows) const {
  // The workspace is where cuBLASLt works in its turn.
  return {.x = x,
          .num_rows = num_rows,
          .num_sms = num_sms_,
          .deterministic = deterministic_,
          .workspace = blas_workspace_,
          .workspace_bytes = blas_workspace_ != nullptr ? kBlasWorkspace : 0};
}

Status CudaLinear::run_chosen(const float* x, int64_t num_rows, const LinearTarget& target,
                              const ExpertChoice& choice, cudaStream_t stream) {
  RowProduct product = product_of(x, num_rows);
  product.choice = choice;
  return run_product(product, {&target, 1}, stream);
}

Status CudaLinear::run_exact(const float* x, int64_t num_rows,
                             std::span<const LinearTarget> targets, cudaStream_t stream) {
  return run_product(product_of(x, num_rows), targets, stream);
}

RowProduct CudaLinear::decoded_product_of(const float* x, int64_t num_rows) const {
  RowProduct product = product_of(x, num_rows);
  product.workspace = reinterpret_cast<std::byte*>(rounded_x_);
  product.workspace_bytes = rounded_bytes(max_rows_, max_cols_);
  return product;
}

Status CudaLinear::run_by_type(const RowProduct& product, std::span<const LinearTarget> targets,
                               Multiply* multiply, cudaStream_t stream) {
  std::array<ProductTarget, kMaxProductTargets> group;
  size_t size = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    group[size++] = {.weights = tiles_of(targets[i].matrix),
                     .bias = targets[i].bias,
                     .out = static_cast<float*>(targets[i].out),
                     .accumulate = targets[i].accumulate};
    const bool ends = i + 1 == targets.size() || size == group.size() ||
                      tiles_of(targets[i + 1].matrix).type != group[0].weights.type;
    if (!ends) continue;
    KVANT_TRY(multiply(product, std::span(group).first(size), stream));
    size = 0;
  }
  return {};
}

Status CudaLinear::run_product(const RowProduct& product, std::span<const LinearTarget> targets,
                               cudaStream_t stream) {
  return run_by_type(product, targets, multiply_rows, stream);
}

Status CudaLinear::run_decoded(const RowProduct& product, std::span<const LinearTarget> targets,
                               cudaStream_t stream) {
  KVANT_TRY(prepare_half_rows(product, targets[0].matrix->cols(), stream));
  return run_by_type(product, targets, multiply_decoded, stream);
}

// x is in rounded_x_. Matrices of one type that fit the workspace together are dequantised by one
// launch.
Status CudaLinear::run_targets(int64_t num_rows, std::span<const LinearTarget> targets,
                               cudaStream_t stream) {
  const int64_t room = piece_rows(max_cols_) * padded(max_cols_);
  for (size_t begin = 0; begin < targets.size();) {
    const formats::WeightType type = tiles_of(targets[begin].matrix).type;
    std::array<Bf16Piece, kMaxProductTargets> pieces;
    size_t count = 0;
    int64_t used = 0;
    while (type != formats::WeightType::kBF16 && begin + count < targets.size() &&
           count < pieces.size()) {
      const WeightTiles& tiles = tiles_of(targets[begin + count].matrix);
      const int64_t values = tiles.rows * tiles.padded_cols();
      if (tiles.type != type || used + values > room) break;
      pieces[count++] = {
          .weights = tiles, .first_row = 0, .num_rows = tiles.rows, .out = weights_ + used};
      used += values;
    }
    if (count == 0) {
      KVANT_TRY(run_in_pieces(num_rows, targets[begin++], stream));
      continue;
    }
    KVANT_TRY(dequantize_to_bf16(std::span(pieces).first(count), stream));
    for (size_t i = 0; i < count; ++i) {
      const Piece whole = {targets[begin + i], 0, pieces[i].num_rows, pieces[i].out};
      KVANT_TRY(multiply_piece(num_rows, whole, stream));
    }
    begin += count;
  }
  return {};
}

// A matrix that is read in place, or does not fit the workspace.
Status CudaLinear::run_in_pieces(int64_t num_rows, const LinearTarget& target,
                                 cudaStream_t stream) {
  const WeightTiles& tiles = tiles_of(target.matrix);
  if (tiles.type == formats::WeightType::kBF16) {
    const auto* weights = reinterpret_cast<const uint16_t*>(tiles.data);
    return multiply_piece(num_rows, {target, 0, tiles.rows, weights}, stream);
  }
  const int64_t room = piece_rows(max_cols_) * padded(max_cols_);
  const int64_t step = room / tiles.padded_cols() / kStripRows * kStripRows;
  for (int64_t first = 0; first < tiles.rows; first += step) {
    const Bf16Piece piece = {.weights = tiles,
                             .first_row = first,
                             .num_rows = std::min(step, tiles.rows - first),
                             .out = weights_};
    KVANT_TRY(dequantize_to_bf16(std::span(&piece, 1), stream));
    KVANT_TRY(multiply_piece(num_rows, {target, first, piece.num_rows, weights_}, stream));
  }
  return {};
}

Status CudaLinear::multiply_piece(int64_t num_rows, const Piece& piece, cudaStream_t stream) {
  const WeightTiles& tiles = tiles_of(piece.target.matrix);
  const float* bias = piece.target.bias;
  return multiply({.outputs = piece.num_outputs,
                   .rows = num_rows,
                   .inputs = tiles.padded_cols(),
                   .out_stride = tiles.rows,
                   .weights = piece.weights,
                   .x = rounded_x_,
                   .bias = bias == nullptr ? nullptr : bias + piece.first_output,
                   .out = static_cast<float*>(piece.target.out) + piece.first_output,
                   .accumulate = piece.target.accumulate},
                  stream);
}

Status CudaLinear::multiply(const Gemm& gemm, cudaStream_t stream) {
  KVANT_ASSIGN(const Operation operation, make_operation(gemm.bias));
  KVANT_ASSIGN(const Layout a, make_layout(CUDA_R_16BF, gemm.inputs, gemm.outputs, gemm.inputs));
  KVANT_ASSIGN(const Layout b, make_layout(CUDA_R_16BF, gemm.inputs, gemm.rows, gemm.inputs));
  KVANT_ASSIGN(const Layout c, make_layout(CUDA_R_32F, gemm.outputs, gemm.rows, gemm.out_stride));
  const auto alignment = [](const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    return static_cast<uint32_t>(std::min<uintptr_t>(256, address & (~address + 1)));
  };
  const uint32_t out_alignment = alignment(gemm.out);
  const Shape shape = {gemm.outputs, gemm.rows, gemm.inputs, gemm.out_stride,
                       out_alignment * 2 + (gemm.bias != nullptr ? 1 : 0)};
  auto found = algorithms_.find(shape);
  if (found == algorithms_.end()) {
    if (algorithms_.size() >= kMaxAlgorithms) algorithms_.clear();
    cublasLtMatmulPreference_t raw = nullptr;
    KVANT_TRY(blas_status(cublasLtMatmulPreferenceCreate(&raw), "choosing an algorithm"));
    const Preference preference(raw);
    const size_t workspace = kBlasWorkspace;
    cublasLtMatmulPreferenceSetAttribute(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                         sizeof(workspace));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      cublasLtMatmulPreferenceSetAttribute(raw, attribute, &out_alignment, sizeof(out_alignment));
    }
    cublasLtMatmulHeuristicResult_t result = {};
    int count = 0;
    KVANT_TRY(blas_status(cublasLtMatmulAlgoGetHeuristic(handle_, operation.get(), a.get(), b.get(),
                                                         c.get(), c.get(), raw, 1, &result, &count),
                          "choosing an algorithm"));
    KVANT_CHECK(count > 0, "cuBLASLt has an algorithm for every product of aligned BF16");
    found = algorithms_.emplace(shape, result.algo).first;
  }
  const float one = 1.0f;
  const float beta = gemm.accumulate ? 1.0f : 0.0f;
  return blas_status(cublasLtMatmul(handle_, operation.get(), &one, gemm.weights, a.get(), gemm.x,
                                    b.get(), &beta, gemm.out, c.get(), gemm.out, c.get(),
                                    &found->second, blas_workspace_, kBlasWorkspace, stream),
                     "multiplying");
}

}  // namespace kvant::backend::cuda
