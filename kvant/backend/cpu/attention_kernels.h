// The vector kernels of attention over closed and BF16 pages, one table of functions per SIMD
// level.
//
// A page is worked on in passes that know nothing of each other: decode K, scores, softmax, decode
// V, weighted sum. Decoding depends on one side's format only, so any K format meets any V format,
// and every query row that reads the page shares it. Each pass computes a row with the same
// operations in the same order whatever the number of rows (ADR 0003). Levels agree to rounding,
// not to the bit.
//
// Included by sources built for a SIMD level: no containers, nothing with code.
#pragma once

#include <cstdint>

#include "kvant/backend/cpu/attention_integer.h"

namespace kvant::backend::cpu {

enum class Code : uint8_t { kBf16, kF16, kE4m3, kE5m2, kS8, kE2m1, kU4, kU3, kU2 };

// How stored codes become values. Offsets are those of the `cpu` layout (ADR 0002).
enum class PageScale : uint8_t {
  kNone,
  kE4m3,  // per block of a row
  kE8m0,
  kF16,
  kF16Pair,  // scale and zero per block of a row
  kF32,
  kChannelPair,  // f16 scale and zero per channel (K only)
};

// Decoded values are the stored ones times kE4m3Factor^-1 where `code` is kE4m3 and `scale` is
// kNone; the caller multiplies (scores or weights), which costs nothing.
inline constexpr float kE4m3Factor = 256.0f;

struct DecodeArgs {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  Code code = Code::kBf16;
  PageScale scale = PageScale::kNone;
  int block = 0;  // channels of one scale; head_dim for one scale per row
  int page_tokens = 0;
  int head_dim = 0;
  int token_end = 0;         // tokens at or after it need not be decoded
  float* out = nullptr;      // K: [head_dim][page_tokens]; V: [head_dim / 16][page_tokens][16]
  float* scratch = nullptr;  // 2 * max(head_dim, page_tokens) values
};

// s[r][t] = q[r] . k[t] for t in [0, 16 * num_tiles).
struct ScoreArgs {
  const float* q = nullptr;  // [rows][head_dim]
  const float* k = nullptr;  // [head_dim][page_tokens]
  float* s = nullptr;        // [rows][page_tokens]
  int rows = 0;
  int head_dim = 0;
  int page_tokens = 0;
  int num_tiles = 0;
  FetchPart fetch = {};
  const uint8_t* q_tiles = nullptr;  // of Bf16Kernels::pack_queries()
  int tile_rows = kMaxTileRows;
};

// Online softmax over one page: x = softcap(s * multiplier + offset[r] * offset_scale), masked;
// updates max and sum, leaves the weights times `weight_scale` in s and the factor for what was
// accumulated before.
struct SoftmaxArgs {
  float* s = nullptr;
  int rows = 0;
  int page_tokens = 0;
  int num_tiles = 0;
  int group = 1;               // query rows of one token (G)
  int64_t first_position = 0;  // of row 0
  int64_t page_begin = 0;
  bool all_see = false;  // every row every token, whatever the positions say
  int window = 0;
  int sink_tokens = 0;
  float multiplier = 1.0f;
  const float* offset = nullptr;  // [rows]
  float offset_scale = 1.0f;
  float softcap = 0.0f;
  float weight_scale = 1.0f;
  float* max = nullptr;    // [rows]
  float* sum = nullptr;    // [rows]
  float* share = nullptr;  // [rows]: sum over keys whose values lack the bias
  bool add_to_share = false;
  float* factor = nullptr;  // [rows], out
  FetchPart fetch = {};
};

// acc[r] = acc[r] * factor[r] + sum over t in [token_begin, token_end) of p[r][t] * v[t].
struct ValueArgs {
  const float* p = nullptr;  // [rows][page_tokens]
  const float* v = nullptr;  // [head_dim / 16][page_tokens][16]
  const float* factor = nullptr;
  float* acc = nullptr;
  int64_t acc_stride = 0;
  int rows = 0;
  int head_dim = 0;
  int page_tokens = 0;
  int token_begin = 0;
  int token_end = 0;
  FetchPart fetch = {};
  int tile_rows = kMaxTileRows;
};

// Undoes what was done to keys stored before RoPE, in place on decoded K, then applies RoPE at the
// tokens' positions: cos(a + b) from the page's first position and the token's place in the page.
struct PreRopeArgs {
  float* k = nullptr;  // [head_dim][page_tokens]
  int head_dim = 0;
  int page_tokens = 0;
  int num_tiles = 0;
  const uint16_t* mean = nullptr;  // BF16 [head_dim] or null
  const float* bias = nullptr;
  bool rotated = false;
  const float* smooth = nullptr;
  int rotary_dim = 0;
  const float* page_cos = nullptr;  // [rotary_dim / 2], times the magnitude
  const float* page_sin = nullptr;
  const float* token_cos = nullptr;  // [rotary_dim / 2][page_tokens]
  const float* token_sin = nullptr;
};

// A set of rows of partial results: acc [rows][stride], and max, sum, share [rows].
struct PartialRows {
  float* acc = nullptr;
  int64_t stride = 0;
  float* max = nullptr;
  float* sum = nullptr;
  float* share = nullptr;
};

// Products in tiles of a matrix unit.
struct TileKernels {
  // Around calls of the others, on the same thread and with the same tile_rows: the tiles' shapes
  // are state of the thread that takes hundreds of cycles to set.
  void (*begin)(int tile_rows);
  void (*end)();
  // IntegerKernels::scores and values for any number of rows, with the same bits; scores for K with
  // scales per channel.
  void (*channel_scores)(const IntegerScoreArgs& args);
  void (*integer_values)(const IntegerValueArgs& args);
};

// Products of floating-point codes in BF16, for any number of rows: sides that page_decoder.h says.
// Between TileKernels::begin() and end() where the level has those.
struct Bf16Kernels {
  // Into `tiles`, query_tile_bytes() aligned to 64, once for all pages of a code.
  void (*pack_queries)(const float* q, int rows, int head_dim, Code code, int tile_rows,
                       uint8_t* tiles);
  // `side.out` is used for the codes as BF16.
  void (*scores)(const DecodeArgs& side, const ScoreArgs& args);
  void (*values)(const DecodeArgs& side, const ValueArgs& args);
};

constexpr int64_t query_tile_bytes(int rows, int head_dim) {
  return int64_t{(rows + 7) / 8 * 8} * head_dim * 4;  // two BF16 a value
}

struct AttentionKernels {
  void (*decode_k)(const DecodeArgs& args);
  void (*decode_v)(const DecodeArgs& args);
  void (*scores)(const ScoreArgs& args);
  // The same without the pass before, for few rows: sides that page_decoder.h says, no `out`, no
  // `k`.
  void (*scores_of_codes)(const DecodeArgs& side, const ScoreArgs& args);
  void (*softmax)(const SoftmaxArgs& args);
  void (*values)(const ValueArgs& args);
  void (*values_of_codes)(const DecodeArgs& side, const ValueArgs& args);  // token_begin is 0
  void (*pre_rope)(const PreRopeArgs& args);
  // out[r] = q[r] . x, head_dim channels each; x in fp32.
  void (*dot_rows)(const float* q, int rows, int head_dim, const float* x, float* out);
  // acc[r] *= factor[r], `width` values each.
  void (*scale_rows)(float* acc, int64_t stride, int rows, int width, const float* factor);
  // to = merge(to, from) for `rows` rows of `width` values (problem.h).
  void (*merge)(const PartialRows& to, const PartialRows& from, int rows, int width);
  // Products with the codes as they are stored; null where the level has none.
  const IntegerKernels* integer;
  const TileKernels* tiles;  // null where the level has none
  const Bf16Kernels* bf16;   // null where they are not faster than fp32
  // Prefetches a multiple of 2 KiB apart are in each other's way, and kernels look at
  // FetchAhead::step.
  bool streams_alias;
};

namespace scalar {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
extern const AttentionKernels kHalfRateKernels;  // CpuTraits::half_rate_512
extern const Bf16Kernels kBf16Kernels;           // of those
}  // namespace avx512
namespace amx {  // the rest of this level is avx512's
extern const TileKernels kTileKernels;
extern const Bf16Kernels kBf16Kernels;
}  // namespace amx

}  // namespace kvant::backend::cpu
