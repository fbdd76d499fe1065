// Where the time of a decode step goes: per kind of operator, what it costs the host to enqueue it
// and the device to run it alone, beside the time of whole steps.
//
//   kvant_cuda_step_bench llama-3.1-8b Q4_0 4bit [DEPTH [BATCH [DEVICE [ROWS [GRAPHS]]]]]
//
// ROWS: what comes back of each sequence: logits (default), greatest, or what a query finds: draw,
// top_k (40), near (what is up to 1 below the greatest) or top_p (0.9, of a row made steep).
// GRAPHS: whether dense operators are enqueued as CUDA graphs, pays (default: where the backend
// would), always or never. What a graph enqueues is one operator ("repeat") here. Random weights of
// a geometry that kvant knows. "alone" waits for the device after every operator: it includes
// launching and waiting, and so is more than an operator's share of a step.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/formats/spec.h"
#include "kvant/model/model.h"

namespace kvant {
namespace {

using backend::Backend;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

struct Cost {
  int64_t calls = 0;
  double us = 0;
};

// Passes everything on and takes the time.
class TimedBackend final : public Backend {
 public:
  explicit TimedBackend(Backend& inner) : inner_(inner) {}

  // With `alone`, waits after each operator.
  void start(bool alone) {
    alone_ = alone;
    costs_.clear();
  }
  const std::map<std::string, Cost>& costs() const { return costs_; }

  const backend::BackendInfo& info() const override { return inner_.info(); }
  MemoryResource& memory() override { return inner_.memory(); }
  Status supports(const formats::CacheFormat& format, int head_dim, int group) const override {
    return inner_.supports(format, head_dim, group);
  }
  int64_t workspace_bytes(const backend::WorkspaceNeeds& needs) const override {
    return inner_.workspace_bytes(needs);
  }
  Status reserve_workspace(const backend::WorkspaceNeeds& needs) override {
    return inner_.reserve_workspace(needs);
  }
  int64_t matrix_bytes(const backend::MatrixSource& source) const override {
    return inner_.matrix_bytes(source);
  }
  Result<std::unique_ptr<backend::Matrix>> load_matrix(
      const backend::MatrixSource& source) override {
    return inner_.load_matrix(source);
  }
  Status embed(const backend::MatrixSource& table, std::span<const int32_t> ids, float scale,
               void* out) override {
    return timed("embed", [&] { return inner_.embed(table, ids, scale, out); });
  }
  Status rms_norm(const backend::RmsNormArgs& args) override {
    return timed("rms_norm", [&] { return inner_.rms_norm(args); });
  }
  Status linear(const void* x, int64_t num_rows,
                std::span<const backend::LinearTarget> targets) override {
    int64_t outputs = 0;
    for (const backend::LinearTarget& target : targets) outputs += target.matrix->rows();
    const std::string name =
        "linear " + std::to_string(outputs) + " x " + std::to_string(targets[0].matrix->cols());
    return timed(name, [&] { return inner_.linear(x, num_rows, targets); });
  }
  Status norm_linear(const backend::RmsNormArgs& norm,
                     std::span<const backend::LinearTarget> targets) override {
    int64_t outputs = 0;
    for (const backend::LinearTarget& target : targets) outputs += target.matrix->rows();
    return timed("norm, linear " + std::to_string(outputs) + " x " + std::to_string(norm.dim),
                 [&] { return inner_.norm_linear(norm, targets); });
  }
  Status norm_gated(const backend::GatedArgs& args) override {
    return timed("norm, linear, gate " + std::to_string(2 * args.gate->rows()) + " x " +
                     std::to_string(args.norm.dim),
                 [&] { return inner_.norm_gated(args); });
  }
  Status rope(const backend::RopeArgs& args) override {
    return timed("rope", [&] { return inner_.rope(args); });
  }
  Status gate(backend::GateKind kind, const void* gate, const void* up, void* out,
              int64_t num_values) override {
    return timed("gate", [&] { return inner_.gate(kind, gate, up, out, num_values); });
  }
  Status add(const void* x, void* y, int64_t num_values) override {
    return timed("add", [&] { return inner_.add(x, y, num_values); });
  }
  Status moe(const backend::MoeArgs& args) override {
    return timed("moe", [&] { return inner_.moe(args); });
  }
  Status gather_rows(const void* x, std::span<const int64_t> rows, int dim, void* out) override {
    return timed("gather_rows", [&] { return inner_.gather_rows(x, rows, dim, out); });
  }
  Status greatest_in_rows(const void* x, int64_t num_rows, int64_t num_cols,
                          backend::RowMaximum* maxima) override {
    return timed("greatest",
                 [&] { return inner_.greatest_in_rows(x, num_rows, num_cols, maxima); });
  }
  Status answer_queries(const void* x, int64_t num_rows, int64_t num_cols,
                        const backend::RowQuery* queries,
                        const backend::RowAnswers& answers) override {
    return timed("queries",
                 [&] { return inner_.answer_queries(x, num_rows, num_cols, queries, answers); });
  }
  // The operators of a run that is enqueued one by one count for themselves.
  Status repeat(const backend::RepeatKey& key, const std::function<Status()>& enqueue) override {
    bool one_by_one = false;
    const Clock::time_point start = Clock::now();
    const Status done = inner_.repeat(key, [&] {
      one_by_one = true;
      return enqueue();
    });
    if (!one_by_one) count("repeat", start);
    return done;
  }
  Status append(const backend::AppendArgs& args) override {
    return timed(args.group_layer == 0 ? "append, first layer" : "append",
                 [&] { return inner_.append(args); });
  }
  Status rope_append(const backend::RopeArgs& rope, const backend::AppendArgs& args) override {
    return timed(args.group_layer == 0 ? "rope, append, first layer" : "rope, append",
                 [&] { return inner_.rope_append(rope, args); });
  }
  Result<formats::EncodeStats> take_encode_stats() override {
    return timed("encode stats", [&] { return inner_.take_encode_stats(); });
  }
  Status attention(const backend::AttentionArgs& args) override {
    return timed(args.group_layer == 0 ? "attention, first layer" : "attention",
                 [&] { return inner_.attention(args); });
  }
  Status download_f32(const void* activations, int64_t num_values, float* host) override {
    return timed("download", [&] { return inner_.download_f32(activations, num_values, host); });
  }
  Status upload_f32(const float* host, int64_t num_values, void* activations) override {
    return inner_.upload_f32(host, num_values, activations);
  }
  Status synchronize() override {
    return timed("synchronize", [&] { return inner_.synchronize(); });
  }

 private:
  template <typename F>
  std::invoke_result_t<F> timed(const std::string& name, F&& f) {
    const Clock::time_point start = Clock::now();
    auto result = f();
    count(name, start);
    return result;
  }
  void count(const std::string& name, Clock::time_point start) {
    if (alone_) static_cast<void>(inner_.synchronize());
    Cost& cost = costs_[name];
    cost.us += since(start);
    ++cost.calls;
  }

  Backend& inner_;
  bool alone_ = false;
  std::map<std::string, Cost> costs_;
};

struct Options {
  std::string model;
  std::string weights;
  std::string kv;
  int64_t depth = 0;
  int batch = 1;
  std::string device = "cuda";
  bool only_greatest = false;
  backend::RowQuery query = {};
  backend::Repetition repetition = backend::Repetition::kWherePays;
};

backend::RowQuery query_of(const std::string& rows) {
  using Kind = backend::RowQuery::Kind;
  if (rows == "draw") return {.kind = Kind::kDraw, .uniform = 0.7};
  if (rows == "top_k") return {.kind = Kind::kTopK, .top_k = 40};
  if (rows == "near") return {.kind = Kind::kNear, .below = -1};
  if (rows == "top_p") return {.kind = Kind::kTopP, .scale = 8, .top_p = 0.9};
  return {};
}

backend::Repetition repetition_of(const std::string& name) {
  if (name == "always") return backend::Repetition::kWherePossible;
  return name == "never" ? backend::Repetition::kNever : backend::Repetition::kWherePays;
}

class StepBench {
 public:
  StepBench(TimedBackend& backend, model::Model& model, cache::KvCache& cache)
      : backend_(backend), model_(model), cache_(cache) {}

  Status fill(int batch, int64_t depth) {
    std::vector<int32_t> tokens(512, 17);
    for (int i = 0; i < batch; ++i) {
      KVANT_ASSIGN(const auto id, cache_.add_sequence());
      ids_.push_back(id);
      for (int64_t at = 0; at < depth; at += 512) {
        const auto part =
            std::span(tokens).first(static_cast<size_t>(std::min<int64_t>(512, depth - at)));
        const model::ForwardSequence sequence = {id, part, 0};
        KVANT_TRY(model_.forward(std::span(&sequence, 1), cache_, ignore()));
      }
    }
    return {};
  }
  // Microseconds a step, each.
  Result<std::vector<double>> steps(int count, const Options& options) {
    const std::vector<int32_t> token(1, 17);
    std::vector<model::ForwardSequence> step;
    for (const auto id : ids_) {
      step.push_back({id, token, 1, options.only_greatest, std::span(&options.query, 1)});
    }
    std::vector<double> times;
    for (int i = 0; i < count; ++i) {
      const Clock::time_point start = Clock::now();
      KVANT_TRY(model_.forward(step, cache_, ignore()));
      times.push_back(since(start));
    }
    return times;
  }

 private:
  static model::RowsSink ignore() {
    return [](std::span<const model::LogitsRow>) { return Status(); };
  }
  TimedBackend& backend_;
  model::Model& model_;
  cache::KvCache& cache_;
  std::vector<cache::SequenceId> ids_;
};

void print(const TimedBackend& backend, const char* what, int steps) {
  double total = 0;
  std::printf("%s:\n", what);
  for (const auto& [name, cost] : backend.costs()) {
    std::printf("  %-28s %5.0f calls a step %9.1f us a step %8.2f us each\n", name.c_str(),
                static_cast<double>(cost.calls) / steps, cost.us / steps,
                cost.us / static_cast<double>(cost.calls));
    total += cost.us / steps;
  }
  std::printf("  %-28s %28.1f us\n", "all", total);
}

Status run(const Options& options) {
  constexpr int kSteps = 48;
  KVANT_ASSIGN(const auto inner,
               backend::create_backend({.name = options.device, .repetition = options.repetition}));
  TimedBackend backend(*inner);
  KVANT_ASSIGN(model::ModelConfig config, model::load_config(options.model));
  KVANT_ASSIGN(const auto type, model::parse_dummy_type(options.weights));
  KVANT_ASSIGN(auto source, model::ModelSource::dummy(std::move(config), type));
  model::RuntimeOptions runtime;
  KVANT_ASSIGN(runtime.format, formats::parse_cache_format(options.kv));
  runtime.context_tokens = options.depth + 4 * kSteps;
  runtime.max_sequences = options.batch;
  runtime.max_step_tokens = 512;
  runtime.max_logit_rows = options.batch;
  KVANT_ASSIGN(const auto model, model::Model::load(std::move(source), backend, {}));
  KVANT_TRY(model->reserve(runtime));
  KVANT_ASSIGN(const auto cache, model->create_cache(runtime));
  std::printf("%s, %s %s, kv %s, depth %lld, batch %d\n", inner->info().description.c_str(),
              options.model.c_str(), options.weights.c_str(), options.kv.c_str(),
              static_cast<long long>(options.depth), options.batch);

  StepBench bench(backend, *model, *cache);
  KVANT_TRY(bench.fill(options.batch, options.depth));
  KVANT_TRY(bench.steps(8, options));
  backend.start(false);
  KVANT_ASSIGN(std::vector<double> times, bench.steps(kSteps, options));
  std::sort(times.begin(), times.end());
  std::printf("step: median %.1f us, least %.1f, longest %.1f\n", times[times.size() / 2],
              times.front(), times.back());
  print(backend, "host", kSteps);
  backend.start(true);
  KVANT_TRY(bench.steps(kSteps, options));
  print(backend, "alone", kSteps);
  return {};
}

}  // namespace
}  // namespace kvant

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s GEOMETRY WEIGHTS KV [DEPTH [BATCH [DEVICE [ROWS [GRAPHS]]]]]\n",
                 argv[0]);
    return 64;
  }
  kvant::Options options{.model = argv[1], .weights = argv[2], .kv = argv[3]};
  if (argc > 4) options.depth = std::atoll(argv[4]);
  if (argc > 5) options.batch = std::atoi(argv[5]);
  if (argc > 6) options.device = argv[6];
  if (argc > 7) options.only_greatest = std::string(argv[7]) == "greatest";
  if (argc > 7) options.query = kvant::query_of(argv[7]);
  if (argc > 8) options.repetition = kvant::repetition_of(argv[8]);
  const kvant::Status done = kvant::run(options);
  if (!done) std::fprintf(stderr, "%s\n", done.error().message().c_str());
  return done ? 0 : 70;
}
