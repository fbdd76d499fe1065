// How the lanes of a tile's vectors hold codes and scales (matrix_layout.h), for kernels of any
// SIMD level: include it inside the level's namespace, after its Simd. Undefines nothing: who
// includes it ends with #undef KVANT_INLINE.

#define KVANT_INLINE inline __attribute__((always_inline))

template <int... kIndex, typename Use>
KVANT_INLINE void repeat_each(std::integer_sequence<int, kIndex...>, Use&& use) {
  (use(std::integral_constant<int, kIndex>{}), ...);
}
// use(0), ..., use(kCount - 1) with constant arguments, unrolled.
template <int kCount, typename Use>
KVANT_INLINE void repeat(Use&& use) {
  repeat_each(std::make_integer_sequence<int, kCount>{}, static_cast<Use&&>(use));
}

// ---- codes ----

// Moves the kWidth bits at bit kFrom of each 16-bit half to bit 4.
template <int kFrom>
KVANT_INLINE Simd::I move_to_bit_4(Simd::I v) {
  if constexpr (kFrom < 4) return Simd::shift_left_16<4 - kFrom>(v);
  if constexpr (kFrom > 4) return Simd::shift_right_16<kFrom - 4>(v);
  return v;
}

// Pair kPair of a block's codes as 16-bit numbers. `codes` is the block's first vector, at this
// chunk.
template <int kBits, int kPair>
KVANT_INLINE Simd::I unpack_pair(const uint8_t* codes) {
  constexpr int kVectorBytes = 4 * kTileRows;
  constexpr int kGroup = 2 * (kPair / 4) + kPair % 2;  // matrix_layout.h
  constexpr int kByte = kPair / 2 % 2;
  if constexpr (kBits == 8) {
    const Simd::I raw = Simd::load_i(codes + kGroup * kVectorBytes);
    return kByte == 0 ? Simd::bit_and(raw, Simd::set1_i(0x00ff00ffu))
                      : Simd::shift_right_16<8>(raw);
  } else {
    constexpr int kShift = 4 * (kPair % 4);
    Simd::I code = Simd::load_i(codes + kPair / 4 * kVectorBytes);
    if constexpr (kShift != 0) code = Simd::shift_right_16<kShift>(code);
    if constexpr (kShift != 12) code = Simd::bit_and(code, Simd::set1_i(0x000f000fu));
    if constexpr (kBits == 5) {
      const Simd::I high = Simd::load_i(codes + 4 * kVectorBytes);
      code =
          Simd::or_masked(code, move_to_bit_4<8 * kByte + kGroup>(high), Simd::set1_i(0x00100010u));
    }
    if constexpr (kBits == 6) {
      const Simd::I high = Simd::load_i(codes + (4 + kGroup / 4) * kVectorBytes);
      code = Simd::or_masked(code, move_to_bit_4<8 * kByte + 2 * (kGroup % 4)>(high),
                             Simd::set1_i(0x00300030u));
    }
    return code;
  }
}

// The four codes of group kGroup as bytes.
template <int kBits, int kGroup>
KVANT_INLINE Simd::I unpack_group(const uint8_t* codes) {
  constexpr int kVectorBytes = 4 * kTileRows;
  if constexpr (kBits == 8) {
    return Simd::load_i(codes + kGroup * kVectorBytes);
  } else {
    Simd::I code = Simd::load_i(codes + kGroup / 2 * kVectorBytes);
    if constexpr (kGroup % 2 == 1) code = Simd::shift_right_16<4>(code);
    code = Simd::bit_and(code, Simd::set1_i(0x0f0f0f0fu));
    if constexpr (kBits == 5) {
      const Simd::I high = Simd::load_i(codes + 4 * kVectorBytes);
      code = Simd::or_masked(code, move_to_bit_4<kGroup>(high), Simd::set1_i(0x10101010u));
    }
    if constexpr (kBits == 6) {
      const Simd::I high = Simd::load_i(codes + (4 + kGroup / 4) * kVectorBytes);
      code =
          Simd::or_masked(code, move_to_bit_4<2 * (kGroup % 4)>(high), Simd::set1_i(0x30303030u));
    }
    return code;
  }
}

// ---- scales ----

struct Scale {
  Simd::F a;
  Simd::F b;  // the minimum; only if the kind has one
};

// f16 a for each block: [block][16].
struct BlockScales {
  static constexpr bool kHasMin = false;
  static constexpr int kSubBlocks = 1;
  template <int>
  KVANT_INLINE static Scale load(const uint8_t* scales, int64_t block, int lane) {
    return {Simd::load_f16(scales + 2 * kTileRows * block + 2 * lane), Simd::zero()};
  }
};

// f16 a and b for each block: [block][a, b][16].
struct BlockScalesAndMins {
  static constexpr bool kHasMin = true;
  static constexpr int kSubBlocks = 1;
  template <int>
  KVANT_INLINE static Scale load(const uint8_t* scales, int64_t block, int lane) {
    const uint8_t* p = scales + 4 * kTileRows * block + 2 * lane;
    return {Simd::load_f16(p), Simd::load_f16(p + 2 * kTileRows)};
  }
};

// Q4_K, Q5_K: [super-block]: f16 d [16], f16 d_min [16], then for each block u8 scale [16], min
// [16].
struct SuperScalesAndMins {
  static constexpr bool kHasMin = true;
  static constexpr int kSubBlocks = 1;
  template <int>
  KVANT_INLINE static Scale load(const uint8_t* scales, int64_t block, int lane) {
    const uint8_t* p = scales + 20 * kTileRows * (block / 8);
    const uint8_t* fine = p + 4 * kTileRows + 2 * kTileRows * (block % 8) + lane;
    const Simd::F d_min = Simd::load_f16(p + 2 * kTileRows + 2 * lane);
    return {Simd::mul(Simd::load_f16(p + 2 * lane), Simd::load_u8(fine)),
            Simd::sub(Simd::zero(), Simd::mul(d_min, Simd::load_u8(fine + kTileRows)))};
  }
};

// Q6_K: [super-block]: f16 d [16], then for each half block i8 scale [16].
struct SuperScalesOfHalves {
  static constexpr bool kHasMin = false;
  static constexpr int kSubBlocks = 2;
  template <int kSub>
  KVANT_INLINE static Scale load(const uint8_t* scales, int64_t block, int lane) {
    const uint8_t* p = scales + 18 * kTileRows * (block / 8);
    const uint8_t* fine = p + 2 * kTileRows + kTileRows * (2 * (block % 8) + kSub) + lane;
    return {Simd::mul(Simd::load_f16(p + 2 * lane), Simd::load_i8(fine)), Simd::zero()};
  }
};

// w = a * (u - 2^kLogOffset) or, with a minimum, a * u + b.
template <int kBitsOfCode, int kLogOffsetOfCode, typename ScalesOfKind>
struct IntegerKind {
  static constexpr int kBits = kBitsOfCode;
  static constexpr int kLogOffset = kLogOffsetOfCode;
  static constexpr int kBlockBytes = kBlock * kTileRows * kBits / 8;
  using Scales = ScalesOfKind;
};
using KindQ4_0 = IntegerKind<4, 3, BlockScales>;
using KindQ4_1 = IntegerKind<4, 0, BlockScalesAndMins>;
using KindQ5_0 = IntegerKind<5, 4, BlockScales>;
using KindQ5_1 = IntegerKind<5, 0, BlockScalesAndMins>;
using KindQ8_0 = IntegerKind<8, 7, BlockScales>;
using KindQ4_K = IntegerKind<4, 0, SuperScalesAndMins>;
using KindQ5_K = IntegerKind<5, 0, SuperScalesAndMins>;
using KindQ6_K = IntegerKind<6, 5, SuperScalesOfHalves>;
