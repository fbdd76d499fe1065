// Queries times keys in AMX tiles, for keys with scales per channel: the scales are in the queries,
// so that one sum of integers runs over all channels. The integers and what follows are those of
// attention_integer_keys-inl.h, so the bits are the same. docs/kernels/cpu-attention.md says why
// other sides are not multiplied here.
//
// B holds K's codes as bytes: a row is four channels of each of sixteen tokens, as words of the
// page unpack. A holds the upper and the lower bytes of the integers of four or eight queries.
#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/amx_tiles-inl.h"
#include "kvant/backend/cpu/attention_integer-inl.h"

namespace kvant::backend::cpu::amx {
namespace {

using namespace avx512;  // NOLINT(google-build-using-namespace): the level's vector language

constexpr int kDepth = 64;    // channels of a tile
constexpr int kMaxTiles = 4;  // of sixteen tokens, at once

// Rows of B: [tile of 16 tokens][head_dim / 4][16 tokens][4 channels].
template <Code C>
void unpack_keys(const IntegerScoreArgs& a, int8_t* bytes, Fetcher& fetcher) {
  const uint8_t* codes = a.codes;
  const int steps = a.num_tiles * (a.head_dim / kLanes);
  for (int i = 0; i < steps; ++i, codes += key_step_bytes<C>(), bytes += 256) {
    unroll<4>([&](auto j) KVANT_ALWAYS {
      _mm512_store_si512(bytes + 64 * j.value, key_bytes<C, j.value>(codes));
    });
    if (i % 4 == 3) fetcher.step(4);
  }
}

// A: [64 channels][upper bytes of tile_rows rows, then lower ones][64 bytes], zeros for rows that
// are not there and behind the last channels, where B has another tile's.
void pack_queries(const IntegerScoreArgs& a, int row, int rows, int8_t* tiles) {
  const int d = a.head_dim;
  for (int c = 0; c < d; c += kDepth, tiles += kTileBytes) {
    const __mmask64 valid = d - c >= kDepth ? ~__mmask64{0} : (__mmask64{1} << (d - c)) - 1;
    for (int r = 0; r < a.tile_rows; ++r) {
      const __mmask64 mask = r < rows ? valid : __mmask64{0};
      const int64_t at = static_cast<int64_t>(row + r) * d + c;
      _mm512_store_si512(tiles + r * 64, _mm512_maskz_loadu_epi8(mask, a.q.hi + at));
      _mm512_store_si512(tiles + (a.tile_rows + r) * 64,
                         _mm512_maskz_loadu_epi8(mask, a.q.lo + at));
    }
  }
}

// Up to tile_rows rows with N tiles of sixteen tokens.
template <int N>
KVANT_OWN_FRAME void score_tiles(const IntegerScoreArgs& a, int row, int rows, int tile,
                                 const int8_t* keys, const int8_t* queries, Fetcher& fetcher) {
  alignas(64) int32_t sums[N][256];
  unroll<N>([&](auto n) KVANT_ALWAYS { load_tile<4 + decltype(n)::value>(kZeroTile, 64); });
  for (int c = 0; c < a.head_dim; c += kDepth) {
    load_tile<0>(queries + c / kDepth * kTileBytes, 64);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      constexpr int kC = 4 + decltype(n)::value;
      load_tile<1 + kC % 2>(keys + (int64_t{tile + n.value} * a.head_dim + c) * kLanes, 64);
      multiply_bytes<kC>();
    });
    fetcher.step(N);
  }
  unroll<N>([&](auto n) KVANT_ALWAYS { store_tile<4 + decltype(n)::value>(sums[n.value], 64); });
  for (int r = 0; r < rows; ++r) {
    float* s = a.s + static_cast<int64_t>(row + r) * a.page_tokens + tile * kLanes;
    const F scale = bcast(a.q.scale[row + r]);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      const __m512i high = _mm512_slli_epi32(_mm512_load_si512(sums[n.value] + r * kLanes), 8);
      const __m512i low = _mm512_load_si512(sums[n.value] + (a.tile_rows + r) * kLanes);
      store(s + n.value * kLanes, mul({_mm512_cvtepi32_ps(_mm512_add_epi32(high, low))}, scale));
    });
  }
}

template <Code C>
void scores_of(const IntegerScoreArgs& a) {
  auto* keys = reinterpret_cast<int8_t*>(a.scratch);
  alignas(64) int8_t queries[kMaxHeadDim / kDepth * kTileBytes];
  const int depths = (a.head_dim + kDepth - 1) / kDepth;
  const int row_steps = (a.rows + a.tile_rows - 1) / a.tile_rows;
  Fetcher fetcher(a.fetch, a.num_tiles * (a.head_dim / kLanes + row_steps * depths));
  for (int row = 0; row < a.rows; row += a.tile_rows) {
    const int rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
    // Before the keys: what has just been stored waits to be loaded as a tile.
    pack_queries(a, row, rows, queries);
    if (row == 0) unpack_keys<C>(a, keys, fetcher);
    for (int tile = 0; tile < a.num_tiles; tile += kMaxTiles) {
      with_count<kMaxTiles>(a.num_tiles - tile, [&](auto n) {
        score_tiles<decltype(n)::value>(a, row, rows, tile, keys, queries, fetcher);
      });
    }
  }
}

}  // namespace

void channel_scores(const IntegerScoreArgs& a) {
  switch (a.code) {
    case Code::kU4: scores_of<Code::kU4>(a); break;
    case Code::kU3: scores_of<Code::kU3>(a); break;
    default: scores_of<Code::kU2>(a); break;
  }
}

}  // namespace kvant::backend::cpu::amx
