// Matrix products of one panel of activation rows with tiles of 16 output rows; layouts in
// matrix_layout.h. Compiled once per SIMD level: include it inside the level's namespace, after its
// Simd and vector_kernels-inl.h.
//
// Integer kinds, per block of 32 inputs and output row: the dot product of unsigned codes u with
// the activations' 15-bit codes q is exact in int32 (255 * 16256 * 32 < 2^31), then
//   acc = fma(float(dot - offset * sum q), a * s, acc), and for types with a minimum b: fma(b, s *
//   sum q, acc)
// where w = a * (u - offset) (+ b). One chain per output, inputs in order, whatever the panel's
// size.

#include "kvant/backend/cpu/weight_kinds-inl.h"

inline constexpr int kChunks = kTileRows / Simd::kLanes;  // vectors per tile

// ---- integer product ----

// Writes the results of kRows activation rows for one chunk of a tile: (out +) (acc + bias).
template <int kRows>
KVANT_INLINE void store_chunk(const ProductArgs& args, int64_t first_row,
                              const Simd::F (&acc)[kRows]) {
  const int64_t valid = args.num_rows - first_row;
  if (valid >= Simd::kLanes) {
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      float* out = args.out + r * args.out_stride + first_row;
      Simd::F v = acc[r];
      if (args.bias != nullptr) v = Simd::add(v, Simd::load(args.bias + first_row));
      if (args.accumulate) v = Simd::add(Simd::load(out), v);
      Simd::store(out, v);
    });
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    float values[Simd::kLanes];
    Simd::store(values, acc[r]);
    float* out = args.out + r * args.out_stride + first_row;
    for (int64_t i = 0; i < valid; ++i) {
      float v = values[i];
      if (args.bias != nullptr) v = v + args.bias[first_row + i];
      out[i] = args.accumulate ? out[i] + v : v;
    }
  }
}

// dot + the products of one row as bytes: half the unpacking of pairs, which a single row pays
// alone. A template of Vectors = Simd, because not every level has dot_bytes.
template <typename Vectors, typename Kind, int kSub>
KVANT_INLINE typename Vectors::I add_groups(typename Vectors::I dot, const uint8_t* codes,
                                            const uint8_t* record) {
  constexpr int kGroups = kBlock / 4 / Kind::Scales::kSubBlocks;
  typename Vectors::I high = Vectors::set1_i(0);
  repeat<kGroups>([&](auto g) __attribute__((always_inline)) {
    constexpr int kGroup = kSub * kGroups + decltype(g)::value;
    const typename Vectors::I w = unpack_group<Kind::kBits, kGroup>(codes);
    high = Vectors::dot_bytes(high, w, Vectors::broadcast_i(record + 8 * kGroup));
    dot = Vectors::dot_bytes(dot, w, Vectors::broadcast_i(record + 8 * kGroup + 4));
  });
  return Vectors::add_i(dot, Vectors::template shift_left<7>(high));
}

// Adds one sub-block's terms to the sums. `record` is the panel's record of the block.
template <typename Kind, int kRows, int kSub>
KVANT_INLINE void add_sub_block(const uint8_t* codes, const uint8_t* record, const Scale& scale,
                                Simd::F (&acc)[kRows]) {
  constexpr int kPairs = kBlock / 2 / Kind::Scales::kSubBlocks;
  const uint8_t* row_scales = record + 2 * kBlock * kRows;
  const uint8_t* row_min_terms = row_scales + 4 * kRows;
  const uint8_t* row_sums = row_scales + 8 * kRows;
  Simd::I dot[kRows];
  repeat<kRows>([&](auto r) __attribute__((always_inline)) {
    if constexpr (Kind::kLogOffset == 0) {
      dot[r] = Simd::set1_i(0);
    } else {  // -offset * sum q
      Simd::I sum = Simd::broadcast_i(row_sums + 4 * (r + kSub * kRows));
      if constexpr (Kind::Scales::kSubBlocks == 1) {
        sum = Simd::add_i(sum, Simd::broadcast_i(row_sums + 4 * (r + kRows)));
      }
      dot[r] = Simd::shift_left<Kind::kLogOffset>(sum);
    }
  });
  if constexpr (kRows == 1 && Simd::kDotsBytes) {
    dot[0] = add_groups<Simd, Kind, kSub>(dot[0], codes, record);
  } else {
    repeat<kPairs>([&](auto p) __attribute__((always_inline)) {
      constexpr int kPair = kSub * kPairs + decltype(p)::value;
      const Simd::I w = unpack_pair<Kind::kBits, kPair>(codes);
      repeat<kRows>([&](auto r) __attribute__((always_inline)) {
        dot[r] = Simd::dot_pairs(dot[r], w, Simd::broadcast_i(record + 2 * kBlock * r + 4 * kPair));
      });
    });
  }
  repeat<kRows>([&](auto r) __attribute__((always_inline)) {
    const Simd::F s = Simd::as_float(Simd::broadcast_i(row_scales + 4 * r));
    acc[r] = Simd::fma(Simd::to_float(dot[r]), Simd::mul(scale.a, s), acc[r]);
    if constexpr (Kind::Scales::kHasMin) {
      acc[r] = Simd::fma(scale.b, Simd::as_float(Simd::broadcast_i(row_min_terms + 4 * r)), acc[r]);
    }
  });
}

// With few rows the weights come from memory and are used once: ask for those of the blocks to
// come. A matrix is read from end to end, so they lie at a fixed distance.
inline constexpr int kPrefetchRows = 4;
inline constexpr int64_t kPrefetchBytes = 16384;

KVANT_INLINE void prefetch_lines(const uint8_t* p, int64_t bytes) {
  // Not into the first-level cache, which has too few outstanding misses.
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 1);
}

template <typename Kind, int kRows>
void integer_product(const ProductArgs& args) {
  const int64_t num_blocks = args.cols / kBlock;
  const int64_t step = args.tile_bytes / num_blocks;
  const uint8_t* tile = args.tiles;
  for (int64_t row = 0; row < args.num_rows; row += kTileRows, tile += args.tile_bytes) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int lane = chunk * Simd::kLanes;
      if (row + lane >= args.num_rows) break;
      const uint8_t* codes = tile + 4 * lane;
      const uint8_t* record = args.panel;
      Simd::F acc[kRows];
      repeat<kRows>([&](auto r) __attribute__((always_inline)) { acc[r] = Simd::zero(); });
      for (int64_t block = 0; block < num_blocks; ++block) {
        if constexpr (kRows <= kPrefetchRows) {
          if (chunk == 0)
            prefetch_lines(tile + block * step + kPrefetchBytes, Kind::kBlockBytes + 64);
        }
        repeat<Kind::Scales::kSubBlocks>([&](auto sub) __attribute__((always_inline)) {
          constexpr int kSub = decltype(sub)::value;
          const Scale scale =
              Kind::Scales::template load<kSub>(tile + args.scale_offset, block, lane);
          add_sub_block<Kind, kRows, kSub>(codes, record, scale, acc);
        });
        codes += Kind::kBlockBytes;
        record += kQuantisedBlockBytes * kRows;
      }
      store_chunk<kRows>(args, row + lane, acc);
    }
  }
}

// ---- float product ----

struct KindF32 {
  static constexpr int kBytes = 4;
  static constexpr bool kRowScales = false;
  KVANT_INLINE static Simd::F load(const uint8_t* p) { return Simd::load_unaligned_f32(p); }
};
struct KindF16 {
  static constexpr int kBytes = 2;
  static constexpr bool kRowScales = false;
  KVANT_INLINE static Simd::F load(const uint8_t* p) { return Simd::load_f16(p); }
};
struct KindBF16 {
  static constexpr int kBytes = 2;
  static constexpr bool kRowScales = false;
  KVANT_INLINE static Simd::F load(const uint8_t* p) { return Simd::load_bf16(p); }
};

// The codes alone: the scale of a row is applied to its sum.
struct KindF8E4m3 {
  static constexpr int kBytes = 1;
  static constexpr bool kRowScales = true;
  KVANT_INLINE static Simd::F load(const uint8_t* p) { return Simd::load_e4m3(p); }
};

// kTiles tiles at once, so that few activation rows still give enough independent chains.
template <typename Kind, int kRows, int kTiles>
KVANT_INLINE void float_chunk(const ProductArgs& args, int64_t row, int lane) {
  const uint8_t* tile = args.tiles + row / kTileRows * args.tile_bytes + Kind::kBytes * lane;
  const uint8_t* record = args.panel;
  Simd::F acc[kTiles][kRows];
  repeat<kTiles * kRows>([&](auto i) __attribute__((always_inline)) {
    acc[i / kRows][i % kRows] = Simd::zero();
  });
  for (int64_t first = 0; first < args.cols; first += kBlock) {
    const int64_t inputs = args.cols - first < kBlock ? args.cols - first : kBlock;
    for (int64_t i = 0; i < inputs; ++i) {
      repeat<kTiles>([&](auto t) __attribute__((always_inline)) {
        const Simd::F w = Kind::load(tile + t * args.tile_bytes);
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          const Simd::F x =
              Simd::as_float(Simd::broadcast_i(record + kFloatBlockBytes * r + 4 * i));
          acc[t][r] = Simd::fma(w, x, acc[t][r]);
        });
      });
      tile += Kind::kBytes * kTileRows;
    }
    record += kFloatBlockBytes * kRows;
  }
  repeat<kTiles>([&](auto t) __attribute__((always_inline)) {
    if constexpr (Kind::kRowScales) {
      const Simd::F scale = Simd::load_unaligned_f32(
          args.tiles + (row / kTileRows + t) * args.tile_bytes + args.scale_offset + 4 * lane);
      repeat<kRows>([&](auto r) __attribute__((always_inline)) {
        acc[t][r] = Simd::mul(acc[t][r], scale);
      });
    }
    store_chunk<kRows>(args, row + t * kTileRows + lane, acc[t]);
  });
}

template <typename Kind, int kRows>
void float_product(const ProductArgs& args) {
  constexpr int kTiles = kRows <= 2 ? 4 : 1;
  int64_t row = 0;
  for (; row + kTiles * kTileRows <= args.num_rows; row += kTiles * kTileRows) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float_chunk<Kind, kRows, kTiles>(args, row, chunk * Simd::kLanes);
    }
  }
  for (; row < args.num_rows; row += kTileRows) {
    for (int chunk = 0; chunk < kChunks && row + chunk * Simd::kLanes < args.num_rows; ++chunk) {
      float_chunk<Kind, kRows, 1>(args, row, chunk * Simd::kLanes);
    }
  }
}

// ---- panels ----

void quantise_block(const float* x, int n, int row, uint8_t* record) {
  Simd::I magnitude = Simd::set1_i(0);
  for (int i = 0; i < kBlock; i += Simd::kLanes) {
    // As integers: finite magnitudes in order, Inf and NaN above them, so that NaN is not lost.
    magnitude =
        Simd::max_signed(magnitude, Simd::bit_and(Simd::load_i(x + i), Simd::set1_i(0x7fffffffu)));
  }
  const int32_t bits = Simd::max_of_lanes(magnitude);
  float amax;
  std::memcpy(&amax, &bits, 4);
  float scale = 0.0f;
  float inverse = 0.0f;
  if (!(amax < kMinActivation)) {
    scale = amax / kMaxActivationCode;
    inverse = kMaxActivationCode / amax;
  }
  const Simd::F factor = Simd::set1(inverse);
  uint8_t* codes = record + 2 * kBlock * row;
  int32_t sums[2];
  for (int half = 0; half < 2; ++half) {
    Simd::I sum = Simd::set1_i(0);
    for (int i = half * kBlock / 2; i < (half + 1) * kBlock / 2; i += Simd::kLanes) {
      const Simd::I code = Simd::round_to_int(Simd::mul(Simd::load(x + i), factor));
      sum = Simd::add_i(sum, code);
      Simd::store_low_halves(codes + 2 * i, code);
    }
    sums[half] = Simd::sum_of_lanes(sum);
  }
  const float min_term = scale * (static_cast<float>(sums[0]) + static_cast<float>(sums[1]));
  uint8_t* tail = record + 2 * kBlock * n + 4 * row;
  std::memcpy(tail, &scale, 4);
  std::memcpy(tail + 4 * n, &min_term, 4);
  for (int half = 0; half < 2; ++half) {
    const int32_t negative = static_cast<int32_t>(0u - static_cast<uint32_t>(sums[half]));
    std::memcpy(tail + (8 + 4 * half) * n, &negative, 4);
  }
}

template <typename Vectors>
KVANT_INLINE void split_single_row(uint8_t* record) {
  if constexpr (Vectors::kDotsBytes) Vectors::split_codes(record);
}

void quantise_panel(const float* const* rows, int n, int64_t cols, uint8_t* panel) {
  for (int row = 0; row < n; ++row) {
    for (int64_t block = 0; block < cols / kBlock; ++block) {
      uint8_t* record = panel + block * kQuantisedBlockBytes * n;
      quantise_block(rows[row] + block * kBlock, n, row, record);
      if (n == 1) split_single_row<Simd>(record);
    }
  }
}

void float_panel(const float* const* rows, int n, int64_t cols, uint8_t* panel) {
  for (int64_t first = 0; first < cols; first += kBlock) {
    const int64_t inputs = cols - first < kBlock ? cols - first : kBlock;
    for (int row = 0; row < n; ++row, panel += kFloatBlockBytes) {
      std::memcpy(panel, rows[row] + first, static_cast<size_t>(4 * inputs));
      std::memset(panel + 4 * inputs, 0, static_cast<size_t>(4 * (kBlock - inputs)));
    }
  }
}

// ---- table ----

template <template <typename, int> class Product, typename Kind>
constexpr void fill_kind(ProductFunction (&row)[kMaxPanelRows + 1]) {
  row[1] = Product<Kind, 1>::run;
  row[2] = Product<Kind, 2>::run;
  row[4] = Product<Kind, 4>::run;
  if constexpr (Simd::kMaxPanel >= 8) row[8] = Product<Kind, 8>::run;
  if constexpr (Simd::kMaxPanel >= 12) row[12] = Product<Kind, 12>::run;
}
template <typename Kind, int kRows>
struct Integer {
  static void run(const ProductArgs& args) { integer_product<Kind, kRows>(args); }
};
template <typename Kind, int kRows>
struct Float {
  static void run(const ProductArgs& args) { float_product<Kind, kRows>(args); }
};

constexpr Kernels make_kernels() {
  Kernels k{};
  fill_kind<Integer, KindQ4_0>(k.product[static_cast<int>(WeightKind::kQ4_0)]);
  fill_kind<Integer, KindQ4_1>(k.product[static_cast<int>(WeightKind::kQ4_1)]);
  fill_kind<Integer, KindQ5_0>(k.product[static_cast<int>(WeightKind::kQ5_0)]);
  fill_kind<Integer, KindQ5_1>(k.product[static_cast<int>(WeightKind::kQ5_1)]);
  fill_kind<Integer, KindQ8_0>(k.product[static_cast<int>(WeightKind::kQ8_0)]);
  fill_kind<Integer, KindQ4_K>(k.product[static_cast<int>(WeightKind::kQ4_K)]);
  fill_kind<Integer, KindQ5_K>(k.product[static_cast<int>(WeightKind::kQ5_K)]);
  fill_kind<Integer, KindQ6_K>(k.product[static_cast<int>(WeightKind::kQ6_K)]);
  fill_kind<Float, KindF32>(k.product[static_cast<int>(WeightKind::kF32)]);
  fill_kind<Float, KindF16>(k.product[static_cast<int>(WeightKind::kF16)]);
  fill_kind<Float, KindBF16>(k.product[static_cast<int>(WeightKind::kBF16)]);
  fill_kind<Float, KindF8E4m3>(k.product[static_cast<int>(WeightKind::kF8_E4M3)]);
  k.quantise_panel = quantise_panel;
  k.float_panel = float_panel;
  k.rms_norm = rms_norm;
  k.silu_gate = silu_gate;
  k.gelu_gate = gelu_gate;
  k.add = add;
  k.add_scaled = add_scaled;
  k.scale = scale;
  k.rope = rope;
  return k;
}

#undef KVANT_INLINE
