// Speed of the CPU backend's linear operators at the shapes of real models.
//
//   build/bench/kvant_linear_bench --benchmark_filter=Q4_1
//   build/bench/kvant_linear_bench --threads=1 --benchmark_filter=.../rows:1
//
// With one thread rates are per second of processor time, so that a busy machine disturbs them
// less. Matrices rotate over `--megabytes` (64) so that decode reads memory, not a cache; "floor"
// reads the same bytes with plain loads. Counters: bytes of repacked weights, multiply-accumulates.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/cpu/cpu_backend.h"
#include "kvant/backend/testing/random_matrix.h"

namespace kvant::backend {
namespace {

using formats::WeightType;

struct Options {
  int threads = 0;
  int64_t megabytes = 64;
};
Options options;

struct Shape {
  const char* name;
  int64_t rows;
  int64_t cols;
};

void require(const Status& status) {
  if (status) return;
  std::fprintf(stderr, "%s\n", status.error().message().c_str());
  std::exit(1);
}

std::unique_ptr<cpu::CpuBackend> make_backend(CpuLevel level, int64_t rows, int64_t cols) {
  cpu::CpuOptions cpu_options;
  cpu_options.num_threads = options.threads;
  cpu_options.level = level;
  auto backend = std::make_unique<cpu::CpuBackend>(cpu_options);
  WorkspaceNeeds needs;
  needs.max_rows = rows;
  needs.max_cols = static_cast<int>(cols);
  require(backend->reserve_workspace(needs));
  return backend;
}

void linear(benchmark::State& state, CpuLevel level, WeightType type, Shape shape,
            int64_t num_rows) {
  auto backend = make_backend(level, num_rows, shape.cols);
  const testing::RandomMatrix file = testing::random_matrix(type, shape.rows, shape.cols, 1);
  const int64_t matrix_bytes = backend->matrix_bytes(file.source());
  const int64_t copies = std::max<int64_t>(1, options.megabytes * 1000000 / matrix_bytes);
  std::vector<std::unique_ptr<Matrix>> matrices;
  for (int64_t i = 0; i < copies; ++i) {
    auto loaded = backend->load_matrix(file.source());
    if (!loaded) return state.SkipWithError(loaded.error().message().c_str());
    matrices.push_back(std::move(*loaded));
  }
  const std::vector<float> x = testing::random_activations(num_rows, shape.cols, 2);
  std::vector<float> out(static_cast<size_t>(num_rows * shape.rows));
  size_t next = 0;
  for (auto _ : state) {
    LinearTarget target;
    target.matrix = matrices[next].get();
    target.out = out.data();
    require(backend->linear(x.data(), num_rows, {&target, 1}));
    next = (next + 1) % matrices.size();
  }
  const double products = static_cast<double>(shape.rows * shape.cols * num_rows);
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(matrix_bytes) * iterations / 1e9,
                                              benchmark::Counter::kIsRate);
  state.counters["GMAC/s"] =
      benchmark::Counter(products * iterations / 1e9, benchmark::Counter::kIsRate);
}

// What the machine reads per second with the same threads: the floor of decode.
void read_floor(benchmark::State& state) {
  ThreadPool pool(options.threads);
  const int64_t words = options.megabytes * 1000000 / 8;
  const std::vector<uint64_t> data(static_cast<size_t>(words), 1);
  std::vector<uint64_t> sums(4096);
  constexpr int64_t kTaskWords = 65536;
  for (auto _ : state) {
    pool.parallel_for(words / kTaskWords, [&](int64_t task, int worker) {
      uint64_t sum[8] = {};
      const uint64_t* p = data.data() + task * kTaskWords;
      for (int64_t i = 0; i < kTaskWords; i += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
      }
      for (uint64_t s : sum) sums[static_cast<size_t>(worker) * 16] += s;
    });
    benchmark::DoNotOptimize(sums.data());
  }
  state.counters["GB/s"] = benchmark::Counter(
      static_cast<double>(words) * 8 * static_cast<double>(state.iterations()) / 1e9,
      benchmark::Counter::kIsRate);
}

void register_all() {
  constexpr Shape kShapes[] = {{"smollm2_up", 1536, 576}, {"smollm2_down", 576, 1536}};
  constexpr Shape kWide[] = {{"llama8b_up", 14336, 4096}};
  const auto use_clock = [](benchmark::internal::Benchmark* b) {
    b->Unit(benchmark::kMicrosecond);
    if (options.threads != 1) b->UseRealTime();
  };
  use_clock(benchmark::RegisterBenchmark("floor/read", read_floor));
  for (const CpuLevel level : kCpuLevels) {
    if (level > detect_cpu_level()) continue;
    for (const formats::WeightTypeInfo& info : formats::weight_types()) {
      const bool super = info.block_elements == 256;
      const std::span<const Shape> shapes = super ? std::span<const Shape>(kWide) : kShapes;
      for (const Shape& shape : shapes) {
        for (const int64_t rows : {1, 4, 96, 512}) {
          const std::string name = std::string(cpu_level_name(level)) + "/" +
                                   std::string(info.name) + "/" + shape.name +
                                   "/rows:" + std::to_string(rows);
          use_clock(
              benchmark::RegisterBenchmark(name.c_str(), linear, level, info.type, shape, rows));
        }
      }
    }
  }
}

// Takes --name=value out of the arguments.
void take_option(int& argc, char** argv, const char* name, int64_t& value) {
  const std::string prefix = std::string("--") + name + "=";
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], prefix.c_str(), prefix.size()) != 0) continue;
    value = std::atoll(argv[i] + prefix.size());
    for (int j = i; j + 1 < argc; ++j) argv[j] = argv[j + 1];
    --argc;
    --i;
  }
}

}  // namespace
}  // namespace kvant::backend

int main(int argc, char** argv) {
  using namespace kvant::backend;
  int64_t threads = 0;
  take_option(argc, argv, "threads", threads);
  take_option(argc, argv, "megabytes", options.megabytes);
  options.threads = static_cast<int>(threads);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  register_all();
  benchmark::RunSpecifiedBenchmarks();
}
