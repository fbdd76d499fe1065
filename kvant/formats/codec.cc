#include "kvant/formats/codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/formats/block_math.h"
#include "kvant/formats/codec_kernels.h"
#include "kvant/formats/codec_levels.h"
#include "kvant/formats/codec_scalar.h"
#include "kvant/formats/transform.h"

namespace kvant::formats {
namespace {

constexpr int kMaxHeadDim = 65536;
constexpr int64_t kScratchValues =
    8192;                      // of encode_rows and decode_rows with +rot: stays in L1/L2
constexpr int kMaxBlock = 32;  // of formats with a fixed block along head_dim

// Magnitudes up to this are stored without saturation and are finite.
uint32_t max_plain_bits(FormatId id, float global_scale) {
  const float limit = internal::max_magnitude(id, global_scale);
  return std::min(std::bit_cast<uint32_t>(limit), 0x7f7fffffu);
}

bool all_plain(const float* x, int64_t n, uint32_t max_bits) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude_bits(x[i]));
  return largest <= max_bits;
}

std::vector<float> bf16_row(const uint16_t* row, int head_dim) {
  std::vector<float> values(static_cast<size_t>(head_dim));
  for (int c = 0; c < head_dim; ++c) values[static_cast<size_t>(c)] = from_bf16(row[c]);
  return values;
}

void check_global_scale(float g) {
  KVANT_CHECK(std::isfinite(g) && g > 0.0f, "a global scale is finite and positive");
}

}  // namespace

Result<Codec> Codec::create(const SideFormat& side, int head_dim, CpuLevel level) {
  if (head_dim < 1 || head_dim > kMaxHeadDim) {
    return Error(ErrorCode::kInvalidArgument, "a head dimension is from 1 to " +
                                                  std::to_string(kMaxHeadDim) + "; found " +
                                                  std::to_string(head_dim));
  }
  KVANT_TRY(check_side_format(side, !format_info(side.base).for_keys));
  if (level > detect_cpu_level()) {
    return Error(ErrorCode::kUnsupported, "this processor has no " +
                                              std::string(cpu_level_name(level)) + "; use " +
                                              std::string(cpu_level_name(detect_cpu_level())));
  }
  Codec codec;
  codec.side_ = side;
  codec.head_dim_ = head_dim;
  codec.info_ = &format_info(side.base);
  codec.kernels_ = &internal::format_kernels(side.base, level);
  codec.scalar_ = &internal::scalar_kernels(side.base);
  codec.page_ = &internal::page_kernels(head_dim, level);
  return codec;
}

int64_t Codec::row_code_bytes() const {
  KVANT_CHECK(info_->axis != BlockAxis::kToken, "rows of a format whose blocks lie along tokens");
  return (static_cast<int64_t>(head_dim_) * info_->code_bits + 7) / 8;
}

int64_t Codec::row_scale_bytes() const {
  KVANT_CHECK(info_->axis != BlockAxis::kToken, "rows of a format whose blocks lie along tokens");
  if (info_->axis == BlockAxis::kNone) return 0;
  const int block = info_->block_size > 0 ? info_->block_size : head_dim_;
  return static_cast<int64_t>((head_dim_ + block - 1) / block) * scale_bytes(info_->scale);
}

// ---- runs of blocks ----

namespace {

int64_t block_code_bytes(const FormatInfo& info, int64_t block_len) {
  return (block_len * info.code_bits + 7) / 8;
}

// A short last block. SIMD loops know full blocks only: pad with a value of the block itself, which
// changes neither its largest magnitude nor its range.
void encode_tail(internal::EncodeFunction encode, const FormatInfo& info, internal::EncodeRun run) {
  const int64_t n = run.block_len;
  if (encode == run.scalar || n % 2 != 0 || !all_plain(run.x, n, run.max_plain_bits)) {
    run.scalar(run);
    return;
  }
  float x[kMaxBlock];
  uint8_t codes[kMaxBlock];
  std::copy(run.x, run.x + n, x);
  // Zeros where only magnitudes matter: +46 sums the errors of all elements of the block.
  const float padding = info.scale == Scale::kF16Pair ? run.x[0] : 0.0f;
  std::fill(x + n, x + info.block_size, padding);
  uint8_t* target = run.codes;
  run.x = x;
  run.codes = codes;
  run.block_len = info.block_size;
  encode(run);
  std::copy(codes, codes + block_code_bytes(info, n), target);
}

void decode_tail(internal::DecodeFunction decode, const FormatInfo& info, internal::DecodeRun run) {
  const int64_t n = run.block_len;
  if (decode == run.scalar) {
    run.scalar(run);
    return;
  }
  float x[kMaxBlock];
  uint8_t codes[kMaxBlock] = {};
  std::copy(run.codes, run.codes + block_code_bytes(info, n), codes);
  float* target = run.x;
  run.codes = codes;
  run.x = x;
  run.block_len = info.block_size;
  decode(run);
  std::copy(x, x + n, target);
}

}  // namespace

void Codec::encode_blocks(const float* x, int64_t num_rows, internal::EncodeRun run) const {
  internal::EncodeFunction encode =
      side_.four_over_six ? kernels_->encode_four_over_six : kernels_->encode;
  run.scalar = side_.four_over_six ? scalar_->encode_four_over_six : scalar_->encode;
  if (encode == nullptr) encode = run.scalar;
  run.max_plain_bits = max_plain_bits(side_.base, run.global_scale);
  run.x = x;
  run.row_stride = head_dim_;
  const int64_t block = info_->block_size > 0 ? info_->block_size : head_dim_;
  if (head_dim_ % block == 0) {
    run.num_blocks = num_rows * (head_dim_ / block);
    run.block_len = block;
    if (run.num_blocks > 0) encode(run);
    return;
  }
  const int64_t full = head_dim_ / block;
  const int scale_size = scale_bytes(info_->scale);
  for (int64_t row = 0; row < num_rows; ++row) {
    internal::EncodeRun part = run;
    part.x = x + row * head_dim_;
    part.codes = run.codes + row * row_code_bytes();
    part.scales = run.scales + row * row_scale_bytes();
    part.num_blocks = full;
    part.block_len = block;
    if (full > 0) encode(part);
    part.x += full * block;
    part.codes += full * block_code_bytes(*info_, block);
    part.scales += full * scale_size;
    part.num_blocks = 1;
    part.block_len = head_dim_ - full * block;
    encode_tail(encode, *info_, part);
  }
}

void Codec::decode_blocks(const uint8_t* codes, const uint8_t* scales, int64_t num_rows,
                          float global_scale, float* x) const {
  internal::DecodeFunction decode =
      kernels_->decode != nullptr ? kernels_->decode : scalar_->decode;
  const int64_t block = info_->block_size > 0 ? info_->block_size : head_dim_;
  internal::DecodeRun run = {codes, scales,         num_rows * (head_dim_ / block),
                             block, head_dim_,      global_scale,
                             x,     scalar_->decode};
  if (head_dim_ % block == 0) {
    if (run.num_blocks > 0) decode(run);
    return;
  }
  const int64_t full = head_dim_ / block;
  const int scale_size = scale_bytes(info_->scale);
  for (int64_t row = 0; row < num_rows; ++row) {
    internal::DecodeRun part = run;
    part.codes = codes + row * row_code_bytes();
    part.scales = scales + row * row_scale_bytes();
    part.x = x + row * head_dim_;
    part.num_blocks = full;
    if (full > 0) decode(part);
    part.codes += full * block_code_bytes(*info_, block);
    part.scales += full * scale_size;
    part.x += full * block;
    part.num_blocks = 1;
    part.block_len = head_dim_ - full * block;
    decode_tail(decode, *info_, part);
  }
}

// ---- rows ----

EncodeStats Codec::encode_rows(const float* x, int64_t num_rows, float global_scale, uint8_t* codes,
                               uint8_t* scales) const {
  check_global_scale(global_scale);
  EncodeStats stats;
  internal::EncodeRun run = {};
  run.global_scale = global_scale;
  run.codes = codes;
  run.scales = scales;
  run.non_finite = &stats.non_finite;
  run.saturated = &stats.saturated;
  const int64_t code_bytes = row_code_bytes();
  const int64_t side_data_bytes = row_scale_bytes();
  if (!side_.rotate) {
    encode_blocks(x, num_rows, run);
    return stats;
  }
  const int block = rotation_block(head_dim_);
  const int64_t rows_at_once = std::max<int64_t>(1, kScratchValues / head_dim_);
  std::vector<float> scratch(static_cast<size_t>(std::min(rows_at_once, num_rows) * head_dim_));
  for (int64_t row = 0; row < num_rows; row += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, num_rows - row);
    std::copy_n(x + row * head_dim_, rows * head_dim_, scratch.data());
    page_->rotate(scratch.data(), rows, head_dim_, block, rotation_scale(block));
    run.codes = codes + row * code_bytes;
    run.scales = scales + row * side_data_bytes;
    encode_blocks(scratch.data(), rows, run);
  }
  return stats;
}

void Codec::decode_rows(const uint8_t* codes, const uint8_t* scales, int64_t num_rows,
                        float global_scale, float* x) const {
  check_global_scale(global_scale);
  KVANT_CHECK(info_->axis != BlockAxis::kToken, "rows of a format whose blocks lie along tokens");
  decode_blocks(codes, scales, num_rows, global_scale, x);
  if (!side_.rotate) return;
  const int block = rotation_block(head_dim_);
  page_->rotate(x, num_rows, head_dim_, block, rotation_scale(block));
}

// ---- pages ----

EncodeStats Codec::encode_page(const float* x, int page_tokens, const SideParams& params,
                               const PlanarSide& out) const {
  if (!side_.smooth && !side_.rotate && !side_.bias && !side_.mean) {
    check_global_scale(params.global_scale);
    return encode_terms_taken(x, page_tokens, params.global_scale, out);
  }
  std::vector<float> scratch(x, x + static_cast<int64_t>(page_tokens) * head_dim_);
  return encode_page_in_place(scratch.data(), page_tokens, params, out);
}

EncodeStats Codec::encode_page_in_place(float* x, int page_tokens, const SideParams& params,
                                        const PlanarSide& out) const {
  check_global_scale(params.global_scale);
  if (side_.smooth && params.smooth != nullptr) {
    page_->divide_row(x, page_tokens, head_dim_, params.smooth);
  }
  if (side_.rotate) {
    const int block = rotation_block(head_dim_);
    page_->rotate(x, page_tokens, head_dim_, block, rotation_scale(block));
  }
  if (side_.bias && params.bias != nullptr) {
    page_->subtract_row(x, page_tokens, head_dim_, params.bias);
  }
  if (side_.mean) {
    page_->column_mean(x, page_tokens, head_dim_, out.mean);
    page_->subtract_row(x, page_tokens, head_dim_, bf16_row(out.mean, head_dim_).data());
  }
  return encode_terms_taken(x, page_tokens, params.global_scale, out);
}

EncodeStats Codec::encode_terms_taken(const float* x, int page_tokens, float global_scale,
                                      const PlanarSide& out) const {
  EncodeStats stats;
  internal::EncodeRun run = {};
  run.global_scale = global_scale;
  run.codes = out.codes;
  run.scales = out.scales;
  run.non_finite = &stats.non_finite;
  run.saturated = &stats.saturated;
  if (info_->axis != BlockAxis::kToken) {
    encode_blocks(x, page_tokens, run);
    return stats;
  }
  run.x = x;
  run.num_blocks = head_dim_;
  run.block_len = page_tokens;
  run.row_stride = head_dim_;
  run.max_plain_bits = max_plain_bits(side_.base, global_scale);
  run.scalar = scalar_->encode;
  (kernels_->encode != nullptr ? kernels_->encode : scalar_->encode)(run);
  return stats;
}

void Codec::decode_page(const ConstPlanarSide& in, int page_tokens, const SideParams& params,
                        Frame frame, float* x) const {
  check_global_scale(params.global_scale);
  if (info_->axis != BlockAxis::kToken) {
    decode_blocks(in.codes, in.scales, page_tokens, params.global_scale, x);
  } else {
    const internal::DecodeRun run = {in.codes,  in.scales,           head_dim_, page_tokens,
                                     head_dim_, params.global_scale, x,         scalar_->decode};
    (kernels_->decode != nullptr ? kernels_->decode : scalar_->decode)(run);
  }
  if (frame == Frame::kStored) return;
  if (side_.mean) {
    page_->add_row(x, page_tokens, head_dim_, bf16_row(in.mean, head_dim_).data());
  }
  if (side_.bias && params.bias != nullptr) {
    page_->add_row(x, page_tokens, head_dim_, params.bias);
  }
  if (side_.rotate) {
    const int block = rotation_block(head_dim_);
    page_->rotate(x, page_tokens, head_dim_, block, rotation_scale(block));
  }
  if (side_.smooth && params.smooth != nullptr) {
    page_->multiply_row(x, page_tokens, head_dim_, params.smooth);
  }
}

}  // namespace kvant::formats
