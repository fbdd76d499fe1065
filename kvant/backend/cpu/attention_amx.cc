// Queries times keys in AMX tiles, for keys with scales per channel: the scales are in the queries,
// so that one sum of integers runs over all channels. The integers and what follows are those of
// attention_integer_keys-inl.h, so the bits are the same. docs/kernels/cpu-attention.md says why
// other sides are not multiplied here.
//
// B holds K's codes as bytes: a row is four channels of each of sixteen tokens, as words of the
// page unpack. A holds the upper and the lower bytes of the integers of four or eight queries, as
// they were rounded.
#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/amx_tiles-inl.h"
#include "kvant/backend/cpu/attention_integer-inl.h"
#include "kvant/backend/cpu/attention_shape-inl.h"

namespace kvant::backend::cpu::amx {
namespace {

using namespace avx512;  // NOLINT(google-build-using-namespace): the level's vector language

constexpr int kDepth = 64;    // channels of a tile
constexpr int kMaxTiles = 4;  // of sixteen tokens, at once
static_assert(kQueryTileBytes == kTileBytes);

// Rows of B: [tile of 16 tokens][head_dim / 4][16 tokens][4 channels].
template <Code C, typename Page>
KVANT_INLINE void unpack_keys(const IntegerScoreArgs& a, const Page& page, int8_t* bytes,
                              Fetcher& fetcher) {
  const uint8_t* codes = a.codes;
  const auto unpack = [&]() KVANT_ALWAYS {
    unroll<4>([&](auto j) KVANT_ALWAYS {
      _mm512_store_si512(bytes + 64 * j.value, key_bytes<C, j.value>(codes));
    });
    codes += key_step_bytes<C>();
    bytes += 256;
  };
  int left = page.num_tiles * (page.head_dim / kLanes);
  for (; left >= 4; left -= 4) {
    unroll<4>([&](auto) KVANT_ALWAYS { unpack(); });
    fetcher.step(4);
  }
  for (; left > 0; --left) unpack();
}

// Up to tile_rows rows with N tiles of sixteen tokens.
template <int N, typename Page>
KVANT_OWN_FRAME void score_tiles(const IntegerScoreArgs& a, const Page& page, int row, int rows,
                                 int tile, const int8_t* keys, Fetcher& fetcher) {
  alignas(64) int32_t sums[N][256];
  unroll<N>([&](auto n) KVANT_ALWAYS { load_tile<4 + decltype(n)::value>(kZeroTile, 64); });
  const int depths = (page.head_dim + kDepth - 1) / kDepth;
  const int8_t* queries = a.q.hi + int64_t{row / kMaxTileRows} * depths * kTileBytes;
  for (int depth = 0; depth < depths; ++depth) {
    load_tile<0>(queries + depth * kTileBytes, 64);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      constexpr int kC = 4 + decltype(n)::value;
      const int64_t step = int64_t{tile + n.value} * page.head_dim + depth * kDepth;
      load_tile<1 + kC % 2>(keys + step * kLanes, 64);
      multiply_bytes<kC>();
    });
    fetcher.step(N);
  }
  unroll<N>([&](auto n) KVANT_ALWAYS { store_tile<4 + decltype(n)::value>(sums[n.value], 64); });
  const int32_t *high = sums[0], *low = high + a.tile_rows * kLanes;
  float* s = a.s + static_cast<int64_t>(row) * page.page_tokens + tile * kLanes;
  for (int r = 0; r < rows; ++r, high += kLanes, low += kLanes, s += page.page_tokens) {
    const F scale = bcast(a.q.scale[row + r]);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(high + n.value * 256), 8);
      const __m512i sum = _mm512_add_epi32(upper, _mm512_load_si512(low + n.value * 256));
      store(s + n.value * kLanes, mul({_mm512_cvtepi32_ps(sum)}, scale));
    });
  }
}

template <Code C, typename Page>
void scores_of(const IntegerScoreArgs& a, const Page& page) {
  auto* keys = reinterpret_cast<int8_t*>(a.scratch);
  const int depths = (page.head_dim + kDepth - 1) / kDepth;
  const int row_steps = (a.rows + a.tile_rows - 1) / a.tile_rows;
  Fetcher fetcher(a.fetch, page.num_tiles * (page.head_dim / kLanes + row_steps * depths));
  unpack_keys<C>(a, page, keys, fetcher);
  for (int row = 0; row < a.rows; row += a.tile_rows) {
    const int rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
    for (int tile = 0; tile < page.num_tiles; tile += kMaxTiles) {
      with_count<kMaxTiles>(page.num_tiles - tile, [&](auto n) {
        score_tiles<n.value>(a, page, row, rows, tile, keys, fetcher);
      });
    }
  }
}

}  // namespace

void channel_scores(const IntegerScoreArgs& a) {
  with_page(a, [&](const auto& page) {
    switch (a.code) {
      case Code::kU4: return scores_of<Code::kU4>(a, page);
      case Code::kU3: return scores_of<Code::kU3>(a, page);
      default: scores_of<Code::kU2>(a, page);
    }
  });
}

}  // namespace kvant::backend::cpu::amx
