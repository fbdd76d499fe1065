// Every dense operator on the device against the reference backend (exact weights, sums in double),
// on odd sizes.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "kvant/backend/cuda/dense/decoded_product.h"
#include "kvant/backend/cuda/dense/linear.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"
#include "kvant/backend/reference/reference_backend.h"
#include "kvant/backend/testing/hard_rows.h"
#include "kvant/backend/testing/random_matrix.h"

namespace kvant::backend::cuda {
namespace {

using backend::testing::random_activations;
using backend::testing::random_matrix;
using backend::testing::RandomMatrix;
using formats::WeightType;
using formats::WeightTypeInfo;
using Floats = std::vector<float>;

WorkspaceNeeds small_needs() {
  WorkspaceNeeds needs;
  needs.max_rows = 100;
  needs.max_cols = 1024;
  needs.head_dim = 128;
  needs.num_experts = 6;
  needs.num_experts_used = 3;
  needs.expert_dim = 64;
  return needs;
}

std::unique_ptr<Backend> make_cuda(bool deterministic) {
  BackendOptions options;
  options.name = "cuda";
  options.deterministic = deterministic;
  auto backend = create_backend(options);
  EXPECT_TRUE(backend) << (backend ? "" : backend.error().message());
  if (!backend) return nullptr;
  EXPECT_TRUE((*backend)->reserve_workspace(small_needs()));
  return std::move(*backend);
}

// Values in the backend's memory; with a size of 0 a null pointer.
class Values {
 public:
  Values(Backend& backend, const Floats& values)
      : backend_(backend), size_(static_cast<int64_t>(values.size())) {
    if (size_ == 0) return;
    auto buffer = Buffer::create(backend.memory(), 4 * size_, MemoryUse::kOther);
    EXPECT_TRUE(buffer);
    buffer_ = std::move(*buffer);
    EXPECT_TRUE(backend.upload_f32(values.data(), size_, buffer_.data()));
  }
  float* data() { return buffer_.as<float>(); }
  Floats get() {
    Floats out(static_cast<size_t>(size_));
    EXPECT_TRUE(backend_.download_f32(buffer_.data(), size_, out.data()));
    return out;
  }

 private:
  Backend& backend_;
  int64_t size_;
  Buffer buffer_;
};

double relative_error(const Floats& a, const Floats& b) {
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

class CudaDense : public ::testing::Test {
 protected:
  // f runs one operator and returns what it wrote.
  void compare(double tolerance, const std::function<Floats(Backend&)>& f) {
    const Floats expected = f(reference_);
    const Floats found = f(*cuda_);
    ASSERT_EQ(found.size(), expected.size());
    EXPECT_LE(relative_error(found, expected), tolerance);
  }
  void SetUp() override {
    const std::string reason = testing::no_device_reason();
    if (!reason.empty()) GTEST_SKIP() << reason;
    cuda_ = make_cuda(false);
    deterministic_ = make_cuda(true);
    ASSERT_TRUE(cuda_ != nullptr && deterministic_ != nullptr);
  }
  std::unique_ptr<Backend> cuda_;
  std::unique_ptr<Backend> deterministic_;
  reference::ReferenceBackend reference_{1, 0};
};

TEST_F(CudaDense, RmsNorm) {
  for (const int dim : {1, 33, 64, 128, 576, 1000, 4096}) {
    for (const int rows : {1, 7, 40}) {
      const Floats x = random_activations(rows, dim, 1);
      const Floats weight = random_activations(1, dim, 2);
      compare(1e-6, [&](Backend& backend) {
        Values in(backend, x);
        Values w(backend, weight);
        EXPECT_TRUE(backend.rms_norm({in.data(), w.data(), in.data(), rows, dim, 1e-5f}));
        return in.get();
      });
    }
  }
}

TEST_F(CudaDense, Rope) {
  Floats factors(48);
  for (size_t i = 0; i < factors.size(); ++i) factors[i] = 1.0f + 0.25f * static_cast<float>(i);
  const std::vector<int64_t> positions = {0, 1, 77, 8191, 1000003};
  for (const int rotary : {64, 96}) {
    const Floats q = random_activations(5 * 3, 96, 3);
    const Floats k = random_activations(5 * 2, 96, 4);
    compare(1e-6, [&](Backend& backend) {
      Values queries(backend, q);
      Values keys(backend, k);
      Values device_factors(backend, factors);
      RopeArgs args;
      args.q = queries.data();
      args.k = keys.data();
      args.positions = positions.data();
      args.num_rows = 5;
      args.num_query_heads = 3;
      args.num_kv_heads = 2;
      args.head_dim = 96;
      args.rope.rotary_dim = rotary;
      args.rope.base = 5e5f;
      args.rope.position_scale = 0.125f;
      args.rope.frequency_factors = rotary == 96 ? device_factors.data() : nullptr;
      args.rope.attention_factor = 1.25f;
      EXPECT_TRUE(backend.rope(args));
      Floats out = queries.get();
      const Floats rotated = keys.get();
      out.insert(out.end(), rotated.begin(), rotated.end());
      return out;
    });
  }
}

// Tables are kept between calls: other positions and settings must not see old ones.
TEST_F(CudaDense, RopeFollowsPositionsAndSettings) {
  const Floats q = random_activations(3, 64, 5);
  const auto check = [&](float base, std::vector<int64_t> positions) {
    compare(1e-6, [&](Backend& backend) {
      Values queries(backend, q);
      RopeArgs args;
      args.q = queries.data();
      args.positions = positions.data();
      args.num_rows = static_cast<int64_t>(positions.size());
      args.num_query_heads = 1;
      args.head_dim = 64;
      args.rope.rotary_dim = 64;
      args.rope.base = base;
      EXPECT_TRUE(backend.rope(args));
      return queries.get();
    });
  };
  check(1e4f, {0, 1, 2});
  check(1e6f, {0, 1, 2});
  check(1e5f, {0, 1, 2});
  check(1e4f, {4});
  check(1e4f, {4, 7, 9});
}

TEST_F(CudaDense, Gates) {
  Floats gate;
  for (float v = -120.0f; v < 120.0f; v += 0.37f) gate.push_back(v);
  const Floats up = random_activations(1, static_cast<int64_t>(gate.size()), 6);
  for (const GateKind kind : {GateKind::kSilu, GateKind::kGeluTanh}) {
    compare(1e-6, [&](Backend& backend) {
      Values g(backend, gate);
      Values u(backend, up);
      EXPECT_TRUE(backend.gate(kind, g.data(), u.data(), g.data(), int64_t(gate.size())));
      return g.get();
    });
  }
}

TEST_F(CudaDense, AddAndGatherRows) {
  const Floats x = random_activations(40, 999, 7);
  const Floats y = random_activations(40, 999, 8);
  compare(0.0, [&](Backend& backend) {
    Values a(backend, x);
    Values b(backend, y);
    EXPECT_TRUE(backend.add(a.data(), b.data(), int64_t(x.size())));
    return b.get();
  });
  const std::vector<int64_t> rows = {39, 0, 7, 7};
  compare(0.0, [&](Backend& backend) {
    Values a(backend, x);
    Values out(backend, Floats(4 * 999));
    EXPECT_TRUE(backend.gather_rows(a.data(), rows, 999, out.data()));
    return out.get();
  });
}

TEST_F(CudaDense, GreatestInRows) {
  for (const int64_t cols : {1, 3, 16, 17, 1000, 1023, 1024, 4100, 49152, 151936, 151937}) {
    const backend::testing::HardRows rows = backend::testing::hard_rows(cols);
    const std::vector<RowMaximum> expected = rows.maxima();
    Values x(*cuda_, rows.values);
    const int64_t bytes = rows.num_rows * int64_t{sizeof(RowMaximum)};
    auto buffer = Buffer::create(cuda_->memory(), bytes, MemoryUse::kTables);
    ASSERT_TRUE(buffer);
    auto* found = buffer->as<RowMaximum>();
    ASSERT_TRUE(cuda_->greatest_in_rows(x.data(), rows.num_rows, cols, found));
    ASSERT_TRUE(cuda_->synchronize());
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(found[i].index, expected[i].index) << cols << ", row " << i;
      EXPECT_EQ(found[i].value, expected[i].value) << cols << ", row " << i;
    }
  }
}

// A run that is enqueued as a whole does what its operators do, for each key its own; one that
// cannot be (it waits) is enqueued as it is.
TEST_F(CudaDense, RepeatedRuns) {
  BackendOptions options;
  options.name = "cuda";
  options.repetition = Repetition::kWherePossible;
  auto kept = create_backend(options);
  ASSERT_TRUE(kept);
  WorkspaceNeeds needs = small_needs();
  needs.num_experts = 0;  // models with experts keep none
  ASSERT_TRUE((*kept)->reserve_workspace(needs));
  const RandomMatrix matrix = random_matrix(WeightType::kQ4_K, 77, 512, 31);
  const Floats weight = random_activations(1, 512, 32);
  Values w(**kept, weight);
  const auto loaded = (*kept)->load_matrix(matrix.source());
  ASSERT_TRUE(loaded);
  const auto plain = cuda_->load_matrix(matrix.source());
  ASSERT_TRUE(plain);
  Values plain_w(*cuda_, weight);
  int enqueued = 0;
  for (const int64_t rows : {1, 5, 40}) {
    Values x(**kept, Floats(static_cast<size_t>(rows * 512)));
    Values out(**kept, Floats(static_cast<size_t>(rows * 77)));
    for (int time = 0; time < 8; ++time) {
      const Floats input = random_activations(rows, 512, 33 + static_cast<uint32_t>(time));
      ASSERT_TRUE((*kept)->upload_f32(input.data(), rows * 512, x.data()));
      const auto run = [&](Backend& backend, const Matrix& m, float* in, float* norm, float* to) {
        const LinearTarget target{.matrix = &m, .out = to};
        const RmsNormArgs args{in, norm, in, rows, 512, 1e-5f};
        return backend.norm_linear(args, std::span(&target, 1));
      };
      ASSERT_TRUE((*kept)->repeat({.owner = this, .part = 1, .num_rows = rows}, [&] {
        ++enqueued;
        return run(**kept, **loaded, x.data(), w.data(), out.data());
      }));
      Values plain_x(*cuda_, input);
      Values plain_out(*cuda_, Floats(static_cast<size_t>(rows * 77)));
      ASSERT_TRUE(run(*cuda_, **plain, plain_x.data(), plain_w.data(), plain_out.data()));
      EXPECT_TRUE(same_bits(out.get(), plain_out.get())) << rows << " rows, time " << time;
    }
  }
  EXPECT_LT(enqueued, 3 * 8 - 6) << "runs are kept";
  int waits = 0;
  for (int time = 0; time < 8; ++time) {
    ASSERT_TRUE((*kept)->repeat({.owner = this, .part = 2, .num_rows = 1}, [&] {
      ++waits;
      return (*kept)->synchronize();
    }));
  }
  EXPECT_GE(waits, 8);
  EXPECT_FALSE((*kept)->repeat({.owner = this, .part = 3, .num_rows = 1},
                               [] { return Status(Error(ErrorCode::kInternal, "no")); }));
}

TEST_F(CudaDense, Embed) {
  std::vector<int32_t> order(50);
  std::iota(order.rbegin(), order.rend(), 0);
  for (const WeightTypeInfo& info : formats::weight_types()) {
    const RandomMatrix table = random_matrix(info.type, 50, 256, 9);
    const std::vector<int32_t> ids = {0, 49, 3, 3};
    for (const bool reordered : {false, true}) {
      compare(0.0, [&](Backend& backend) {
        MatrixSource source = table.source();
        if (reordered) source.row_order = order;
        Values out(backend, Floats(4 * 256));
        EXPECT_TRUE(backend.embed(source, ids, 1.5f, out.data()));
        return out.get();
      });
    }
  }
}

struct Product {
  const RandomMatrix& matrix;
  const Floats& x;
  const Floats* bias = nullptr;
  std::vector<int32_t> order = {};
  bool accumulate = false;

  int64_t num_rows() const { return static_cast<int64_t>(x.size()) / matrix.cols; }
  Floats run(Backend& backend) const {
    MatrixSource source = matrix.source();
    source.row_order = order;
    auto loaded = backend.load_matrix(source);
    EXPECT_TRUE(loaded) << (loaded ? "" : loaded.error().message());
    EXPECT_EQ((*loaded)->memory_bytes(), backend.matrix_bytes(source));
    Values in(backend, x);
    Values b(backend, bias != nullptr ? *bias : Floats());
    Values out(backend, Floats(static_cast<size_t>(num_rows() * matrix.rows), 0.5f));
    LinearTarget target{loaded->get(), b.data(), out.data(), accumulate};
    const Status done = backend.linear(in.data(), num_rows(), {&target, 1});
    EXPECT_TRUE(done) << (done ? "" : done.error().message());
    return out.get();
  }
};

// An output's error against the norm of the products it sums, which cancellation leaves out of
// account; the root of the mean over all outputs.
double product_error(const Product& product, const Floats& found, const Floats& expected) {
  const Floats w = product.matrix.values();
  const int64_t cols = product.matrix.cols;
  double difference = 0;
  double norm = 0;
  for (size_t at = 0; at < found.size(); ++at) {
    const auto row = static_cast<int64_t>(at) / product.matrix.rows;
    auto output = static_cast<int64_t>(at) % product.matrix.rows;
    if (!product.order.empty()) output = product.order[static_cast<size_t>(output)];
    const double d = static_cast<double>(found[at]) - static_cast<double>(expected[at]);
    difference += d * d;
    for (int64_t i = 0; i < cols; ++i) {
      const double term = static_cast<double>(w[static_cast<size_t>(output * cols + i)]) *
                          static_cast<double>(product.x[static_cast<size_t>(row * cols + i)]);
      norm += term * term;
    }
  }
  return std::sqrt(difference / norm);
}

std::vector<int64_t> widths(const WeightTypeInfo& info) {
  if (info.block_elements == 1) return {1, 33, 576};
  if (info.block_elements == 32) return {32, 576, 896};
  return {256, 768};
}

class CudaLinearTest : public CudaDense {
 protected:
  void check(double tolerance, const Product& product) {
    EXPECT_LE(product_error(product, product.run(*cuda_), product.run(reference_)), tolerance);
  }
};

// The products of few rows are as exact as 16-bit activations: 2^-17 a value with float weights,
// 2^-16 of the largest of a block of 32 with the others. Few outputs do not average that out.
double few_rows_tolerance(WeightType type, int64_t outputs) {
  if (formats::weight_type_info(type).block_elements == 1) return 2e-5;
  return outputs < 32 ? 2e-4 : 8e-5;
}

// Beyond that: products that decode weights round weights and activations to FP16 (2^-12, and 2^-12
// of the largest scale and offset of a block), others to BF16, each to within 2^-8; few terms do
// not average out.
double many_rows_tolerance(WeightType type) {
  return has_decoded_product(type) ? 1.2e-3 : 7e-3;
}

// How many rows that are on the device at hand.
bool are_many_rows(WeightType type, int64_t num_rows) {
  if (type == WeightType::kBF16) return num_rows > 16;
  return num_rows > (has_decoded_product(type) ? 8 : 64);
}

TEST_F(CudaLinearTest, FewRows) {
  for (const WeightTypeInfo& info : formats::weight_types()) {
    for (const int64_t cols : widths(info)) {
      for (const int64_t rows : {1, 45, 320}) {
        const RandomMatrix matrix = random_matrix(info.type, rows, cols, 10);
        for (const int64_t num_rows : {1, 3, 8, 9, 16, 27, 50, 64}) {
          if (info.type == WeightType::kBF16 && num_rows > 16) continue;
          const Floats x = random_activations(num_rows, cols, 11);
          SCOPED_TRACE(std::string(info.name) + " " + std::to_string(rows) + " x " +
                       std::to_string(cols) + ", rows " + std::to_string(num_rows));
          const Product product{matrix, x};
          Backend& exact = are_many_rows(info.type, num_rows) ? *deterministic_ : *cuda_;
          EXPECT_LE(product_error(product, product.run(exact), product.run(reference_)),
                    few_rows_tolerance(info.type, rows));
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, ManyRows) {
  for (const WeightTypeInfo& info : formats::weight_types()) {
    for (const int64_t cols : widths(info)) {
      for (const int64_t rows : {1, 45, 320}) {
        const RandomMatrix matrix = random_matrix(info.type, rows, cols, 12);
        for (const int64_t num_rows : {9, 16, 27, 50, 64, 65, 100, 133, 300}) {
          if (!are_many_rows(info.type, num_rows)) continue;
          const Floats x = random_activations(num_rows, cols, 13);
          SCOPED_TRACE(std::string(info.name) + " " + std::to_string(rows) + " x " +
                       std::to_string(cols) + ", rows " + std::to_string(num_rows));
          check(many_rows_tolerance(info.type), Product{matrix, x});
        }
      }
    }
  }
}

// One input alone: the weight itself, every code of E4M3 with every scale, exactly, but rounded to
// BF16 where cuBLASLt multiplies.
TEST_F(CudaLinearTest, EveryCodeOfE4m3) {
  constexpr int64_t kRows = 37;
  constexpr int64_t kCols = 256;
  RandomMatrix matrix = random_matrix(WeightType::kF8_E4M3, kRows, kCols, 70);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      const int64_t code = (col + 5 * row) % 256;
      matrix.bytes[static_cast<size_t>(row * (4 + kCols) + 4 + col)] =
          static_cast<std::byte>(code % 128 == 127 ? code - 1 : code);
    }
  }
  const Floats w = matrix.values();
  for (const int64_t num_rows : {1, 16, 64, 128}) {
    for (int64_t first = 0; first < kCols; first += num_rows) {
      Floats x(static_cast<size_t>(num_rows * kCols));
      for (int64_t i = 0; i < num_rows; ++i) x[static_cast<size_t>(i * kCols + first + i)] = 1.0f;
      const Floats out = Product{matrix, x}.run(*cuda_);
      for (int64_t i = 0; i < num_rows; ++i) {
        for (int64_t row = 0; row < kRows; ++row) {
          const float value = w[static_cast<size_t>(row * kCols + first + i)];
          ASSERT_EQ(out[static_cast<size_t>(i * kRows + row)],
                    num_rows > 64 && !has_decoded_product(WeightType::kF8_E4M3)
                        ? from_bf16(to_bf16(value))
                        : value)
              << num_rows << " rows, input " << first + i << ", output " << row;
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, BiasOrderAndSum) {
  std::vector<int32_t> order(45);
  std::iota(order.rbegin(), order.rend(), 0);
  const Floats bias = random_activations(1, 45, 14);
  for (const WeightType type :
       {WeightType::kQ4_K, WeightType::kQ8_0, WeightType::kBF16, WeightType::kF8_E4M3}) {
    const RandomMatrix matrix = random_matrix(type, 45, 512, 15);
    for (const int64_t num_rows : {2, 70}) {
      const Floats x = random_activations(num_rows, 512, 16);
      for (const bool accumulate : {false, true}) {
        SCOPED_TRACE(num_rows);
        check(num_rows == 2 ? few_rows_tolerance(type, 90) : many_rows_tolerance(type),
              Product{matrix, x, &bias, order, accumulate});
      }
    }
  }
}

// Where products of few rows give way to others on 132 multiprocessors: the last number of rows
// without and with products that decode weights.
TEST_F(CudaDense, WhereFewRowsEnd) {
  struct Case {
    WeightType type;
    int64_t outputs, cols, last, last_of_decoded;
  };
  CudaLinear linear, deterministic;
  ASSERT_TRUE(linear.create(132, false));
  ASSERT_TRUE(deterministic.create(132, true));
  for (const Case& c : {Case{WeightType::kQ4_0, 576, 576, 64, 64},
                        {WeightType::kQ8_0, 3072, 576, 64, 32},
                        {WeightType::kQ8_0, 8192, 576, 32, 16},
                        {WeightType::kQ8_0, 9728, 896, 48, 16},
                        {WeightType::kQ4_K, 9728, 1280, 64, 16},
                        {WeightType::kF8_E4M3, 8192, 576, 32, 16},
                        {WeightType::kBF16, 4864, 896, 16, 16},
                        {WeightType::kBF16, 16384, 896, 8, 8},
                        {WeightType::kBF16, 2048, 4096, 8, 8}}) {
    const auto matrix = cuda_->load_matrix(random_matrix(c.type, c.outputs, c.cols, 29).source());
    ASSERT_TRUE(matrix);
    const LinearTarget target = {.matrix = matrix->get()};
    const int64_t last = has_decoded_product(c.type) ? c.last_of_decoded : c.last;
    SCOPED_TRACE(std::to_string(c.outputs) + " x " + std::to_string(c.cols));
    for (int64_t rows = 1; rows < 100; ++rows) {
      EXPECT_EQ(linear.rounds(rows, {&target, 1}), rows > last) << rows;
      EXPECT_FALSE(deterministic.rounds(rows, {&target, 1}));
    }
  }
}

// Three targets of two types over one input, as queries, keys and values are.
TEST_F(CudaDense, LinearTargetsShareTheirInput) {
  const RandomMatrix a = random_matrix(WeightType::kQ4_K, 100, 256, 17);
  const RandomMatrix b = random_matrix(WeightType::kQ4_K, 33, 256, 18);
  const RandomMatrix c = random_matrix(WeightType::kQ6_K, 70, 256, 19);
  for (const int64_t num_rows : {1, 70}) {
    const Floats x = random_activations(num_rows, 256, 20);
    compare(num_rows == 1 ? 6e-5 : 5e-3, [&](Backend& backend) {
      std::vector<std::unique_ptr<Matrix>> matrices;
      std::vector<std::unique_ptr<Values>> outs;
      std::vector<LinearTarget> targets;
      for (const RandomMatrix* matrix : {&a, &b, &c}) {
        auto loaded = backend.load_matrix(matrix->source());
        EXPECT_TRUE(loaded);
        matrices.push_back(std::move(*loaded));
        outs.push_back(std::make_unique<Values>(
            backend, Floats(static_cast<size_t>(num_rows * matrix->rows))));
        targets.push_back({matrices.back().get(), nullptr, outs.back()->data(), false});
      }
      Values in(backend, x);
      EXPECT_TRUE(backend.linear(in.data(), num_rows, targets));
      Floats all;
      for (auto& out : outs) {
        const Floats part = out->get();
        all.insert(all.end(), part.begin(), part.end());
      }
      return all;
    });
  }
}

// A gate and what it is for over normed rows.
struct Gated {
  RandomMatrix gate;
  RandomMatrix up;
  Floats x;
  Floats weight;

  Gated(WeightType type, int64_t outputs, const Floats& rows, const Floats& norm_weight)
      : gate(random_matrix(type, outputs, static_cast<int64_t>(norm_weight.size()), 23)),
        up(random_matrix(type, outputs, static_cast<int64_t>(norm_weight.size()), 24)),
        x(rows),
        weight(norm_weight) {}

  Floats run(Backend& backend) const {
    const int64_t num_rows = static_cast<int64_t>(x.size() / weight.size());
    auto gate_matrix = backend.load_matrix(gate.source());
    auto up_matrix = backend.load_matrix(up.source());
    EXPECT_TRUE(gate_matrix && up_matrix);
    Values in(backend, x);
    Values w(backend, weight);
    Values normed(backend, Floats(x.size()));
    const auto size = static_cast<size_t>(num_rows * gate.rows);
    Values out(backend, Floats(size));
    Values scratch(backend, Floats(size));
    Values plain(backend, Floats(size, 0.25f));
    const RmsNormArgs norm = {
        in.data(), w.data(), normed.data(), num_rows, static_cast<int>(weight.size()), 1e-5f};
    GatedArgs args;
    args.norm = norm;
    args.kind = GateKind::kGeluTanh;
    args.gate = gate_matrix->get();
    args.up = up_matrix->get();
    args.out = out.data();
    args.up_scratch = scratch.data();
    EXPECT_TRUE(backend.norm_gated(args));
    LinearTarget target{up_matrix->get(), nullptr, plain.data(), true};
    EXPECT_TRUE(backend.norm_linear(norm, {&target, 1}));
    Floats all = out.get();
    const Floats more = plain.get();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
};

TEST_F(CudaDense, NormedProductsAndGates) {
  for (const WeightType type : {WeightType::kQ4_0, WeightType::kQ4_K, WeightType::kQ6_K,
                                WeightType::kQ8_0, WeightType::kBF16, WeightType::kF8_E4M3}) {
    for (const int64_t dim : {256, 1024}) {
      const Floats weight = random_activations(1, dim, 25);
      for (const int64_t rows : {1, 3, 4, 5, 8, 11, 50, 70}) {
        SCOPED_TRACE(rows);
        const Gated gated(type, 77, random_activations(rows, dim, 26), weight);
        compare(!are_many_rows(type, rows)  ? 3e-4
                : has_decoded_product(type) ? 2e-3
                                            : 1e-2,
                [&](Backend& backend) { return gated.run(backend); });
      }
    }
  }
}

// Products of every size of items and of clusters, against exact ones on the device.
TEST_F(CudaDense, LargeProducts) {
  WorkspaceNeeds needs = small_needs();
  needs.max_rows = 601;
  needs.max_cols = 4096;
  ASSERT_TRUE(cuda_->reserve_workspace(needs));
  ASSERT_TRUE(deterministic_->reserve_workspace(needs));
  for (const WeightType type : {WeightType::kQ4_K, WeightType::kQ6_K, WeightType::kF8_E4M3}) {
    for (const auto& [outputs, dim] : {std::pair{1100, 4096}, std::pair{4090, 1024}}) {
      const Floats weight = random_activations(1, dim, 45);
      for (const int64_t rows : {20, 64, 100, 200, 400, 601}) {
        SCOPED_TRACE(std::to_string(outputs) + " x " + std::to_string(dim) + ", rows " +
                     std::to_string(rows));
        const Gated gated(type, outputs, random_activations(rows, dim, 46), weight);
        EXPECT_LE(relative_error(gated.run(*cuda_), gated.run(*deterministic_)),
                  has_decoded_product(type) ? 1e-3 : 1e-2);
      }
    }
  }
}

// Many rows: what shares launches has the bits that it has by itself.
TEST_F(CudaDense, ManyRowsTogetherHaveTheBitsOfEach) {
  for (const auto& types : std::vector<std::vector<WeightType>>{
           {WeightType::kQ4_0, WeightType::kQ4_0, WeightType::kQ4_0},
           {WeightType::kQ6_K, WeightType::kQ6_K, WeightType::kQ8_0},
           {WeightType::kF16, WeightType::kBF16, WeightType::kBF16},
           {WeightType::kQ4_K, WeightType::kQ8_0, WeightType::kQ4_K},
           {WeightType::kF8_E4M3, WeightType::kF8_E4M3, WeightType::kBF16}}) {
    for (const int64_t dim : {256, 768, 1024}) {
      const int64_t rows = 71;
      const Floats input = random_activations(rows, dim, 41);
      Values x(*cuda_, input);
      Values normed(*cuda_, input);
      Values weight(*cuda_, random_activations(1, dim, 42));
      const RmsNormArgs norm = {x.data(), weight.data(), normed.data(), rows, int(dim), 1e-5f};
      std::vector<std::unique_ptr<Matrix>> matrices;
      std::vector<Values> together, apart;
      std::vector<LinearTarget> targets;
      for (size_t i = 0; i < types.size(); ++i) {
        const int64_t outputs = 33 + 40 * static_cast<int64_t>(i);
        auto matrix = cuda_->load_matrix(
            random_matrix(types[i], outputs, dim, 43 + static_cast<uint32_t>(i)).source());
        ASSERT_TRUE(matrix);
        matrices.push_back(std::move(*matrix));
        together.emplace_back(*cuda_, Floats(static_cast<size_t>(rows * outputs)));
        apart.emplace_back(*cuda_, Floats(static_cast<size_t>(rows * outputs)));
      }
      for (size_t i = 0; i < types.size(); ++i) {
        targets.push_back({.matrix = matrices[i].get(), .out = together[i].data()});
      }
      ASSERT_TRUE(cuda_->norm_linear(norm, targets));
      ASSERT_TRUE(cuda_->rms_norm(norm));
      for (size_t i = 0; i < types.size(); ++i) {
        const LinearTarget target = {.matrix = matrices[i].get(), .out = apart[i].data()};
        ASSERT_TRUE(cuda_->linear(normed.data(), rows, std::span(&target, 1)));
        EXPECT_TRUE(same_bits(together[i].get(), apart[i].get())) << dim << ", target " << i;
      }
    }
  }
}

TEST_F(CudaDense, DeterministicNormedRowsDoNotSeeTheirNeighbours) {
  for (const WeightType type : {WeightType::kQ4_0, WeightType::kBF16, WeightType::kF8_E4M3}) {
    const Floats weight = random_activations(1, 1024, 27);
    const Floats x = random_activations(70, 1024, 28);
    const Floats all = Gated(type, 77, x, weight).run(*deterministic_);
    for (const int64_t count : {1, 2, 3, 4, 6, 12, 33, 64, 66}) {
      const Floats some(x.end() - 1024 * count, x.end());
      const Floats found = Gated(type, 77, some, weight).run(*deterministic_);
      const auto part = [&](const Floats& both, int half) {
        const auto end = both.begin() + static_cast<int64_t>(both.size()) / 2 * (half + 1);
        return Floats(end - 77 * count, end);
      };
      for (const int half : {0, 1}) EXPECT_TRUE(same_bits(part(found, half), part(all, half)));
    }
  }
}

TEST_F(CudaDense, DeterministicRowsDoNotSeeTheirNeighbours) {
  for (const WeightTypeInfo& info : formats::weight_types()) {
    for (const int64_t rows : {45, 9000}) {
      const RandomMatrix matrix = random_matrix(info.type, rows, 512, 21);
      const Floats x = random_activations(70, 512, 22);
      const Floats all = Product{matrix, x}.run(*deterministic_);
      for (const int64_t count : {1, 5, 16, 30, 64}) {
        const Floats some(x.end() - 512 * count, x.end());
        const Floats out = Product{matrix, some}.run(*deterministic_);
        EXPECT_TRUE(same_bits(out, Floats(all.end() - rows * count, all.end()))) << info.name;
      }
    }
  }
}

struct Experts {
  RandomMatrix router = random_matrix(WeightType::kF32, 6, 256, 30);
  std::vector<RandomMatrix> gate, up, down;
  explicit Experts(WeightType type_of_up) {
    for (uint32_t e = 0; e < 6; ++e) {
      gate.push_back(random_matrix(WeightType::kQ4_K, 64, 256, 40 + e));
      up.push_back(random_matrix(type_of_up, 64, 256, 50 + e));
      down.push_back(random_matrix(WeightType::kF16, 256, 64, 60 + e));
    }
  }
  Floats run(Backend& backend, const Floats& x, bool normalize) const {
    std::vector<std::unique_ptr<Matrix>> owned;
    std::vector<const Matrix*> gates, ups, downs;
    const auto load = [&](const RandomMatrix& matrix) {
      auto loaded = backend.load_matrix(matrix.source());
      EXPECT_TRUE(loaded);
      owned.push_back(std::move(*loaded));
      return owned.back().get();
    };
    for (size_t e = 0; e < 6; ++e) {
      gates.push_back(load(gate[e]));
      ups.push_back(load(up[e]));
      downs.push_back(load(down[e]));
    }
    Values in(backend, x);
    Values out(backend, Floats(x.size()));
    MoeArgs args;
    args.x = in.data();
    args.out = out.data();
    args.num_rows = static_cast<int64_t>(x.size()) / 256;
    args.num_experts = 6;
    args.num_experts_used = 3;
    args.normalize_weights = normalize;
    args.router = load(router);
    args.gate_proj = gates;
    args.up_proj = ups;
    args.down_proj = downs;
    const Status done = backend.moe(args);
    EXPECT_TRUE(done) << (done ? "" : done.error().message());
    return out.get();
  }
};

TEST_F(CudaDense, MixtureOfExperts) {
  for (const WeightType type : {WeightType::kQ8_0, WeightType::kF8_E4M3}) {
    const Experts experts(type);
    for (const int64_t rows : {1, 8, 150}) {
      Floats x = random_activations(rows, 256, 31);
      // Keeps the router's logits small: exp would magnify their rounding.
      for (float& v : x) v *= 0.002f;
      for (const bool normalize : {true, false}) {
        compare(rows == 150 ? 1e-2 : 3e-4,
                [&](Backend& backend) { return experts.run(backend, x, normalize); });
      }
      const Floats all = experts.run(*deterministic_, x, true);
      const Floats last = experts.run(*deterministic_, Floats(x.end() - 256, x.end()), true);
      EXPECT_TRUE(same_bits(last, Floats(all.end() - 256, all.end())));
    }
  }
}

TEST_F(CudaDense, MemoryIsCountedAndLimited) {
  auto memory = make_cuda(false);
  EXPECT_EQ(memory->memory().stats().total_now, memory->workspace_bytes(small_needs()));
  BackendOptions options;
  options.name = "cuda";
  options.memory_limit = 1 << 20;
  auto limited = create_backend(options);
  ASSERT_TRUE(limited);
  const auto refused = Buffer::create((*limited)->memory(), 2 << 20, MemoryUse::kPages);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::kResourceExhausted);
  // Tables are the host's to write.
  auto table = Buffer::create((*limited)->memory(), 4096, MemoryUse::kTables);
  ASSERT_TRUE(table);
  EXPECT_EQ(table->as<int>()[17], 0);
  table->as<int>()[17] = 5;
}

}  // namespace
}  // namespace kvant::backend::cuda
