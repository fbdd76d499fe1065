// Weights times V's codes in AMX tiles, any number of query rows. The integers and what follows are
// those of attention_integer_values-inl.h, so the bits are the same; one product of tiles has all
// 64 tokens of a chunk, four or eight rows and sixteen channels.
//
// B holds V's codes as bytes: a row is four tokens of each of sixteen channels. A holds the upper
// and the lower bytes of the weights of a row in turn.
#define KVANT_LEVEL avx512
#include "kvant/backend/cpu/amx_tiles-inl.h"
#include "kvant/backend/cpu/attention_integer_weights-inl.h"

namespace kvant::backend::cpu::amx {
namespace {

using namespace avx512;  // NOLINT(google-build-using-namespace): the level's vector language

constexpr int kMaxTiles = 4;  // of sixteen channels, at once
constexpr int kBurst = 8;     // groups that are unpacked, then multiplied
static_assert(kMaxTileRows * kWeightBytes == kTileBytes);

// B of kBurst groups of sixteen channels from `group` on. Rows of tokens that have no weights keep
// what they have: any bytes will do. Products come in bursts: the unit takes two hundred cycles to
// begin again, so that unpacking in turn with each costs more than it hides.
template <typename Side, typename Page>
KVANT_INLINE void unpack_values(const IntegerValueArgs& a, const Page& page,
                                const ValueChunk& chunk, int group, Fetcher& fetcher) {
  constexpr int kTokens = Side::kTokens;
  const int words = tiles_of_chunk(page, chunk) * (kLanes / kTokens);
  const int64_t group_bytes = static_cast<int64_t>(page.page_tokens) / kTokens * 64;
  for (int g = group; g < group + kBurst && g < page.head_dim / kLanes; ++g) {
    const uint8_t* codes =
        a.codes + g * group_bytes + first_of_chunk(page, chunk) * (kLanes / kTokens * 64);
    uint8_t* out = a.unpacked + int64_t{g} * kTileBytes;
    const auto unpack = [&](int w) KVANT_ALWAYS {
      const __m512i word = _mm512_loadu_si512(codes + 64 * w);
      unroll<kTokens / 4>([&](auto j) KVANT_ALWAYS {
        _mm512_store_si512(out + (kTokens / 4 * w + j.value) * 64,
                           value_bytes<Side::C, j.value>(word));
      });
    };
    if (words == kChunkTokens / kTokens) {
      unroll<kChunkTokens / kTokens>([&](auto w) KVANT_ALWAYS { unpack(w.value); });
    } else {
      for (int w = 0; w < words; ++w) unpack(w);
    }
    fetcher.step();
  }
}

// Up to tile_rows rows with N groups of sixteen channels.
template <typename Side, int N, typename Page>
KVANT_OWN_FRAME void value_tiles(const IntegerValueArgs& a, const Page& page,
                                 const ValueChunk& chunk, int row, int rows, int group,
                                 Fetcher& fetcher) {
  alignas(64) int32_t sums[N][256];
  unroll<N>([&](auto n) KVANT_ALWAYS { load_tile<4 + decltype(n)::value>(kZeroTile, 64); });
  unroll<N>([&](auto n) KVANT_ALWAYS {
    constexpr int kC = 4 + decltype(n)::value;
    const int block = (group + n.value) * kLanes / Side::kBlock;
    load_tile<0>(chunk.weights + int64_t{block} * a.tile_rows * kWeightBytes, 64);
    load_tile<1 + kC % 2>(a.unpacked + int64_t{group + n.value} * kTileBytes, 64);
    multiply_unsigned_bytes<kC>();
  });
  fetcher.step(N);
  unroll<N>([&](auto n) KVANT_ALWAYS { store_tile<4 + decltype(n)::value>(sums[n.value], 64); });
  const int32_t* sum = sums[0];
  float* out = a.acc + row * a.acc_stride + group * kLanes;
  for (int r = 0; r < rows; ++r, sum += 2 * kLanes, out += a.acc_stride) {
    const F scale = bcast(chunk.weight_scale[r]);
    const F factor = bcast(first_of_chunk(page, chunk) == 0 ? a.factor[row + r] : 1.0f);
    unroll<N>([&](auto n) KVANT_ALWAYS {
      const int32_t* of = sum + n.value * 256;
      add_sums<Side::C>(out + n.value * kLanes, _mm512_load_si512(of),
                        _mm512_load_si512(of + kLanes), factor, scale,
                        chunk.terms[r][(group + n.value) * kLanes / Side::kBlock]);
    });
  }
}

template <typename Side, typename Page>
KVANT_INLINE void value_chunk(const IntegerValueArgs& a, const Page& page, ValueChunk& chunk,
                              Fetcher& fetcher) {
  prepare_scales<Side>(a, page, chunk, fetcher);
  // Before the weights: what has just been stored waits to be loaded as a tile.
  unpack_values<Side>(a, page, chunk, 0, fetcher);
  const int groups = page.head_dim / kLanes;
  for (int row = 0; row < a.rows; row += a.tile_rows) {
    const int rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
    with_count<kMaxTileRows>(rows, [&](auto m) {
      constexpr int M = decltype(m)::value;
      prepare_weights<Side, M>(a, page, chunk, row, a.tile_rows, fetcher);
      if constexpr (Side::C == Code::kU4) sum_zeros<Side, M>(a, page, chunk, row);
    });
    for (int group = 0; group < groups;) {
      if (row == 0 && group > 0 && group % kBurst == 0) {
        unpack_values<Side>(a, page, chunk, group, fetcher);
      }
      group += with_power<kMaxTiles>(groups - group, [&](auto n) {
        value_tiles<Side, n.value>(a, page, chunk, row, rows, group, fetcher);
      });
    }
  }
}

template <typename Side, typename Page>
void values_of(const IntegerValueArgs& a, const Page& page) {
  const int num_blocks = Side::blocks_of(page);
  const int groups = page.head_dim / kLanes;
  const int row_steps = (a.rows + a.tile_rows - 1) / a.tile_rows;
  ValueChunk chunk;
  begin_chunks<Side>(a, page, chunk);
  const int chunks = (page.num_tiles * kLanes + kChunkTokens - 1) / kChunkTokens;
  const int scale_steps = Side::S == PageScale::kE4m3 ? num_blocks : 0;
  const int weight_steps = a.rows + row_steps * num_blocks;
  Fetcher fetcher(a.fetch, chunks * (scale_steps + groups + weight_steps + row_steps * groups));
  for (; chunk.first_tile < page.num_tiles; chunk.first_tile += kChunkTokens / kLanes) {
    value_chunk<Side>(a, page, chunk, fetcher);
  }
}

}  // namespace

void integer_values(const IntegerValueArgs& a) {
  with_value_side(a, [&](auto side) {
    with_page(a, [&](const auto& page) { values_of<decltype(side)>(a, page); });
  });
}

}  // namespace kvant::backend::cpu::amx
