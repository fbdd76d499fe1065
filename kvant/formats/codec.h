// Encoding and decoding: the planar codec of every format, scalar (the oracle) and SIMD.
//
// Two entry points: rows (formats whose blocks lie within one token) and page sides (every format).
// All levels give the same bits (codecs.md: one fp32 operation is one rounding, no contraction).
// Thread-safe; nothing is allocated except where said. transform.h has what kernels fold into
// queries and outputs instead of decoding completely.
#pragma once

#include <cstdint>
#include <span>

#include "kvant/base/cpu_level.h"
#include "kvant/base/result.h"
#include "kvant/formats/spec.h"

namespace kvant::formats {

namespace internal {
struct EncodeRun;
struct FormatKernels;
struct PageKernels;
}  // namespace internal

// What a side reads from the plan for one layer and one KV head. Pointers may be null: no such
// term.
struct SideParams {
  float global_scale = 1.0f;      // g
  const float* bias = nullptr;    // [head_dim], subtracted before encoding (+bias)
  const float* smooth = nullptr;  // [head_dim], K is divided by it (+smooth); finite, > 0
};

// Counted while encoding; non-finite inputs are stored as codecs.md section 2 says and the caller
// must fail the request with kNumericError.
struct EncodeStats {
  int64_t non_finite = 0;
  int64_t saturated =
      0;  // finite inputs beyond what the format can hold whatever the block's scale
  EncodeStats& operator+=(const EncodeStats& more) {
    non_finite += more.non_finite;
    saturated += more.saturated;
    return *this;
  }
};

// One side of one unit in planar order.
//   row formats:     codes [token][head_dim], scales [token][block]
//   channel formats: codes [head_dim][token], scales [head_dim] as pairs (scale, zero)
// `mean` is BF16 [head_dim], or null without +mean.
struct PlanarSide {
  uint8_t* codes = nullptr;
  uint8_t* scales = nullptr;
  uint16_t* mean = nullptr;
};
struct ConstPlanarSide {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const uint16_t* mean = nullptr;
};

class Codec {
 public:
  // kInvalidArgument for a side whose options do not fit its base (e.g. +46 on int8) or a head_dim
  // outside [1, 65536]; kUnsupported for a level that this processor lacks. Pages need a head_dim
  // that sections.h accepts; rows may have any length, each starts at a byte.
  static Result<Codec> create(const SideFormat& side, int head_dim,
                              CpuLevel level = CpuLevel::kScalar);

  const SideFormat& side() const { return side_; }
  int head_dim() const { return head_dim_; }

  // Bytes of codes and scales of one row; only for formats with axis kHeadDim or kNone.
  int64_t row_code_bytes() const;
  int64_t row_scale_bytes() const;

  // Encodes `num_rows` rows of [head_dim] fp32 values: base format with +46 and +rot only (the
  // terms of the whole page, mean, bias and smooth, are the page functions' part). Row formats
  // only. `global_scale` is finite and > 0. With +rot both allocate scratch for a few rows.
  EncodeStats encode_rows(const float* x, int64_t num_rows, float global_scale, uint8_t* codes,
                          uint8_t* scales) const;
  void decode_rows(const uint8_t* codes, const uint8_t* scales, int64_t num_rows,
                   float global_scale, float* x) const;

  // Encodes a full page side: x is fp32 [page_tokens][head_dim] (the BF16 values of the open page,
  // after RoPE for keys). Order: / smooth, rotate, - bias or - mean, encode. A mean that is NaN
  // because of non-finite input is stored as 0. Allocates scratch of the page's size where the side
  // has any of these terms.
  EncodeStats encode_page(const float* x, int page_tokens, const SideParams& params,
                          const PlanarSide& out) const;
  // The same without scratch: x is overwritten.
  EncodeStats encode_page_in_place(float* x, int page_tokens, const SideParams& params,
                                   const PlanarSide& out) const;

  // What attention reads: the inverse of encode_page, fp32 [page_tokens][head_dim]. With
  // `Frame::kStored` the result stays rotated and divided by smooth, without mean or bias (what a
  // kernel multiplies with the transformed query); `Frame::kPlain` undoes everything.
  enum class Frame { kPlain, kStored };
  void decode_page(const ConstPlanarSide& in, int page_tokens, const SideParams& params,
                   Frame frame, float* x) const;

 private:
  Codec() = default;
  EncodeStats encode_terms_taken(const float* x, int page_tokens, float global_scale,
                                 const PlanarSide& out) const;
  void encode_blocks(const float* x, int64_t num_rows, internal::EncodeRun run) const;
  void decode_blocks(const uint8_t* codes, const uint8_t* scales, int64_t num_rows,
                     float global_scale, float* x) const;

  SideFormat side_;
  int head_dim_ = 0;
  const FormatInfo* info_ = nullptr;
  const internal::FormatKernels* kernels_ = nullptr;  // of the level; gaps are filled by scalar_
  const internal::FormatKernels* scalar_ = nullptr;
  const internal::PageKernels* page_ = nullptr;
};

// In place: orthonormal Sylvester Hadamard blocks of the largest power of two that divides head_dim
// (codecs.md section 3, +rot). Its own inverse up to rounding.
void rotate_row(float* x, int head_dim);

}  // namespace kvant::formats
