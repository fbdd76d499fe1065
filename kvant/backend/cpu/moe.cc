#include "kvant/backend/cpu/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvant/base/check.h"

namespace kvant::backend::cpu {
namespace {

constexpr int64_t kExpertRows = 96;  // rows of one expert at a time

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Hands out pieces of a workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace

// The pieces in order; counts with a null base.
struct MoeRunner::Layout {
  static int64_t carve(uint8_t* base, const WorkspaceNeeds& needs, MoeRunner* runner) {
    MoeRunner* r = runner;
    const int64_t pairs = needs.max_rows * needs.num_experts_used;
    const int64_t expert_rows = std::min(needs.max_rows, kExpertRows);
    Carver carver(base);
    float* logits = carver.take<float>(needs.max_rows * needs.num_experts);
    int32_t* chosen = carver.take<int32_t>(pairs);
    float* weights = carver.take<float>(pairs);
    int32_t* start = carver.take<int32_t>(needs.num_experts + 1);
    int32_t* rows = carver.take<int32_t>(pairs);
    float* row_weights = carver.take<float>(pairs);
    float* gate = carver.take<float>(expert_rows * needs.expert_dim);
    float* up = carver.take<float>(expert_rows * needs.expert_dim);
    float* down = carver.take<float>(expert_rows * needs.max_cols);
    if (r != nullptr) {
      r->logits_ = logits;
      r->chosen_ = chosen;
      r->weights_ = weights;
      r->expert_start_ = start;
      r->expert_rows_ = rows;
      r->expert_weights_ = row_weights;
      r->gate_ = gate;
      r->up_ = up;
      r->down_ = down;
    }
    return carver.used();
  }
};

int64_t MoeRunner::workspace_bytes(const WorkspaceNeeds& needs) {
  return needs.num_experts > 0 ? Layout::carve(nullptr, needs, nullptr) : 0;
}

void MoeRunner::set_workspace(uint8_t* workspace, const WorkspaceNeeds& needs) {
  max_rows_ = needs.num_experts > 0 ? needs.max_rows : 0;
  if (needs.num_experts > 0) Layout::carve(workspace, needs, this);
}

void choose_experts(float* logits, int num_experts, int used, bool normalize, int32_t* chosen,
                    float* weights) {
  const float max = *std::max_element(logits, logits + num_experts);
  float sum = 0.0f;
  for (int i = 0; i < num_experts; ++i) {
    logits[i] = std::exp(logits[i] - max);
    sum += logits[i];
  }
  for (int i = 0; i < num_experts; ++i) logits[i] /= sum;
  float chosen_sum = 0.0f;
  for (int k = 0; k < used; ++k) {
    int best = -1;
    for (int i = 0; i < num_experts; ++i) {
      if (std::find(chosen, chosen + k, i) != chosen + k) continue;
      if (best < 0 || logits[i] > logits[best]) best = i;
    }
    chosen[k] = best;
    weights[k] = logits[best];
    chosen_sum += weights[k];
  }
  if (!normalize) return;
  for (int k = 0; k < used; ++k) weights[k] /= chosen_sum;
}

void MoeRunner::route(const MoeArgs& args, const float* x, int64_t num_rows) {
  LinearTarget target;
  target.matrix = args.router;
  target.out = logits_;
  linear_.run({x, nullptr, num_rows}, {&target, 1});
  pool_.parallel_for(num_rows, [&](int64_t row, int) {
    choose_experts(logits_ + row * args.num_experts, args.num_experts, args.num_experts_used,
                   args.normalize_weights, chosen_ + row * args.num_experts_used,
                   weights_ + row * args.num_experts_used);
  });
}

// Counting sort of (row, expert) pairs by expert; rows of one expert stay in order.
void MoeRunner::group_by_expert(const MoeArgs& args, int64_t num_rows) {
  const int64_t pairs = num_rows * args.num_experts_used;
  std::fill_n(expert_start_, args.num_experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) ++expert_start_[chosen_[i] + 1];
  for (int e = 0; e < args.num_experts; ++e) expert_start_[e + 1] += expert_start_[e];
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t slot = expert_start_[chosen_[i]]++;
    expert_rows_[slot] = static_cast<int32_t>(i / args.num_experts_used);
    expert_weights_[slot] = weights_[i];
  }
  // Each start has moved to the next expert's start.
  for (int e = args.num_experts; e > 0; --e) expert_start_[e] = expert_start_[e - 1];
  expert_start_[0] = 0;
}

void MoeRunner::run_expert(const MoeArgs& args, int expert, const float* x, float* out) {
  const int64_t dim = args.router->cols();
  const int64_t expert_dim = args.gate_proj[expert]->rows();
  for (int64_t first = expert_start_[expert]; first < expert_start_[expert + 1];
       first += kExpertRows) {
    const int64_t count = std::min<int64_t>(kExpertRows, expert_start_[expert + 1] - first);
    LinearTarget targets[2];
    targets[0].matrix = args.gate_proj[expert];
    targets[0].out = gate_;
    targets[1].matrix = args.up_proj[expert];
    targets[1].out = up_;
    linear_.run({x, expert_rows_ + first, count}, targets);
    const auto activate = args.gate == GateKind::kSilu ? kernels_.silu_gate : kernels_.gelu_gate;
    pool_.parallel_for(count, [&](int64_t row, int) {
      const int64_t at = row * expert_dim;
      activate(gate_ + at, up_ + at, gate_ + at, expert_dim);
    });
    LinearTarget down;
    down.matrix = args.down_proj[expert];
    down.out = down_;
    linear_.run({gate_, nullptr, count}, {&down, 1});
    pool_.parallel_for(count, [&](int64_t row, int) {
      kernels_.add_scaled(down_ + row * dim, expert_weights_[first + row],
                          out + expert_rows_[first + row] * dim, dim);
    });
  }
}

void MoeRunner::run(const MoeArgs& args) {
  KVANT_CHECK(args.x != args.out, "the experts' sum cannot replace their input");
  KVANT_CHECK(args.num_rows == 0 || max_rows_ > 0, "reserve_workspace covers the experts");
  const int64_t dim = args.router->cols();
  for (int64_t first = 0; first < args.num_rows; first += max_rows_) {
    const int64_t count = std::min(max_rows_, args.num_rows - first);
    const float* x = static_cast<const float*>(args.x) + first * dim;
    float* out = static_cast<float*>(args.out) + first * dim;
    route(args, x, count);
    group_by_expert(args, count);
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(count * dim));
    for (int expert = 0; expert < args.num_experts; ++expert) {
      if (expert_start_[expert] < expert_start_[expert + 1]) run_expert(args, expert, x, out);
    }
  }
}

}  // namespace kvant::backend::cpu
