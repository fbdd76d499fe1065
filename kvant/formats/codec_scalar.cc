#include "kvant/formats/codec_scalar.h"

#include <array>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/formats/all_formats.h"
#include "kvant/formats/format_concept.h"

namespace kvant::formats::internal {
namespace {

// ---- codes as a little-endian bit stream, each block padded to a byte ----

template <int kBits>
class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}
  void put(uint32_t code) {
    pending_ |= code << num_pending_;
    num_pending_ += kBits;
    while (num_pending_ >= 8) {
      *out_++ = static_cast<uint8_t>(pending_);
      pending_ >>= 8;
      num_pending_ -= 8;
    }
  }
  void finish() {
    if (num_pending_ > 0) *out_ = static_cast<uint8_t>(pending_);
  }

 private:
  uint8_t* out_;
  uint32_t pending_ = 0;
  int num_pending_ = 0;
};

template <int kBits>
class BitReader {
 public:
  explicit BitReader(const uint8_t* in) : in_(in) {}
  uint32_t get() {
    while (num_pending_ < kBits) {
      pending_ |= static_cast<uint32_t>(*in_++) << num_pending_;
      num_pending_ += 8;
    }
    const uint32_t code = pending_ & ((1u << kBits) - 1u);
    pending_ >>= kBits;
    num_pending_ -= kBits;
    return code;
  }

 private:
  const uint8_t* in_;
  uint32_t pending_ = 0;
  int num_pending_ = 0;
};

void store_side_data(uint8_t* out, uint32_t bits, int num_bytes) {
  for (int i = 0; i < num_bytes; ++i) out[i] = static_cast<uint8_t>(bits >> (8 * i));
}

uint32_t load_side_data(const uint8_t* in, int num_bytes) {
  uint32_t bits = 0;
  for (int i = 0; i < num_bytes; ++i) bits |= static_cast<uint32_t>(in[i]) << (8 * i);
  return bits;
}

// ---- runs of blocks ----

enum class ScaleChoice { kPlain, kFourOverSix };

template <typename F>
constexpr int64_t code_bytes(int64_t block_len) {
  return (block_len * F::kInfo.code_bits + 7) / 8;
}

template <typename F, ScaleChoice kChoice>
uint32_t choose_scale(const float* x, int n, float g) {
  if constexpr (kChoice == ScaleChoice::kFourOverSix) {
    return F::block_scale_four_over_six(x, n, g);
  } else {
    return F::block_scale(x, n, g);
  }
}

template <typename F, ScaleChoice kChoice>
void encode_block(const EncodeRun& run, const float* x, int64_t index) {
  constexpr int kScaleBytes = scale_bytes(F::kInfo.scale);
  const float g = run.global_scale;
  const int n = static_cast<int>(run.block_len);
  const uint32_t scale = choose_scale<F, kChoice>(x, n, g);
  if constexpr (kScaleBytes > 0) {
    store_side_data(run.scales + index * kScaleBytes, scale, kScaleBytes);
  }
  const float limit = F::max_magnitude(g);
  BitWriter<F::kInfo.code_bits> writer(run.codes + index * code_bytes<F>(n));
  for (int i = 0; i < n; ++i) {
    writer.put(F::encode(x[i], scale, g));
    if (!is_finite(x[i])) {
      ++*run.non_finite;
    } else if (magnitude(x[i]) > limit) {
      ++*run.saturated;
    }
  }
  writer.finish();
}

template <typename F, ScaleChoice kChoice>
void encode_run(const EncodeRun& run) {
  if constexpr (F::kInfo.axis == BlockAxis::kToken) {
    std::vector<float> column(static_cast<size_t>(run.block_len));
    for (int64_t b = 0; b < run.num_blocks; ++b) {
      for (int64_t i = 0; i < run.block_len; ++i) {
        column[static_cast<size_t>(i)] = run.x[i * run.row_stride + b];
      }
      encode_block<F, kChoice>(run, column.data(), b);
    }
  } else {
    for (int64_t b = 0; b < run.num_blocks; ++b) {
      encode_block<F, kChoice>(run, run.x + b * run.block_len, b);
    }
  }
}

template <typename F>
void decode_run(const DecodeRun& run) {
  constexpr int kScaleBytes = scale_bytes(F::kInfo.scale);
  constexpr bool kColumns = F::kInfo.axis == BlockAxis::kToken;
  for (int64_t b = 0; b < run.num_blocks; ++b) {
    uint32_t scale = 0;
    if constexpr (kScaleBytes > 0)
      scale = load_side_data(run.scales + b * kScaleBytes, kScaleBytes);
    BitReader<F::kInfo.code_bits> reader(run.codes + b * code_bytes<F>(run.block_len));
    for (int64_t i = 0; i < run.block_len; ++i) {
      const auto code = static_cast<typename F::Code>(reader.get());
      float& out = kColumns ? run.x[i * run.row_stride + b] : run.x[b * run.block_len + i];
      out = F::decode(code, scale, run.global_scale);
    }
  }
}

// ---- the table ----

struct ScalarFormat {
  FormatKernels kernels{};
  float (*max_magnitude)(float g) = nullptr;
};

template <typename F>
constexpr ScalarFormat scalar_format() {
  ScalarFormat format;
  format.kernels.encode = encode_run<F, ScaleChoice::kPlain>;
  format.kernels.decode = decode_run<F>;
  if constexpr (FormatHasFourOverSix<F>) {
    format.kernels.encode_four_over_six = encode_run<F, ScaleChoice::kFourOverSix>;
  }
  format.max_magnitude = F::max_magnitude;
  return format;
}

const ScalarFormat& scalar_format_of(FormatId id) {
  static constexpr auto kTable = [] {
    std::array<ScalarFormat, 256> table{};
#define KVANT_FORMAT(number, Type, header) table[number] = scalar_format<Type>();
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT
    return table;
  }();
  const ScalarFormat& format = kTable[static_cast<size_t>(id)];
  KVANT_CHECK(format.kernels.encode != nullptr, "a FormatId is one of formats.def");
  return format;
}

// ---- operations on pages ----

void column_mean(const float* x, int64_t rows, int64_t dim, uint16_t* mean) {
  for (int64_t c = 0; c < dim; ++c) {
    float sum = 0.0f;
    for (int64_t r = 0; r < rows; ++r) sum += x[r * dim + c];
    const float value = sum / static_cast<float>(rows);
    mean[c] = is_nan(value) ? uint16_t{0} : to_bf16_saturated(value);
  }
}

template <typename Operation>
void for_each_with_row(float* x, int64_t rows, int64_t dim, const float* row, Operation operation) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < dim; ++c) x[r * dim + c] = operation(x[r * dim + c], row[c]);
  }
}

void subtract_row(float* x, int64_t rows, int64_t dim, const float* row) {
  for_each_with_row(x, rows, dim, row, [](float a, float b) { return a - b; });
}
void add_row(float* x, int64_t rows, int64_t dim, const float* row) {
  for_each_with_row(x, rows, dim, row, [](float a, float b) { return a + b; });
}
void divide_row(float* x, int64_t rows, int64_t dim, const float* row) {
  for_each_with_row(x, rows, dim, row, [](float a, float b) { return a / b; });
}
void multiply_row(float* x, int64_t rows, int64_t dim, const float* row) {
  for_each_with_row(x, rows, dim, row, [](float a, float b) { return a * b; });
}

}  // namespace

void rotate_scalar(float* x, int64_t rows, int64_t dim, int64_t block, float scale) {
  for (int64_t start = 0; start < rows * dim; start += block) {
    float* y = x + start;
    for (int64_t stride = 1; stride < block; stride *= 2) {
      for (int64_t i = 0; i < block; i += 2 * stride) {
        for (int64_t j = i; j < i + stride; ++j) {
          const float a = y[j];
          const float b = y[j + stride];
          y[j] = a + b;
          y[j + stride] = a - b;
        }
      }
    }
    for (int64_t i = 0; i < block; ++i) y[i] = y[i] * scale;
  }
}

const FormatKernels& scalar_kernels(FormatId id) {
  return scalar_format_of(id).kernels;
}

const PageKernels& scalar_page_kernels() {
  static constexpr PageKernels kKernels = {column_mean, subtract_row, add_row,
                                           divide_row,  multiply_row, rotate_scalar};
  return kKernels;
}

float max_magnitude(FormatId id, float global_scale) {
  return scalar_format_of(id).max_magnitude(global_scale);
}

}  // namespace kvant::formats::internal
