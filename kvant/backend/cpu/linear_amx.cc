// Products of many activation rows with AMX: tiles of 16 activation rows x 16 output rows.
//
// TDPBF16PS multiplies pairs of bfloat16 and adds in fp32. Codes have at most 8 bits and the 15-bit
// activations are the sum of two bfloat16 (high + low, matrix_layout.h), so every product and every
// partial sum is an integer below 2^24: exact in any order. A tile of results thus holds
// float(dot - offset * sum q) of one block, and the rest is what integer_product does with it.
//
// Q8_0's sums need 26 bits: high and low parts have sums of their own, each exact, and one addition
// rounds their total as a conversion from int32 would. Q6_K has sums for each half of a block.

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "kvant/backend/cpu/amx_tiles-inl.h"
#include "kvant/backend/cpu/simd_avx512.h"
#include "kvant/backend/cpu/wide_kernels.h"

namespace kvant::backend::cpu::amx {
namespace {
using Simd = avx512::Simd;
#include "kvant/backend/cpu/weight_kinds-inl.h"

constexpr int kTileFloats = kTileBytes / 4;

#include "kvant/backend/cpu/wide_panels-inl.h"

// Weights that are unpacked at a time, to be used by all panels: with a panel's records of the same
// blocks they stay in L1.
constexpr int64_t kSegmentBlocks = 4;
constexpr int64_t kSegmentTiles = 4;
// Output tiles whose sums are kept while the segments pass by: activations are read once for all.
constexpr int64_t kGroupTiles = 8;

// Of one block of one tile, unpacked.
template <typename Kind>
struct Unpacked {
  static constexpr bool kSplitsBlock = Kind::Scales::kSubBlocks == 2;
  static constexpr bool kSplitsCodes = Kind::kBits == 8;
  static constexpr int kResults = kSplitsBlock || kSplitsCodes ? 2 : 1;  // tiles of sums
  // Two halves are [pairs 0..7][zeros][pairs 8..15], which holds both halves padded with zeros.
  static constexpr int kPairBytes = 64;
  static constexpr int kCodeBytes = kSplitsBlock ? kTileBytes * 3 / 2 : kTileBytes;
  static constexpr int kSecondHalf = kTileBytes / 2;
};

// ---- weights ----

// bfloat16 of `value`, a multiple of 2^k with at most 8 significant bits.
constexpr uint16_t small_bf16(int value) {
  uint32_t magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
  if (magnitude == 0) return 0;
  uint32_t exponent = 127 + 7;
  while (magnitude < 128) {
    magnitude <<= 1;
    --exponent;
  }
  return static_cast<uint16_t>((value < 0 ? 0x8000u : 0u) | exponent << 7 | (magnitude & 127u));
}

// bfloat16 of (code - offset) for the 16-bit codes 0 ... 2^bits - 1.
template <int kBits, int kLogOffset>
struct CodeTable {
  alignas(64) uint16_t values[64];
  constexpr CodeTable() : values() {
    for (int i = 0; i < 64; ++i) {
      values[i] = small_bf16((i & ((1 << kBits) - 1)) - (kLogOffset == 0 ? 0 : 1 << kLogOffset));
    }
  }
};

template <typename Kind>
KVANT_INLINE __m512i codes_to_bf16(__m512i codes) {
  if constexpr (Kind::kBits == 8) {
    static_assert(Kind::kLogOffset == 7);
    const __m512i magic = _mm512_set1_epi32(0x4b000000);  // 2^23: its last bit counts ones
    const __m512 offset = _mm512_set1_ps(8388608.0f + 128.0f);
    const __m512i first =
        _mm512_ternarylogic_epi32(codes, magic, _mm512_set1_epi32(0xffff), 0xec);  // & mask | magic
    const __m512i second = _mm512_or_si512(_mm512_srli_epi32(codes, 16), magic);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(first), offset));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(second), offset));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);  // 8 bits: the low half is zero
  } else {
    static constexpr CodeTable<Kind::kBits, Kind::kLogOffset> kTable;
    const __m512i first = _mm512_load_si512(kTable.values);
    if constexpr (Kind::kBits <= 5) return _mm512_permutexvar_epi16(codes, first);
    return _mm512_permutex2var_epi16(first, codes, _mm512_load_si512(kTable.values + 32));
  }
}

template <typename Kind>
KVANT_INLINE void unpack_block(const uint8_t* codes, uint8_t* out) {
  using Layout = Unpacked<Kind>;
  repeat<kBlock / 2>([&](auto p) __attribute__((always_inline)) {
    constexpr int kPair = decltype(p)::value;
    constexpr int kAt = Layout::kSplitsBlock && kPair >= 8 ? kPair + 8 : kPair;
    _mm512_store_si512(out + kAt * Layout::kPairBytes,
                       codes_to_bf16<Kind>(unpack_pair<Kind::kBits, kPair>(codes)));
  });
  // The next segment's codes: four blocks of a tile at a time are no stream that the processor
  // sees.
  repeat<Kind::kBlockBytes / 64>([&](auto i) __attribute__((always_inline)) {
    __builtin_prefetch(codes + kSegmentBlocks * Kind::kBlockBytes + 64 * i, 0, 2);
  });
  if constexpr (Layout::kSplitsBlock) {
    for (int i = 8; i < 16; ++i) {
      _mm512_store_si512(out + i * Layout::kPairBytes, _mm512_setzero_si512());
    }
  }
}

// [2][16] floats: a and b, or the two halves' a.
template <typename Kind>
KVANT_INLINE void unpack_scales(const uint8_t* scales, int64_t block, float* out) {
  const Scale first = Kind::Scales::template load<0>(scales, block, 0);
  _mm512_store_ps(out, first.a);
  if constexpr (Kind::Scales::kHasMin) _mm512_store_ps(out + 16, first.b);
  if constexpr (Kind::Scales::kSubBlocks == 2) {
    _mm512_store_ps(out + 16, Kind::Scales::template load<1>(scales, block, 0).a);
  }
}

// ---- one block ----

// Stores the sums of the block before and starts this one's, which the next call stores: nothing
// waits for the matrix unit.
template <typename Kind>
KVANT_INLINE void multiply_block(const uint8_t* weights, const uint8_t* record, float* before) {
  using Layout = Unpacked<Kind>;
  _tile_loadd(2, weights, 64);
  _tile_loadd(3, record, 64);
  _tile_loadd(4, record + kTileBytes, 64);
  _tile_stored(0, before, 64);
  _tile_zero(0);
  _tile_dpbf16ps(0, 3, 2);
  if constexpr (Layout::kResults == 1) {
    _tile_dpbf16ps(0, 4, 2);
  } else if constexpr (Layout::kSplitsCodes) {
    _tile_stored(1, before + kTileFloats, 64);
    _tile_zero(1);
    _tile_dpbf16ps(1, 4, 2);
  } else {
    _tile_loadd(5, weights + Layout::kSecondHalf, 64);
    _tile_dpbf16ps(0, 4, 2);
    _tile_stored(1, before + kTileFloats, 64);
    _tile_zero(1);
    _tile_dpbf16ps(1, 3, 5);
    _tile_dpbf16ps(1, 4, 5);
  }
}

template <typename Kind>
KVANT_INLINE void store_last_block(float* before) {
  _tile_stored(0, before, 64);
  if constexpr (Unpacked<Kind>::kResults == 2) _tile_stored(1, before + kTileFloats, 64);
}

// acc += the block's terms; `dots` as multiply_block left them, `scales` as unpack_scales did.
template <typename Kind>
KVANT_INLINE void add_block(const float* dots, const uint8_t* record, const float* scales,
                            __m512 (&acc)[kWidePanelRows]) {
  const float* row_scales = reinterpret_cast<const float*>(record + 2 * kTileBytes);
  const __m512 first = _mm512_load_ps(scales);
  const __m512 second = _mm512_load_ps(scales + 16);
  repeat<kWidePanelRows>([&](auto r) __attribute__((always_inline)) {
    const __m512 s = _mm512_set1_ps(row_scales[r]);
    __m512 dot = _mm512_load_ps(dots + 16 * r);
    if constexpr (Unpacked<Kind>::kSplitsCodes) {
      dot = _mm512_add_ps(dot, _mm512_load_ps(dots + kTileFloats + 16 * r));
    }
    acc[r] = _mm512_fmadd_ps(dot, _mm512_mul_ps(first, s), acc[r]);
    if constexpr (Unpacked<Kind>::kSplitsBlock) {
      const __m512 dot_of_second = _mm512_load_ps(dots + kTileFloats + 16 * r);
      acc[r] = _mm512_fmadd_ps(dot_of_second, _mm512_mul_ps(second, s), acc[r]);
    }
    if constexpr (Kind::Scales::kHasMin) {
      acc[r] = _mm512_fmadd_ps(second, _mm512_set1_ps(row_scales[kWidePanelRows + r]), acc[r]);
    }
  });
}

// ---- the product ----

struct Scratch {
  alignas(64) float sums[kMaxWidePanels][kGroupTiles][kTileFloats];
  alignas(64) uint8_t weights[kSegmentTiles * kSegmentBlocks * kTileBytes * 3 / 2];
  alignas(64) float scales[kSegmentTiles * kSegmentBlocks * 2 * 16];
  alignas(64) float dots[2][2 * kTileFloats] = {};
  alignas(64) float unused_sums[kTileFloats] = {};
};

// `fresh` sums are zeros, whatever memory says.
KVANT_INLINE void load_sums(const float* from, bool fresh, __m512 (&acc)[kWidePanelRows]) {
  repeat<kWidePanelRows>([&](auto r) __attribute__((always_inline)) {
    acc[r] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(from + 16 * r);
  });
}
KVANT_INLINE void store_sums(const __m512 (&acc)[kWidePanelRows], float* to) {
  repeat<kWidePanelRows>([&](auto r) __attribute__((always_inline)) {
    _mm512_store_ps(to + 16 * r, acc[r]);
  });
}

// Adds to sums[tile][panel] the terms of `blocks` >= 2 blocks that are unpacked in `scratch`. The
// vector units add a block while the matrix unit is two blocks ahead, across panels and tiles: dots
// that were stored just now would have to be waited for.
template <typename Kind>
void add_segment(const uint8_t* records, int64_t panel_bytes, int num_panels, int64_t tiles,
                 int64_t blocks, bool fresh, float* sums, Scratch& scratch) {
  constexpr int kCodeBytes = Unpacked<Kind>::kCodeBytes;
  constexpr int kScaleFloats = 2 * kTileRows;
  __m512 acc[kWidePanelRows];
  load_sums(scratch.unused_sums, true, acc);
  // Of the panel and tile before; at first their dots are zeros and their sums unused.
  const uint8_t* last_record = records + (blocks - 2) * kWideBlockBytes;
  const float* last_scales = scratch.scales + (blocks - 2) * kScaleFloats;
  float* target = scratch.unused_sums;
  float* newer = scratch.dots[0];  // of the block before; `older` of the one before that
  float* older = scratch.dots[1];
  const auto step = [&]() __attribute__((always_inline)) {
    float* swapped = newer;
    newer = older;
    older = swapped;
  };
  for (int panel = 0; panel < num_panels; ++panel, records += panel_bytes) {
    const uint8_t* weights = scratch.weights;
    const float* scales = scratch.scales;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint8_t* record = records;
      multiply_block<Kind>(weights, record, newer);
      add_block<Kind>(older, last_record, last_scales, acc);
      step();
      multiply_block<Kind>(weights + kCodeBytes, record + kWideBlockBytes, newer);
      add_block<Kind>(older, last_record + kWideBlockBytes, last_scales + kScaleFloats, acc);
      step();
      store_sums(acc, target);
      target = sums + (panel * kGroupTiles + tile) * kTileFloats;
      load_sums(target, fresh, acc);
      weights += 2 * kCodeBytes;
      for (int64_t block = 2; block < blocks; ++block) {
        multiply_block<Kind>(weights, record + 2 * kWideBlockBytes, newer);
        add_block<Kind>(older, record, scales, acc);
        step();
        weights += kCodeBytes;
        record += kWideBlockBytes;
        scales += kScaleFloats;
      }
      last_record = record;
      last_scales = scales;
      scales += 2 * kScaleFloats;
    }
  }
  store_last_block<Kind>(newer);
  add_block<Kind>(older, last_record, last_scales, acc);
  add_block<Kind>(newer, last_record + kWideBlockBytes, last_scales + kScaleFloats, acc);
  store_sums(acc, target);
}

// Writes out one activation row of consecutive tiles: (out +) (sum + bias).
KVANT_INLINE void store_row(const float* sums, int64_t count, const float* bias, bool accumulate,
                            float* out) {
  for (int64_t i = 0; i < count; i += kTileRows, sums += kTileFloats) {
    const int64_t valid = count - i;
    const auto mask = static_cast<__mmask16>(valid >= kTileRows ? 0xffff : (1 << valid) - 1);
    __m512 v = _mm512_load_ps(sums);
    if (bias != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + i));
    if (accumulate) v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + i), v);
    _mm512_mask_storeu_ps(out + i, mask, v);
  }
}

template <typename Kind>
void wide_product(const ProductArgs& args, int num_panels, int64_t num_x_rows) {
  static constexpr TileConfig kConfig = whole_tiles();
  _tile_loadconfig(&kConfig);
  Scratch scratch;
  const int64_t num_blocks = args.cols / kBlock;
  const int64_t panel_bytes = num_blocks * kWideBlockBytes;
  const int64_t num_tiles = (args.num_rows + kTileRows - 1) / kTileRows;
  for (int64_t group = 0; group < num_tiles; group += kGroupTiles) {
    const int64_t group_tiles = num_tiles - group < kGroupTiles ? num_tiles - group : kGroupTiles;
    for (int64_t first = 0; first < num_blocks;) {
      const int64_t left = num_blocks - first;
      const int64_t blocks = left == kSegmentBlocks + 1 ? kSegmentBlocks - 1  // never leaves one
                             : left < kSegmentBlocks    ? left
                                                        : kSegmentBlocks;
      for (int64_t tile = 0; tile < group_tiles; tile += kSegmentTiles) {
        const int64_t tiles =
            group_tiles - tile < kSegmentTiles ? group_tiles - tile : kSegmentTiles;
        uint8_t* weights = scratch.weights;
        float* scales = scratch.scales;
        for (int64_t i = 0; i < tiles; ++i) {
          const uint8_t* source = args.tiles + (group + tile + i) * args.tile_bytes;
          for (int64_t block = first; block < first + blocks; ++block) {
            unpack_block<Kind>(source + block * Kind::kBlockBytes, weights);
            unpack_scales<Kind>(source + args.scale_offset, block, scales);
            weights += Unpacked<Kind>::kCodeBytes;
            scales += 2 * kTileRows;
          }
        }
        asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
        add_segment<Kind>(args.panel + first * kWideBlockBytes, panel_bytes, num_panels, tiles,
                          blocks, first == 0, scratch.sums[0][tile], scratch);
      }
      first += blocks;
    }
    const int64_t first_row = group * kTileRows;
    const int64_t left = args.num_rows - first_row;
    for (int64_t row = 0; row < num_x_rows; ++row) {
      store_row(scratch.sums[row / kWidePanelRows][0] + row % kWidePanelRows * kTileRows,
                left < kGroupTiles * kTileRows ? left : kGroupTiles * kTileRows,
                args.bias != nullptr ? args.bias + first_row : nullptr, args.accumulate,
                args.out + row * args.out_stride + first_row);
    }
  }
  _tile_release();
}

constexpr WideKernels make_wide_kernels() {
  WideKernels k{};
  k.product[static_cast<int>(WeightKind::kQ4_0)] = wide_product<KindQ4_0>;
  k.product[static_cast<int>(WeightKind::kQ4_1)] = wide_product<KindQ4_1>;
  k.product[static_cast<int>(WeightKind::kQ5_0)] = wide_product<KindQ5_0>;
  k.product[static_cast<int>(WeightKind::kQ5_1)] = wide_product<KindQ5_1>;
  k.product[static_cast<int>(WeightKind::kQ8_0)] = wide_product<KindQ8_0>;
  k.product[static_cast<int>(WeightKind::kQ4_K)] = wide_product<KindQ4_K>;
  k.product[static_cast<int>(WeightKind::kQ5_K)] = wide_product<KindQ5_K>;
  k.product[static_cast<int>(WeightKind::kQ6_K)] = wide_product<KindQ6_K>;
  k.quantise_panel = quantise_panel;
  return k;
}

#undef KVANT_INLINE
}  // namespace

constinit const WideKernels kWideKernels = make_wide_kernels();

}  // namespace kvant::backend::cpu::amx
