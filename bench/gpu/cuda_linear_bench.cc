// Time and bandwidth of matrix products on a device: each shape of Llama-3.1-8B and type of weight,
// for 1 to 2048 rows. Weights of several matrices are read in turn, more than caches hold.
//
// Usage: kvant_cuda_linear_bench [DEVICE [GEOMETRY [TYPE [ROWS [PART]]]]]   default: cuda, all
// types
//
// With a geometry that kvant knows, instead: the products of a layer and the head, norm and gate
// included, 1 to 2048 rows, each as a run that the device keeps; in microseconds, products of few
// rows (deterministic mode) / what the backend chooses by itself. ROWS and PART ("gate, up"): only
// the latter, of so many rows and this part, for a profiler.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/testing/random_matrix.h"
#include "kvant/model/config.h"

namespace kvant::backend {
namespace {

constexpr formats::WeightType kTypes[] = {
    formats::WeightType::kQ4_0, formats::WeightType::kQ4_K,    formats::WeightType::kQ6_K,
    formats::WeightType::kQ8_0, formats::WeightType::kF8_E4M3, formats::WeightType::kBF16};

struct Shape {
  int64_t rows;
  int64_t cols;
};

struct Case {
  formats::WeightType type;
  Shape shape;
};

class Bench {
 public:
  explicit Bench(Backend& backend) : backend_(backend) {
    WorkspaceNeeds needs;
    needs.max_rows = kMaxRows;
    needs.max_cols = 14336;
    backend_.reserve_workspace(needs).value();
    x_ = Buffer::create(backend_.memory(), kMaxRows * 14336 * 4, MemoryUse::kOther).value();
    out_ = Buffer::create(backend_.memory(), kMaxRows * 28672 * 4, MemoryUse::kOther).value();
    const std::vector<float> noise = testing::random_activations(16, 14336, 1);
    backend_.upload_f32(noise.data(), static_cast<int64_t>(noise.size()), x_.data()).value();
  }

  void run(const Case& c) {
    const testing::RandomMatrix random =
        testing::random_matrix(c.type, c.shape.rows, c.shape.cols, 1);
    std::vector<std::unique_ptr<Matrix>> matrices;
    do {
      matrices.push_back(backend_.load_matrix(random.source()).value());
    } while (matrices.size() * random.bytes.size() < kColdBytes);
    std::printf("%-5s %6lld x %-6lld", std::string(random.source().name).c_str(),
                static_cast<long long>(c.shape.rows), static_cast<long long>(c.shape.cols));
    for (const int64_t rows : {1, 4, 8, 16, 32, 512, 2048}) measure(matrices, rows);
    std::printf("\n");
  }

 private:
  static constexpr int64_t kMaxRows = 2048;
  static constexpr size_t kColdBytes = size_t{160} << 20;

  void measure(const std::vector<std::unique_ptr<Matrix>>& matrices, int64_t rows) {
    const auto once = [&] {
      for (const auto& matrix : matrices) {
        const LinearTarget target{matrix.get(), nullptr, out_.data(), false};
        backend_.linear(x_.data(), rows, {&target, 1}).value();
      }
    };
    once();
    backend_.synchronize().value();
    const int times = rows > 16 ? 3 : 20;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < times; ++i) once();
    backend_.synchronize().value();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    const double seconds = elapsed.count() / times / static_cast<double>(matrices.size());
    const double bytes = static_cast<double>(matrices[0]->memory_bytes());
    if (rows <= 16) {
      std::printf(" | %2lld: %6.1f us %4.0f GB/s", static_cast<long long>(rows), 1e6 * seconds,
                  bytes / seconds / 1e9);
    } else {
      const double flops = 2.0 * static_cast<double>(rows) *
                           static_cast<double>(matrices[0]->rows() * matrices[0]->cols());
      std::printf(" | %4lld: %6.1f us %3.0f T", static_cast<long long>(rows), 1e6 * seconds,
                  flops / seconds / 1e12);
    }
  }

  Backend& backend_;
  Buffer x_;
  Buffer out_;
};

// A product of a model: matrices over one input.
struct Part {
  std::string name;
  std::vector<int64_t> outputs;
  int64_t cols;
  enum Kind { kPlain, kNormed, kGated } kind;
};

// One backend's times of parts.
class PartBench {
 public:
  PartBench(const std::string& device, bool deterministic, int64_t max_cols, int64_t outputs) {
    BackendOptions options;
    options.name = device;
    options.deterministic = deterministic;
    options.repetition = Repetition::kWherePossible;
    backend_ = create_backend(options).value();
    WorkspaceNeeds needs;
    needs.max_rows = kMostRows;
    needs.max_cols = static_cast<int>(max_cols);
    backend_->reserve_workspace(needs).value();
    const auto make = [&](int64_t values) {
      return Buffer::create(backend_->memory(), 4 * values, MemoryUse::kOther).value();
    };
    x_ = make(kMostRows * max_cols);
    normed_ = make(kMostRows * max_cols);
    weight_ = make(max_cols);
    out_ = make(kMostRows * outputs);
    const std::vector<float> noise = testing::random_activations(kMostRows, max_cols, 1);
    backend_->upload_f32(noise.data(), kMostRows * max_cols, x_.data()).value();
    backend_->upload_f32(noise.data(), max_cols, weight_.data()).value();
  }

  void load(const Part& part, const std::vector<testing::RandomMatrix>& random, int copies) {
    part_ = part;
    copies_.clear();
    for (int copy = 0; copy < copies; ++copy) {
      copies_.emplace_back();
      for (const testing::RandomMatrix& matrix : random) {
        copies_.back().push_back(backend_->load_matrix(matrix.source()).value());
      }
    }
    ++loads_;
  }

  // Microseconds a part, the median of some runs over all copies.
  double measure(int64_t rows) {
    const auto once = [&] {
      return backend_->repeat({.owner = this, .part = loads_, .num_rows = rows}, [&]() -> Status {
        for (const auto& matrices : copies_) KVANT_TRY(enqueue(matrices, rows));
        return {};
      });
    };
    std::vector<double> times;
    for (int time = -6; time < 9; ++time) {  // kept from the fourth on
      const auto start = std::chrono::steady_clock::now();
      once().value();
      backend_->synchronize().value();
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      if (time >= 0) times.push_back(1e6 * elapsed.count() / static_cast<double>(copies_.size()));
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  static constexpr int64_t kMostRows = 2048;

 private:
  Status enqueue(const std::vector<std::unique_ptr<Matrix>>& matrices, int64_t rows) {
    const RmsNormArgs norm{x_.data(), weight_.as<float>(),          normed_.data(),
                           rows,      static_cast<int>(part_.cols), 1e-5f};
    float* out = out_.as<float>();
    if (part_.kind == Part::kGated) {
      return backend_->norm_gated({.norm = norm,
                                   .gate = matrices[0].get(),
                                   .up = matrices[1].get(),
                                   .out = out,
                                   .up_scratch = out + kMostRows * matrices[0]->rows()});
    }
    std::vector<LinearTarget> targets;
    for (const auto& matrix : matrices) {
      targets.push_back({matrix.get(), nullptr, out, part_.kind == Part::kPlain});
      out += kMostRows * matrix->rows();
    }
    return part_.kind == Part::kNormed ? backend_->norm_linear(norm, targets)
                                       : backend_->linear(x_.data(), rows, targets);
  }

  std::unique_ptr<Backend> backend_;
  Buffer x_, normed_, weight_, out_;
  Part part_;
  std::vector<std::vector<std::unique_ptr<Matrix>>> copies_;
  int64_t loads_ = 0;
};

struct Only {
  std::string type;
  int64_t rows = 0;
  std::string part;
};

void run_geometry(const std::string& device, const model::ModelConfig& config, const Only& only) {
  const int64_t dim = config.dim;
  const int64_t q = int64_t{config.num_query_heads} * config.head_dim;
  const int64_t kv = int64_t{config.num_kv_heads} * config.head_dim;
  const std::vector<Part> parts = {
      {"q, k, v", {q, kv, kv}, dim, Part::kNormed},
      {"output", {dim}, q, Part::kPlain},
      {"gate, up", {config.ffn_dim, config.ffn_dim}, dim, Part::kGated},
      {"down", {dim}, config.ffn_dim, Part::kPlain},
      {"head", {config.vocab_size}, dim, Part::kNormed}};
  const int64_t outputs = std::max<int64_t>(config.vocab_size, 2 * config.ffn_dim);
  const int64_t cols = std::max<int64_t>({dim, q, config.ffn_dim});
  PartBench few(device, true, cols, outputs);
  PartBench chosen(device, false, cols, outputs);
  for (const formats::WeightType type : kTypes) {
    if (!only.type.empty() && formats::weight_type_name(type) != only.type) continue;
    for (const Part& part : parts) {
      if (!only.part.empty() && part.name != only.part) continue;
      if (part.cols % formats::weight_type_info(type).block_elements != 0) continue;
      std::vector<testing::RandomMatrix> random;
      size_t bytes = 0;
      for (const int64_t rows : part.outputs) {
        random.push_back(testing::random_matrix(type, rows, part.cols, 1));
        bytes += random.back().bytes.size();
      }
      const int copies = static_cast<int>(std::min<size_t>(100, (size_t{120} << 20) / bytes + 1));
      if (only.rows == 0) few.load(part, random, copies);
      chosen.load(part, random, copies);
      std::printf("%-5s %-8s", std::string(random[0].source().name).c_str(), part.name.c_str());
      if (only.rows > 0) {
        std::printf(" | %lld: %.1f\n", static_cast<long long>(only.rows),
                    chosen.measure(only.rows));
        continue;
      }
      for (const int64_t rows : {1, 4, 8, 9, 16, 32, 48, 64, 96, 128, 256, 512, 2048}) {
        std::printf(" | %lld: %.1f/%.1f", static_cast<long long>(rows), few.measure(rows),
                    chosen.measure(rows));
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}

int main_of(const std::string& device, const std::string& geometry, const Only& only) {
  BackendOptions options;
  options.name = device;
  auto backend = create_backend(options);
  if (!backend) {
    std::fprintf(stderr, "%s\n", backend.error().message().c_str());
    return 69;
  }
  std::printf("%s\n", (*backend)->info().description.c_str());
  if (!geometry.empty()) {
    const auto config = model::load_config(geometry);
    if (!config) {
      std::fprintf(stderr, "%s\n", config.error().message().c_str());
      return 64;
    }
    run_geometry(device, *config, only);
    return 0;
  }
  Bench bench(**backend);
  for (const formats::WeightType type : kTypes) {
    if (!only.type.empty() && formats::weight_type_name(type) != only.type) continue;
    for (const Shape shape : {Shape{1024, 4096}, {4096, 4096}, {14336, 4096}, {4096, 14336}}) {
      bench.run({type, shape});
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvant::backend

int main(int argc, char** argv) {
  return kvant::backend::main_of(argc > 1 ? argv[1] : "cuda", argc > 2 ? argv[2] : "",
                                 {.type = argc > 3 ? argv[3] : "",
                                  .rows = argc > 4 ? std::atoll(argv[4]) : 0,
                                  .part = argc > 5 ? argv[5] : ""});
}
