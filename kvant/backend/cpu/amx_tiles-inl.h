// AMX: eight tiles of sixteen rows of 64 bytes. A product adds to a tile of 32-bit sums C[m][n]
// the products of A's rows (four bytes or two BF16 a step) and B's rows (a step each, sixteen
// lanes n). Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
//
// There is nothing here to zero a tile: a loop of products each on a tile just zeroed takes 65
// cycles a product on Sapphire Rapids, 20 on a tile of zeros just loaded. (linear_amx.cc stores a
// tile before it zeroes it; there it makes no difference.)
//
// The compiler's intrinsics want literal numbers of tiles; these take template parameters.
// Included by *_amx.cc only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define KVANT_FOR_TILE(T, use)                   \
  static_assert(T >= 0 && T < 8, "eight tiles"); \
  if constexpr (T == 0) use(0);                  \
  if constexpr (T == 1) use(1);                  \
  if constexpr (T == 2) use(2);                  \
  if constexpr (T == 3) use(3);                  \
  if constexpr (T == 4) use(4);                  \
  if constexpr (T == 5) use(5);                  \
  if constexpr (T == 6) use(6);                  \
  if constexpr (T == 7) use(7)

namespace kvant::backend::cpu::amx {
namespace {

constexpr int kTileBytes = 1024;
alignas(64) constexpr int8_t kZeroTile[kTileBytes] = {};

// What _tile_loadconfig reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles as multiply_bytes() takes them, A and C with `rows` rows: loads and stores of fewer rows
// take less time, products do not.
constexpr TileConfig tiles_of(int rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t == 1 || t == 2 ? 16 : static_cast<uint8_t>(rows);
  }
  return config;
}
constexpr TileConfig whole_tiles() {
  return tiles_of(16);
}

template <int T>
inline __attribute__((always_inline)) void load_tile(const void* rows, int64_t stride) {
  __asm__ volatile("" ::: "memory");  // g++ 12 does not say that the instruction reads memory
#define KVANT_USE(t) _tile_loadd(t, rows, stride)
  KVANT_FOR_TILE(T, KVANT_USE);
#undef KVANT_USE
}
template <int T>
inline __attribute__((always_inline)) void store_tile(void* rows, int64_t stride) {
#define KVANT_USE(t) _tile_stored(t, rows, stride)
  KVANT_FOR_TILE(T, KVANT_USE);
#undef KVANT_USE
}
// C += A x B in signed bytes and 32-bit integers, A in tile 0, B in tile 1 + C % 2, C in tiles 4
// to 7.
template <int C>
inline __attribute__((always_inline)) void multiply_bytes() {
  static_assert(C >= 4 && C < 8);
  if constexpr (C == 4) _tile_dpbssd(4, 0, 1);
  if constexpr (C == 5) _tile_dpbssd(5, 0, 2);
  if constexpr (C == 6) _tile_dpbssd(6, 0, 1);
  if constexpr (C == 7) _tile_dpbssd(7, 0, 2);
}
// The same with A's bytes unsigned.
template <int C>
inline __attribute__((always_inline)) void multiply_unsigned_bytes() {
  static_assert(C >= 4 && C < 8);
  if constexpr (C == 4) _tile_dpbusd(4, 0, 1);
  if constexpr (C == 5) _tile_dpbusd(5, 0, 2);
  if constexpr (C == 6) _tile_dpbusd(6, 0, 1);
  if constexpr (C == 7) _tile_dpbusd(7, 0, 2);
}
// The same in BF16 and fp32.
template <int C>
inline __attribute__((always_inline)) void multiply_bf16() {
  static_assert(C >= 4 && C < 8);
  if constexpr (C == 4) _tile_dpbf16ps(4, 0, 1);
  if constexpr (C == 5) _tile_dpbf16ps(5, 0, 2);
  if constexpr (C == 6) _tile_dpbf16ps(6, 0, 1);
  if constexpr (C == 7) _tile_dpbf16ps(7, 0, 2);
}

}  // namespace
}  // namespace kvant::backend::cpu::amx

#undef KVANT_FOR_TILE
