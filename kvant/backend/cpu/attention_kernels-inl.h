// The attention kernels, written once; included by the source of each SIMD level after it has
// defined KVANT_LEVEL, the level's namespace. See attention_kernels.h for what each pass does.

#include "kvant/backend/cpu/attention_fetch-inl.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_scales-inl.h"
#include "kvant/backend/cpu/attention_shape-inl.h"
#include "kvant/backend/cpu/attention_simd.h"
#include "kvant/backend/cpu/attention_softmax-inl.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

// Register tile of the products: query rows x vectors of tokens or channels.
#if defined(__AVX512F__)
constexpr int kTileRows = 4;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 2;
constexpr int kTileVectors = 2;
#else
constexpr int kTileRows = 1;
constexpr int kTileVectors = 1;
#endif
// Of products that decode in registers, where more rows share what is decoded.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kCodeRows = 4;
constexpr int code_vectors(int rows) {
  return rows > 2 ? 1 : 2;
}
#else
constexpr int kCodeRows = kTileRows;
constexpr int code_vectors(int) {
  return kTileVectors;
}
#endif

// ---- codes ----

alignas(64) constexpr float kE2m1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                               4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                               -2.0f, -3.0f, -4.0f, -6.0f};
// Codes of fewer than four bits leave bits of their neighbours in the index: the table repeats.
alignas(64) constexpr float kU4Values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float kU3Values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr float kU2Values[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};

// A row of codes: kCount elements in each of sixteen lanes. unpack() gives their values; formats of
// up to four bits give table indices instead, so that a channel's scale can go into its table.
template <Code C>
struct Row;

template <>
struct Row<Code::kBf16> {
  static constexpr int kCount = 2, kBytes = 64;
  KVANT_INLINE static void unpack(const uint8_t* p, F* out) {
    const I w = load_i(p);
    out[0] = as_float(shl(w, 16));
    out[1] = as_float(and_(w, bcast_i(0xffff0000u)));
  }
};

template <>
struct Row<Code::kF16> {
  static constexpr int kCount = 2, kBytes = 64;
  KVANT_INLINE static void unpack(const uint8_t* p, F* out) {
    const I w = load_i(p);
    out[0] = from_half(and_(w, bcast_i(0xffffu)));
    out[1] = from_half(shr(w, 16));
  }
};

// E4M3 as f16: sign stays on top, exponent and mantissa go one place down; the value is 2^-8 times
// the true one because of the exponent bias, and f16 holds its subnormals.
template <>
struct Row<Code::kE4m3> {
  static constexpr int kCount = 4, kBytes = 64;
  KVANT_INLINE static void unpack(const uint8_t* p, F* out) {
    const I w = load_i(p);
#if defined(__AVX512F__)
    const I bits = bcast_i(0xbf80bf80u);
    const I odd = and_(sra_halves(w, 1), bits);
    const I even = and_(sra_halves(shl_halves(w, 8), 1), bits);
    out[0] = from_low_half(even);
    out[1] = from_low_half(odd);
    out[2] = from_half(shr(even, 16));
    out[3] = from_half(shr(odd, 16));
#else
    unroll<4>([&](auto j) {
      constexpr int n = decltype(j)::value;
      const I top = n == 3 ? w : shl(w, 24 - 8 * n);
      out[n] = from_half(shr(and_(sra(top, 1), bcast_i(0xbf800000u)), 16));
    });
#endif
  }
};

template <>
struct Row<Code::kE5m2> {
  static constexpr int kCount = 4, kBytes = 64;
  KVANT_INLINE static void unpack(const uint8_t* p, F* out) {
    const I w = load_i(p);
    out[0] = from_half(and_(shl(w, 8), bcast_i(0xff00u)));
    out[1] = from_half(and_(w, bcast_i(0xff00u)));
    out[2] = from_half(and_(shr(w, 8), bcast_i(0xff00u)));
    out[3] = from_half(and_(shr(w, 16), bcast_i(0xff00u)));
  }
};

template <>
struct Row<Code::kS8> {
  static constexpr int kCount = 4, kBytes = 64;
  KVANT_INLINE static void unpack(const uint8_t* p, F* out) {
    const I w = load_i(p);
    unroll<4>([&](auto j) {
      constexpr int n = decltype(j)::value;
      out[n] = to_float(sra(n == 3 ? w : shl(w, 24 - 8 * n), 24));
    });
  }
};

template <Code C>
struct TableRow {
  static constexpr int kBits = C == Code::kU2 ? 2 : 4;
  static constexpr int kCount = 32 / kBits, kBytes = 64;
  KVANT_INLINE static const float* values() {
    return C == Code::kE2m1 ? kE2m1Values : C == Code::kU2 ? kU2Values : kU4Values;
  }
  KVANT_INLINE static void indices(const uint8_t* p, I* out) {
    const I w = load_i(p);
    unroll<kCount>([&](auto j) {
      constexpr int n = decltype(j)::value;
      out[n] = n == 0 ? w : shr(w, kBits * n);
    });
  }
  KVANT_INLINE static void unpack(const uint8_t* p, F* out) {
    const Table t = load_table(values());
    I index[kCount];
    indices(p, index);
    unroll<kCount>([&](auto j) { out[j.value] = lookup(t, index[j.value]); });
  }
};

template <>
struct Row<Code::kE2m1> : TableRow<Code::kE2m1> {};
template <>
struct Row<Code::kU4> : TableRow<Code::kU4> {};
template <>
struct Row<Code::kU2> : TableRow<Code::kU2> {};

// Sixteen words of the low two bits, then sixteen half-words of the high bit.
template <>
struct Row<Code::kU3> {
  static constexpr int kCount = 16, kBytes = 96;
  KVANT_INLINE static const float* values() { return kU3Values; }
  KVANT_INLINE static void indices(const uint8_t* p, I* out) {
    const I low = load_i(p);
    const I high = load_u16(p + 64);
    const I two_bits = bcast_i(3);
    unroll<16>([&](auto j) {
      constexpr int n = decltype(j)::value;
      const I a = n == 0 ? low : shr(low, 2 * n);
      const I b = n < 2 ? shl(high, 2 - n) : n == 2 ? high : shr(high, n - 2);
      out[n] = merge_bits(two_bits, a, b);
    });
  }
};

template <Code C>
constexpr bool is_table() {
  return C == Code::kE2m1 || C == Code::kU4 || C == Code::kU3 || C == Code::kU2;
}

// ---- scales ----

enum class Apply { kNothing, kScale, kPair };

template <Apply A>
KVANT_INLINE F apply_scale(F value, F scale, F zero_point) {
  if constexpr (A == Apply::kNothing) return value;
  if constexpr (A == Apply::kScale) return mul(value, scale);
  return fma(value, scale, zero_point);
}

// Calls f(Int<code>) with the code as a constant: one instantiation of a pass for each.
template <typename Fn>
KVANT_INLINE void with_code(Code code, Fn&& f) {
  switch (code) {
    case Code::kBf16: return f(Int<static_cast<int>(Code::kBf16)>{});
    case Code::kF16: return f(Int<static_cast<int>(Code::kF16)>{});
    case Code::kE4m3: return f(Int<static_cast<int>(Code::kE4m3)>{});
    case Code::kE5m2: return f(Int<static_cast<int>(Code::kE5m2)>{});
    case Code::kS8: return f(Int<static_cast<int>(Code::kS8)>{});
    case Code::kE2m1: return f(Int<static_cast<int>(Code::kE2m1)>{});
    case Code::kU4: return f(Int<static_cast<int>(Code::kU4)>{});
    case Code::kU2: return f(Int<static_cast<int>(Code::kU2)>{});
    case Code::kU3: return;  // by channel only
  }
}

// ---- decode K: tokens in the lanes ----

template <Code C, Apply A>
void decode_k_blocks(const DecodeArgs& a) {
  using R = Row<C>;
  const int num_blocks = A == Apply::kNothing ? 1 : (a.head_dim + a.block - 1) / a.block;
  const int block = A == Apply::kNothing ? a.head_dim : a.block;
  const int side_bytes = kLanes * scale_stride(a.scale);
  const float factor = C == Code::kE4m3 && A != Apply::kNothing ? kE4m3Factor : 1.0f;
  const int num_tiles = (a.token_end + kLanes - 1) / kLanes;
  const uint8_t* codes = a.codes;
  for (int tile = 0; tile < num_tiles; ++tile) {
    float* out = a.out + tile * kLanes;
    for (int b = 0; b < num_blocks; ++b) {
      ScalePair side = {};
      if constexpr (A != Apply::kNothing) {
        side = load_scales(a.scale, a.scales + (tile * num_blocks + b) * side_bytes, 0,
                           side_bytes / 2);
        if constexpr (C == Code::kE4m3) side.scale = mul(side.scale, bcast(factor));
      }
      const int end = (b + 1) * block < a.head_dim ? (b + 1) * block : a.head_dim;
      for (int c = b * block; c < end; c += R::kCount) {
        F value[R::kCount];
        R::unpack(codes, value);
        codes += R::kBytes;
        unroll<R::kCount>([&](auto j) {
          store(out + (c + j.value) * a.page_tokens,
                apply_scale<A>(value[j.value], side.scale, side.zero));
        });
      }
    }
  }
}

// Scale and zero of a channel are constant over the page: they go into the channel's table of
// values.
template <Code C>
void decode_k_channels(const DecodeArgs& a) {
  using R = Row<C>;
  float* scale = a.scratch;
  float* zero_point = a.scratch + a.head_dim;
  for (int c = 0; c < a.head_dim; c += kLanes) {
    store(scale + c, load_f16(a.scales + 2 * c));
    store(zero_point + c, load_f16(a.scales + 2 * (a.head_dim + c)));
  }
  const F levels = load(R::values());
  const int num_tiles = (a.token_end + kLanes - 1) / kLanes;
  const int64_t tile_bytes = static_cast<int64_t>(a.head_dim / R::kCount) * R::kBytes;
  for (int c = 0; c < a.head_dim; c += R::kCount) {
    Table tables[R::kCount];
    unroll<R::kCount>([&](auto j) {
      const F value = mul(levels, bcast(scale[c + j.value]));
      tables[j.value] = table(add(value, bcast(zero_point[c + j.value])));
    });
    const uint8_t* codes = a.codes + c / R::kCount * R::kBytes;
    for (int tile = 0; tile < num_tiles; ++tile, codes += tile_bytes) {
      I index[R::kCount];
      R::indices(codes, index);
      float* out = a.out + c * a.page_tokens + tile * kLanes;
      unroll<R::kCount>([&](auto j) {
        store(out + j.value * a.page_tokens, lookup(tables[j.value], index[j.value]));
      });
    }
  }
}

void decode_k(const DecodeArgs& a) {
  if (a.scale == PageScale::kChannelPair) {
    if (a.code == Code::kU4) return decode_k_channels<Code::kU4>(a);
    if (a.code == Code::kU3) return decode_k_channels<Code::kU3>(a);
    return decode_k_channels<Code::kU2>(a);
  }
  with_code(a.code, [&](auto code) {
    constexpr Code C = static_cast<Code>(decltype(code)::value);
    if (a.scale == PageScale::kNone) return decode_k_blocks<C, Apply::kNothing>(a);
    if (a.scale == PageScale::kF16Pair) return decode_k_blocks<C, Apply::kPair>(a);
    decode_k_blocks<C, Apply::kScale>(a);
  });
}

// ---- decode V: channels in the lanes ----

template <Code C, Apply A>
void decode_v_blocks(const DecodeArgs& a) {
  using R = Row<C>;
  const int tokens = a.page_tokens;
  float* scale = a.scratch;
  float* zero_point = a.scratch + tokens;
  const int row_groups = (a.token_end + R::kCount - 1) / R::kCount;
  for (int c = 0; c < a.head_dim; c += kLanes) {
    if (A != Apply::kNothing && c % a.block == 0) {
      const uint8_t* sides = a.scales + c / a.block * tokens * scale_stride(a.scale);
      for (int t = 0; t < tokens; t += kLanes) {
        ScalePair side = load_scales(a.scale, sides, t, 2 * tokens);
        if constexpr (C == Code::kE4m3) side.scale = mul(side.scale, bcast(kE4m3Factor));
        store(scale + t, side.scale);
        if constexpr (A == Apply::kPair) store(zero_point + t, side.zero);
      }
    }
    const uint8_t* codes =
        a.codes + static_cast<int64_t>(c / kLanes) * (tokens / R::kCount) * R::kBytes;
    float* out = a.out + static_cast<int64_t>(c) * tokens;
    for (int g = 0; g < row_groups; ++g, codes += R::kBytes) {
      F value[R::kCount];
      R::unpack(codes, value);
      unroll<R::kCount>([&](auto j) {
        const int t = g * R::kCount + j.value;
        F s = {}, z = {};
        if constexpr (A != Apply::kNothing) s = bcast(scale[t]);
        if constexpr (A == Apply::kPair) z = bcast(zero_point[t]);
        store(out + t * kLanes, apply_scale<A>(value[j.value], s, z));
      });
    }
  }
}

void decode_v(const DecodeArgs& a) {
  with_code(a.code, [&](auto code) {
    constexpr Code C = static_cast<Code>(decltype(code)::value);
    if (a.scale == PageScale::kNone) return decode_v_blocks<C, Apply::kNothing>(a);
    if (a.scale == PageScale::kF16Pair) return decode_v_blocks<C, Apply::kPair>(a);
    decode_v_blocks<C, Apply::kScale>(a);
  });
}

// ---- products ----

template <int M, int N>
void score_tile(const ScoreArgs& a, const float* q, const float* k, float* s, Fetcher& fetcher) {
  F acc[M][N];
  unroll<M>([&](auto m) { unroll<N>([&](auto n) { acc[m.value][n.value] = zero(); }); });
  for (int c = 0; c < a.head_dim; ++c, k += a.page_tokens) {
    F key[N];
    unroll<N>([&](auto n) { key[n.value] = load(k + n.value * kLanes); });
    unroll<M>([&](auto m) {
      const F query = bcast(q[m.value * a.head_dim + c]);
      unroll<N>(
          [&](auto n) { acc[m.value][n.value] = fma(query, key[n.value], acc[m.value][n.value]); });
    });
    fetcher.step();
  }
  unroll<M>([&](auto m) {
    unroll<N>([&](auto n) {
      store(s + m.value * a.page_tokens + n.value * kLanes, acc[m.value][n.value]);
    });
  });
}

void scores(const ScoreArgs& a) {
  Fetcher fetcher(a.fetch,
                  steps_of(a.num_tiles, kTileVectors) * steps_of(a.rows, kTileRows) * a.head_dim);
  for (int tile = 0; tile < a.num_tiles; tile += kTileVectors) {
    const int n_tiles = a.num_tiles - tile;
    for (int r = 0; r < a.rows; r += kTileRows) {
      const float* q = a.q + static_cast<int64_t>(r) * a.head_dim;
      float* s = a.s + static_cast<int64_t>(r) * a.page_tokens + tile * kLanes;
      with_count<kTileRows>(a.rows - r, [&](auto m) {
        with_count<kTileVectors>(n_tiles, [&](auto n) {
          score_tile<decltype(m)::value, decltype(n)::value>(a, q, a.k + tile * kLanes, s, fetcher);
        });
      });
    }
  }
}

template <int M, int N>
void value_tile(const ValueArgs& a, int row, const float* v, float* out, Fetcher& fetcher) {
  const float* p = a.p + static_cast<int64_t>(row) * a.page_tokens;
  const int64_t group_stride = static_cast<int64_t>(a.page_tokens) * kLanes;
  F acc[M][N];
  unroll<M>([&](auto m) {
    const F factor = bcast(a.factor[row + m.value]);
    unroll<N>([&](auto n) {
      acc[m.value][n.value] = mul(load(out + m.value * a.acc_stride + n.value * kLanes), factor);
    });
  });
  for (int t = a.token_begin; t < a.token_end; ++t) {
    F value[N];
    unroll<N>([&](auto n) { value[n.value] = load(v + n.value * group_stride + t * kLanes); });
    unroll<M>([&](auto m) {
      const F weight = bcast(p[m.value * a.page_tokens + t]);
      unroll<N>([&](auto n) {
        acc[m.value][n.value] = fma(weight, value[n.value], acc[m.value][n.value]);
      });
    });
    fetcher.step();
  }
  unroll<M>([&](auto m) {
    unroll<N>([&](auto n) {
      store(out + m.value * a.acc_stride + n.value * kLanes, acc[m.value][n.value]);
    });
  });
}

void values(const ValueArgs& a) {
  const int groups = a.head_dim / kLanes;
  Fetcher fetcher(a.fetch, steps_of(groups, kTileVectors) * steps_of(a.rows, kTileRows) *
                               (a.token_end - a.token_begin));
  for (int g = 0; g < groups; g += kTileVectors) {
    const float* v = a.v + static_cast<int64_t>(g) * a.page_tokens * kLanes;
    for (int r = 0; r < a.rows; r += kTileRows) {
      float* out = a.acc + r * a.acc_stride + g * kLanes;
      with_count<kTileRows>(a.rows - r, [&](auto m) {
        with_count<kTileVectors>(groups - g, [&](auto n) {
          value_tile<decltype(m)::value, decltype(n)::value>(a, r, v, out, fetcher);
        });
      });
    }
  }
}

// ---- products that decode in registers ----

// For few query rows: what a page's decoded side would cost to store and load again is more than
// decoding it once for each tile of rows. The operations on a row are those of the passes above, in
// their order.

constexpr bool is_float(Code code) {
  return code == Code::kBf16 || code == Code::kF16 || code == Code::kE4m3 || code == Code::kE5m2;
}

// Calls f(Int<code>, Int<apply>) for the sides that these products read.
template <typename Fn>
KVANT_INLINE void with_float_side(const DecodeArgs& d, Fn&& f) {
  with_code(d.code, [&](auto code) {
    if constexpr (is_float(static_cast<Code>(decltype(code)::value))) {
      if constexpr (static_cast<Code>(decltype(code)::value) == Code::kE4m3) {
        if (d.scale != PageScale::kNone) return f(code, Int<static_cast<int>(Apply::kScale)>{});
      }
      f(code, Int<static_cast<int>(Apply::kNothing)>{});
    }
  });
}

template <Code C>
constexpr float code_factor() {
  return C == Code::kE4m3 ? kE4m3Factor : 1.0f;
}

template <Code C, Apply A, int M, int N>
void score_codes_tile(const DecodeArgs& d, const ScoreArgs& a, int row, int tile,
                      Fetcher& fetcher) {
  using R = Row<C>;
  const int block = A == Apply::kNothing ? a.head_dim : d.block;
  const int num_blocks = (a.head_dim + block - 1) / block;
  const int side_bytes = kLanes * scale_stride(d.scale);
  const int64_t tile_bytes = static_cast<int64_t>(a.head_dim / R::kCount) * R::kBytes;
  const uint8_t* codes = d.codes + tile * tile_bytes;
  const float* q = a.q + static_cast<int64_t>(row) * a.head_dim;
  F acc[M][N];
  unroll<M>([&](auto m) { unroll<N>([&](auto n) { acc[m.value][n.value] = zero(); }); });
  for (int b = 0; b < num_blocks; ++b) {
    F scale[N];
    unroll<N>([&](auto n) {
      scale[n.value] = zero();
      if constexpr (A != Apply::kNothing) {
        const uint8_t* side = d.scales + ((tile + n.value) * num_blocks + b) * side_bytes;
        scale[n.value] = mul(load_scales(d.scale, side, 0, 0).scale, bcast(code_factor<C>()));
      }
    });
    const int end = (b + 1) * block < a.head_dim ? (b + 1) * block : a.head_dim;
    for (int c = b * block; c < end; c += R::kCount, codes += R::kBytes) {
      unroll<N>([&](auto n) {
        F key[R::kCount];
        R::unpack(codes + n.value * tile_bytes, key);
        unroll<R::kCount>([&](auto j) {
          key[j.value] = apply_scale<A>(key[j.value], scale[n.value], zero());
          unroll<M>([&](auto m) {
            acc[m.value][n.value] = fma(bcast(q[m.value * a.head_dim + c + j.value]), key[j.value],
                                        acc[m.value][n.value]);
          });
        });
      });
      fetcher.step();
    }
  }
  unroll<M>([&](auto m) {
    unroll<N>([&](auto n) {
      store(a.s + (row + m.value) * a.page_tokens + (tile + n.value) * kLanes,
            acc[m.value][n.value]);
    });
  });
}

void scores_of_codes(const DecodeArgs& d, const ScoreArgs& a) {
  with_float_side(d, [&](auto code, auto apply) {
    constexpr Code C = static_cast<Code>(decltype(code)::value);
    constexpr Apply A = static_cast<Apply>(decltype(apply)::value);
    const int most = code_vectors(a.rows);
    Fetcher fetcher(a.fetch, steps_of(a.num_tiles, most) * steps_of(a.rows, kCodeRows) *
                                 (a.head_dim / Row<C>::kCount));
    for (int tile = 0; tile < a.num_tiles;) {
      const int left = a.num_tiles - tile;
      tile += with_power<kTileVectors>(left < most ? left : most, [&](auto n) {
        for (int r = 0; r < a.rows; r += kCodeRows) {
          with_count<kCodeRows>(a.rows - r, [&](auto m) {
            score_codes_tile<C, A, decltype(m)::value, decltype(n)::value>(d, a, r, tile, fetcher);
          });
        }
      });
    }
  });
}

// `scale` [tokens] if A is kScale.
template <Code C, Apply A, int M, int N>
void value_codes_tile(const DecodeArgs& d, const ValueArgs& a, int row, int group,
                      const float* scale, Fetcher& fetcher) {
  using R = Row<C>;
  const int64_t group_bytes = static_cast<int64_t>(a.page_tokens / R::kCount) * R::kBytes;
  const uint8_t* codes = d.codes + group * group_bytes;
  const float* p = a.p + static_cast<int64_t>(row) * a.page_tokens;
  float* out = a.acc + row * a.acc_stride + group * kLanes;
  F acc[M][N];
  unroll<M>([&](auto m) {
    const F factor = bcast(a.factor[row + m.value]);
    unroll<N>([&](auto n) {
      acc[m.value][n.value] = mul(load(out + m.value * a.acc_stride + n.value * kLanes), factor);
    });
  });
  for (int t = 0; t < a.token_end; t += R::kCount, codes += R::kBytes) {
    unroll<N>([&](auto n) {
      F value[R::kCount];
      R::unpack(codes + n.value * group_bytes, value);
      unroll<R::kCount>([&](auto j) {
        if (t + j.value < a.token_end) {
          F side = zero();
          if constexpr (A != Apply::kNothing) side = bcast(scale[t + j.value]);
          const F v = apply_scale<A>(value[j.value], side, zero());
          unroll<M>([&](auto m) {
            acc[m.value][n.value] =
                fma(bcast(p[m.value * a.page_tokens + t + j.value]), v, acc[m.value][n.value]);
          });
        }
      });
    });
    fetcher.step();
  }
  unroll<M>([&](auto m) {
    unroll<N>([&](auto n) {
      store(out + m.value * a.acc_stride + n.value * kLanes, acc[m.value][n.value]);
    });
  });
}

void values_of_codes(const DecodeArgs& d, const ValueArgs& a) {
  with_float_side(d, [&](auto code, auto apply) {
    constexpr Code C = static_cast<Code>(decltype(code)::value);
    constexpr Apply A = static_cast<Apply>(decltype(apply)::value);
    const int groups = a.head_dim / kLanes;
    const int block_groups =
        A == Apply::kNothing || d.block >= a.head_dim ? groups : d.block / kLanes;
    const int most = code_vectors(a.rows);
    const int step = block_groups < most ? block_groups : most;
    Fetcher fetcher(a.fetch, steps_of(groups, step) * steps_of(a.rows, kCodeRows) *
                                 steps_of(a.token_end, Row<C>::kCount));
    for (int block = 0; block * block_groups < groups; ++block) {
      if constexpr (A != Apply::kNothing) {
        const uint8_t* sides = d.scales + block * a.page_tokens * scale_stride(d.scale);
        for (int t = 0; t < a.page_tokens; t += kLanes) {
          store(d.scratch + t,
                mul(load_scales(d.scale, sides, t, 0).scale, bcast(code_factor<C>())));
        }
      }
      const int end = (block + 1) * block_groups < groups ? (block + 1) * block_groups : groups;
      for (int g = block * block_groups; g < end;) {
        g += with_power<kTileVectors>(end - g < step ? end - g : step, [&](auto n) {
          for (int r = 0; r < a.rows; r += kCodeRows) {
            with_count<kCodeRows>(a.rows - r, [&](auto m) {
              value_codes_tile<C, A, decltype(m)::value, decltype(n)::value>(d, a, r, g, d.scratch,
                                                                             fetcher);
            });
          }
        });
      }
    }
  });
}

// ---- small passes ----

void dot_rows(const float* q, int rows, int head_dim, const float* x, float* out) {
  for (int r = 0; r < rows; ++r, q += head_dim) {
    F sum = zero();
    for (int c = 0; c < head_dim; c += kLanes) sum = fma(load(q + c), load(x + c), sum);
    out[r] = sum_lanes(sum);
  }
}

void scale_rows(float* acc, int64_t stride, int rows, int width, const float* factor) {
  for (int r = 0; r < rows; ++r, acc += stride) {
    for (int c = 0; c < width; c += kLanes) store(acc + c, mul(load(acc + c), bcast(factor[r])));
  }
}

void merge(const PartialRows& to, const PartialRows& from, int rows, int width) {
  for (int r = 0; r < rows; ++r) {
    const float new_max = to.max[r] > from.max[r] ? to.max[r] : from.max[r];
    float factor[2][kLanes];
    store(factor[0], exp_lanes(bcast(to.max[r] - new_max)));
    store(factor[1], exp_lanes(bcast(from.max[r] - new_max)));
    const float a = factor[0][0], b = factor[1][0];
    to.max[r] = new_max;
    to.sum[r] = to.sum[r] * a + from.sum[r] * b;
    to.share[r] = to.share[r] * a + from.share[r] * b;
    float* x = to.acc + r * to.stride;
    const float* y = from.acc + r * from.stride;
    for (int c = 0; c < width; c += kLanes) {
      store(x + c, fma(load(x + c), bcast(a), mul(load(y + c), bcast(b))));
    }
  }
}

// Orthonormal Hadamard blocks down the channels of sixteen tokens (codecs.md section 3, +rot).
void unrotate_tile(float* k, int head_dim, int stride) {
  const int block = head_dim & -head_dim;
  for (int step = 1; step < block; step *= 2) {
    for (int c = 0; c < head_dim; ++c) {
      if ((c & step) != 0) continue;
      float* low = k + static_cast<int64_t>(c) * stride;
      float* high = low + static_cast<int64_t>(step) * stride;
      const F a = load(low), b = load(high);
      store(low, add(a, b));
      store(high, sub(a, b));
    }
  }
  const F norm = bcast(1.0f / __builtin_sqrtf(static_cast<float>(block)));
  for (int c = 0; c < head_dim; ++c) store(k + c * stride, mul(load(k + c * stride), norm));
}

void pre_rope(const PreRopeArgs& a) {
  const int half = a.rotary_dim / 2;
  for (int tile = 0; tile < a.num_tiles; ++tile) {
    float* k = a.k + tile * kLanes;
    const auto at = [&](int c) { return k + static_cast<int64_t>(c) * a.page_tokens; };
    if (a.mean != nullptr || a.bias != nullptr) {
      for (int c = 0; c < a.head_dim; ++c) {
        float term = a.bias != nullptr ? a.bias[c] : 0.0f;
        if (a.mean != nullptr) {
          term += __builtin_bit_cast(float, static_cast<uint32_t>(a.mean[c]) << 16);
        }
        store(at(c), add(load(at(c)), bcast(term)));
      }
    }
    if (a.rotated) unrotate_tile(k, a.head_dim, a.page_tokens);
    if (a.smooth != nullptr) {
      for (int c = 0; c < a.head_dim; ++c) store(at(c), mul(load(at(c)), bcast(a.smooth[c])));
    }
    for (int i = 0; i < half; ++i) {
      const int64_t row = static_cast<int64_t>(i) * a.page_tokens + tile * kLanes;
      const F page_cos = bcast(a.page_cos[i]), page_sin = bcast(a.page_sin[i]);
      const F token_cos = load(a.token_cos + row), token_sin = load(a.token_sin + row);
      const F cosine = sub(mul(page_cos, token_cos), mul(page_sin, token_sin));
      const F sine = fma(page_sin, token_cos, mul(page_cos, token_sin));
      const F x = load(at(i)), y = load(at(i + half));
      store(at(i), sub(mul(x, cosine), mul(y, sine)));
      store(at(i + half), fma(x, sine, mul(y, cosine)));
    }
  }
}

}  // namespace

#if defined(KVANT_HALF_RATE_512)
extern const AttentionKernels kHalfRateKernels;
const AttentionKernels kHalfRateKernels = {
    decode_k,        decode_v,      scores,   scores_of_codes, softmax, values,
    values_of_codes, pre_rope,      dot_rows, scale_rows,      merge,   &kHalfRateIntegerKernels,
    nullptr,         &kBf16Kernels, true};
#else
#if defined(__AVX2__)
constexpr const IntegerKernels* kInteger = &kIntegerKernels;
#else
constexpr const IntegerKernels* kInteger = nullptr;
#endif

extern const AttentionKernels kAttentionKernels;
const AttentionKernels kAttentionKernels = {
    decode_k, decode_v,        scores,   scores_of_codes, softmax,
    values,   values_of_codes, pre_rope, dot_rows,        scale_rows,
    merge,    kInteger,        nullptr,  nullptr,         false};
#endif

}  // namespace kvant::backend::cpu::KVANT_LEVEL
