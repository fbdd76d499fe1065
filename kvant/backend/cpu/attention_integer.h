// Integer products of attention: queries and weights rounded to 16 bits against codes as they are
// stored, four multiplications a lane (VNNI; two with AVX2). For K and V formats whose elements are
// small integers times a scale; the others are decoded to fp32 (attention_kernels.h).
//
// Rounding, documented because it is the only difference from fp32 products:
//   - a query is rounded to 16 bits of its largest channel (of the largest product of channel and
//     channel scale, where K has scales per channel);
//   - a weight times the power of two of its token's largest scale is rounded to 15 bits of the
//     largest such product of 64 tokens: a token counts by what it contributes, so that a weight of
//     nearly one on values of nearly zero does not drown others;
//   - that times the scale of a block, relative to the power of two (E4M3 scales exact down to
//     2^-11 of the token's largest, f16 ones to 2^-14), is rounded to as many bits again.
// The error is about 1e-4 of the output (relative L2 against float64), whatever the context.
// All sums of products are exact. Everything depends on one query row and one page only (ADR 0003).
//
// Included by sources built for a SIMD level: no containers, nothing with code.
#pragma once

#include <cstdint>

namespace kvant::backend::cpu {

enum class Code : uint8_t;
enum class PageScale : uint8_t;

// Query rows as integers: x = scale * (256 * hi + lo), channels in the order of K's words.
struct IntegerRows {
  int8_t* hi = nullptr;      // [rows][head_dim]; or tiles of both (RoundQueriesArgs), aligned to 64
  int8_t* lo = nullptr;      // [rows][head_dim]
  int16_t* words = nullptr;  // [rows][head_dim], in place of both where products take words (avx2)
  float* scale = nullptr;    // [rows]
  // Of each block of K, [rows][head_dim / 16]: the sum of the integers times minus the codes'
  // offset, as 256 * start + (rest >> 24 unsigned), as `rest` (kHalfRateIntegerKernels) or as
  // `start` (avx2), and that sum itself. With scales per channel nothing is taken back, and the sum
  // is q . zero, [rows].
  int32_t* start = nullptr;
  int32_t* rest = nullptr;
  float* sum = nullptr;
};

// Lines to fetch while a page is worked on, evenly: `lines` of each stream, `step` bytes apart.
// Streams are apart from each other, or of four neighbouring lines each takes one
// (attention_ahead.cc).
constexpr int kFetchStreams = 4;
struct FetchAhead {
  const uint8_t* stream[kFetchStreams] = {};
  int lines = 0;
  int64_t step = 64;  // other steps are for kernels of CpuTraits::half_rate_512
};

// What one pass over the page fetches: from 64th `begin` to 64th `end`; nothing if `all` is null.
// Passes get a pointer because a copy of what has just been written waits for all work before it.
struct FetchPart {
  const FetchAhead* all = nullptr;
  int begin = 0;
  int end = 0;
};

// Query rows of a tile of a matrix unit: four where there are no more, else eight.
constexpr int kMaxTileRows = 8;
constexpr int kQueryTileBytes = 1024;

struct RoundQueriesArgs {
  const float* q = nullptr;  // [rows][head_dim]
  int rows = 0;
  int head_dim = 0;
  Code code{};
  int block = 0;                     // of K; head_dim for scales per channel
  const uint8_t* channel = nullptr;  // f16 scales of the channels, then their zeros; or null
  // Not 0: out.hi takes [row / 8][64 channels][upper bytes of tile_rows rows, then lower ones]
  // [64 bytes], kQueryTileBytes for each 64 channels; bytes of rows that are not there are any.
  int tile_rows = 0;
  IntegerRows out;
  FetchPart fetch = {};
};

// s[r][t] = q[r] . k[t] for t in [0, 16 * num_tiles); without q . zero of channels. Tiles take
// queries in tiles.
struct IntegerScoreArgs {
  IntegerRows q;
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  Code code{};
  PageScale scale{};
  int block = 0;
  float* s = nullptr;  // [rows][page_tokens]
  int rows = 0;
  int head_dim = 0;
  int page_tokens = 0;
  int num_tiles = 0;
  uint8_t* scratch = nullptr;  // for tiles: 4 * page_tokens * head_dim bytes, aligned to 64
  int tile_rows = kMaxTileRows;
  FetchPart fetch = {};
};

// acc[r] = acc[r] * factor[r] + sum over t of p[r][t] * v[t].
struct IntegerValueArgs {
  const float* p = nullptr;  // [rows][page_tokens]; of tokens from 16 * num_tiles on: not read
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  PageScale scale{};  // says what codes are, too
  const float* factor = nullptr;
  float* acc = nullptr;
  int64_t acc_stride = 0;
  int rows = 0;
  int head_dim = 0;
  int page_tokens = 0;
  int num_tiles = 0;
  uint8_t* scratch = nullptr;   // integer_scratch_bytes()
  uint8_t* unpacked = nullptr;  // for tiles: 64 * head_dim bytes, aligned to 64
  int tile_rows = kMaxTileRows;
  FetchPart fetch = {};
};

struct IntegerKernels {
  void (*round_queries)(const RoundQueriesArgs& args);
  void (*scores)(const IntegerScoreArgs& args);
  void (*values)(const IntegerValueArgs& args);
};

constexpr int kMaxHeadDim = 256;

// What the bytes of `rows` rounded queries need.
constexpr int64_t query_integer_bytes(int rows, int head_dim) {
  return int64_t{(rows + 7) / 8 * 8} * ((head_dim + 63) / 64 * 64) * 2;
}

// What values() needs, aligned to 64.
constexpr int64_t integer_scratch_bytes(int head_dim) {
  // Of each block of 16 channels and 64 tokens: weights of a tile's rows, scales and zeros.
  return head_dim / 16 * (kMaxTileRows * 128 + 128 + 256);
}

namespace avx2 {
extern const IntegerKernels kIntegerKernels;
}
namespace avx512 {
extern const IntegerKernels kIntegerKernels;
extern const IntegerKernels kHalfRateIntegerKernels;  // CpuTraits::half_rate_512
}  // namespace avx512
namespace amx {  // the rest of this level is avx512's
void channel_scores(const IntegerScoreArgs& args);
void integer_values(const IntegerValueArgs& args);
}  // namespace amx

}  // namespace kvant::backend::cpu
