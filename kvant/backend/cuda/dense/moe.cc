#include "kvant/backend/cuda/dense/moe.h"

#include <algorithm>

#include "kvant/backend/cuda/dense/matrix.h"
#include "kvant/backend/cuda/dense/moe_kernels.h"
#include "kvant/backend/cuda/dense/operators.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kFewPairs = 128;  // that read their experts one by one

// Hands out pieces of a workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace

struct CudaMoe::Layout {
  static int64_t carve(std::byte* base, const WorkspaceNeeds& needs, CudaMoe& m) {
    const int64_t rows = std::min(needs.max_rows, kChunkRows);
    const int64_t pairs = rows * needs.num_experts_used;
    Carver carver(base);
    m.logits_ = carver.take<float>(rows * needs.num_experts);
    m.chosen_ = carver.take<int32_t>(pairs);
    m.weights_ = carver.take<float>(pairs);
    m.places_ = carver.take<int64_t>(2 * pairs);
    m.matrices_ = carver.take<const uint8_t*>(3 * int64_t{needs.num_experts});
    m.gathered_ = carver.take<float>(pairs > kFewPairs ? pairs * needs.max_cols : 0);
    m.gate_ = carver.take<float>(pairs * needs.expert_dim);
    m.up_ = carver.take<float>(pairs * needs.expert_dim);
    m.down_ = carver.take<float>(pairs * needs.max_cols);
    m.max_rows_ = rows;
    return carver.used();
  }
};

int64_t CudaMoe::workspace_bytes(const WorkspaceNeeds& needs) {
  CudaMoe unused;
  return needs.num_experts > 0 ? Layout::carve(nullptr, needs, unused) : 0;
}

void CudaMoe::set_workspace(std::byte* workspace, const WorkspaceNeeds& needs) {
  max_rows_ = 0;
  if (needs.num_experts > 0) Layout::carve(workspace, needs, *this);
}

Status CudaMoe::route(const Call& call) {
  LinearTarget target;
  target.matrix = call.args.router;
  target.out = logits_;
  // Rounded inputs could choose other experts.
  KVANT_TRY(call.linear.run_exact(call.x, call.num_rows, {&target, 1}, call.stream));
  return choose_experts({.logits = logits_,
                         .num_rows = call.num_rows,
                         .num_experts = call.args.num_experts,
                         .used = call.args.num_experts_used,
                         .normalize = call.args.normalize_weights,
                         .chosen = chosen_,
                         .weights = weights_},
                        call.stream);
}

Status CudaMoe::run_pairs(const Call& call) {
  const MoeArgs& args = call.args;
  const size_t num_experts = static_cast<size_t>(args.num_experts);
  std::vector<const uint8_t*> table;
  table.reserve(3 * num_experts);
  for (const auto& list : {args.gate_proj, args.up_proj, args.down_proj}) {
    for (const Matrix* matrix : list) table.push_back(tiles_of(matrix).data);
  }
  KVANT_TRY(call.ring.upload(static_cast<void*>(matrices_), table.data(),
                             static_cast<int64_t>(table.size() * sizeof(table[0])), call.stream));
  const auto multiply = [&](const float* x, const Matrix* first, size_t list, int rows_per_x,
                            float* out) {
    LinearTarget target;
    target.matrix = first;
    target.out = out;
    const ExpertChoice choice{chosen_, matrices_ + list * num_experts, rows_per_x};
    return call.linear.run_chosen(x, call.pairs(), target, choice, call.stream);
  };
  KVANT_TRY(multiply(call.x, args.gate_proj[0], 0, args.num_experts_used, gate_));
  KVANT_TRY(multiply(call.x, args.up_proj[0], 1, args.num_experts_used, up_));
  KVANT_TRY(
      gate(args.gate, gate_, up_, gate_, call.pairs() * args.gate_proj[0]->rows(), call.stream));
  KVANT_TRY(multiply(gate_, args.down_proj[0], 2, 1, down_));
  return combine_experts({.down = down_,
                          .weights = weights_,
                          .num_rows = call.num_rows,
                          .used = args.num_experts_used,
                          .dim = args.router->cols(),
                          .out = call.out},
                         call.stream);
}

Status CudaMoe::run_expert(const Call& call, int expert, int64_t first, int64_t count) {
  const MoeArgs& args = call.args;
  const int64_t dim = args.router->cols();
  const int64_t expert_dim = args.gate_proj[expert]->rows();
  LinearTarget targets[2];
  targets[0].matrix = args.gate_proj[expert];
  targets[0].out = gate_;
  targets[1].matrix = args.up_proj[expert];
  targets[1].out = up_;
  KVANT_TRY(call.linear.run(gathered_ + first * dim, count, targets, call.stream));
  KVANT_TRY(gate(args.gate, gate_, up_, gate_, count * expert_dim, call.stream));
  LinearTarget down;
  down.matrix = args.down_proj[expert];
  down.out = down_ + first * dim;
  return call.linear.run(gate_, count, {&down, 1}, call.stream);
}

Status CudaMoe::run_grouped(const Call& call) {
  const MoeArgs& args = call.args;
  const int64_t pairs = call.pairs();
  const int64_t dim = args.router->cols();
  host_chosen_.resize(static_cast<size_t>(pairs));
  KVANT_TRY(cuda_status(cudaMemcpyAsync(host_chosen_.data(), chosen_, sizeof(int32_t) * pairs,
                                        cudaMemcpyDeviceToHost, call.stream),
                        "reading the choice of experts"));
  KVANT_TRY(cuda_status(cudaStreamSynchronize(call.stream), "choosing experts"));
  // Counting sort of pairs by expert; rows of one expert stay in order.
  start_.assign(static_cast<size_t>(args.num_experts) + 1, 0);
  for (const int32_t expert : host_chosen_) ++start_[expert + 1];
  for (int e = 0; e < args.num_experts; ++e) start_[e + 1] += start_[e];
  place_of_pair_.resize(static_cast<size_t>(pairs));
  row_of_place_.resize(static_cast<size_t>(pairs));
  std::vector<int64_t> next(start_.begin(), start_.end() - 1);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t place = next[host_chosen_[pair]]++;
    place_of_pair_[pair] = place;
    row_of_place_[place] = pair / args.num_experts_used;
  }
  const int64_t bytes = pairs * static_cast<int64_t>(sizeof(int64_t));
  KVANT_TRY(call.ring.upload(places_, place_of_pair_.data(), bytes, call.stream));
  KVANT_TRY(call.ring.upload(places_ + pairs, row_of_place_.data(), bytes, call.stream));
  KVANT_TRY(
      gather_rows(call.x, places_ + pairs, pairs, static_cast<int>(dim), gathered_, call.stream));
  for (int expert = 0; expert < args.num_experts; ++expert) {
    const int64_t count = start_[expert + 1] - start_[expert];
    if (count > 0) KVANT_TRY(run_expert(call, expert, start_[expert], count));
  }
  return combine_experts({.down = down_,
                          .places = places_,
                          .weights = weights_,
                          .num_rows = call.num_rows,
                          .used = args.num_experts_used,
                          .dim = dim,
                          .out = call.out},
                         call.stream);
}

Status CudaMoe::run(const MoeArgs& args, CudaLinear& linear, UploadRing& ring,
                    cudaStream_t stream) {
  KVANT_CHECK(args.x != args.out, "the experts' sum cannot replace their input");
  KVANT_CHECK(args.num_rows == 0 || max_rows_ > 0, "reserve_workspace covers the experts");
  if (args.num_experts > kMaxExperts) {
    return Error(ErrorCode::kUnsupported, "the CUDA backend chooses among at most " +
                                              std::to_string(kMaxExperts) + " experts, found " +
                                              std::to_string(args.num_experts));
  }
  const int64_t dim = args.router->cols();
  for (int64_t first = 0; first < args.num_rows; first += max_rows_) {
    const Call call{.args = args,
                    .linear = linear,
                    .ring = ring,
                    .stream = stream,
                    .x = static_cast<const float*>(args.x) + first * dim,
                    .out = static_cast<float*>(args.out) + first * dim,
                    .num_rows = std::min(max_rows_, args.num_rows - first)};
    KVANT_TRY(route(call));
    const bool few = call.pairs() <= kFewPairs || linear.deterministic();
    KVANT_TRY(few ? run_pairs(call) : run_grouped(call));
  }
  return {};
}

}  // namespace kvant::backend::cuda
