// Time and bandwidth of matrix products on a device: each shape of Llama-3.1-8B and type of weight,
// for 1 to 2048 rows. Weights of several matrices are read in turn, more than caches hold.
//
// Usage: kvant_cuda_linear_bench [DEVICE]      default: cuda

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/testing/random_matrix.h"

namespace kvant::backend {
namespace {

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

int main_of(const std::string& device) {
  BackendOptions options;
  options.name = device;
  auto backend = create_backend(options);
  if (!backend) {
    std::fprintf(stderr, "%s\n", backend.error().message().c_str());
    return 69;
  }
  std::printf("%s\n", (*backend)->info().description.c_str());
  Bench bench(**backend);
  using formats::WeightType;
  for (const WeightType type : {WeightType::kQ4_0, WeightType::kQ4_K, WeightType::kQ6_K,
                                WeightType::kQ8_0, WeightType::kBF16}) {
    for (const Shape shape : {Shape{1024, 4096}, {4096, 4096}, {14336, 4096}, {4096, 14336}}) {
      bench.run({type, shape});
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvant::backend

int main(int argc, char** argv) {
  return kvant::backend::main_of(argc > 1 ? argv[1] : "cuda");
}
