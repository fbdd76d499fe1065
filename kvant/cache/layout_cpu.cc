// planar <-> cpu, word-wise: the part of closing a page that is not the codec's.
#include <algorithm>
#include <cstring>

#include "kvant/base/check.h"
#include "kvant/cache/layout.h"
#include "kvant/cache/word_vectors.h"

namespace kvant::cache::internal {

using formats::BlockAxis;
using formats::ConstPlanarSide;
using formats::PlanarSide;

namespace {

constexpr int kTile = 16;

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <typename T>
void store(uint8_t* p, T value) {
  std::memcpy(p, &value, sizeof(T));
}

// Transposes an 8 x 8 matrix of bytes held in eight words, byte j of word i becoming byte i of word
// j.
void transpose_bytes(uint64_t x[8]) {
  for (int i = 0; i < 8; i += 2) {
    const uint64_t t = ((x[i] >> 8) ^ x[i + 1]) & 0x00ff00ff00ff00ffull;
    x[i] ^= t << 8;
    x[i + 1] ^= t;
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = i; j < i + 2; ++j) {
      const uint64_t t = ((x[j] >> 16) ^ x[j + 2]) & 0x0000ffff0000ffffull;
      x[j] ^= t << 16;
      x[j + 2] ^= t;
    }
  }
  for (int j = 0; j < 4; ++j) {
    const uint64_t t = ((x[j] >> 32) ^ x[j + 4]) & 0x00000000ffffffffull;
    x[j] ^= t << 32;
    x[j + 4] ^= t;
  }
}

// Eight nibbles to the low halves of eight bytes.
uint64_t spread_nibbles(uint32_t word) {
  uint64_t x = word;
  x = (x | x << 16) & 0x0000ffff0000ffffull;
  x = (x | x << 8) & 0x00ff00ff00ff00ffull;
  return (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
}

using Doubles = uint64_t __attribute__((vector_size(16)));

// The lowest eight elements of kBits to eight bytes.
template <int kBits>
uint64_t spread_bits(uint64_t x) {
  constexpr uint64_t kOne = (1u << kBits) - 1, kTwo = (1u << 2 * kBits) - 1;
  constexpr uint64_t kFour = (1u << 4 * kBits) - 1;
  x = (x & kFour) | (x & kFour << 4 * kBits) << (32 - 4 * kBits);
  constexpr uint64_t kPairs = kTwo | kTwo << 32;
  x = (x & kPairs) | (x & kPairs << 2 * kBits) << (16 - 2 * kBits);
  constexpr uint64_t kSingles = kOne | kOne << 16 | kOne << 32 | kOne << 48;
  return (x & kSingles) | (x & kSingles << kBits) << (8 - kBits);
}

// Two-bit codes of four rows, joined to bytes.
Bytes join_four(const Bytes (&codes)[4]) {
  return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6;
}

// Sixteen columns of e = 32 / kBits rows: word j holds element j of every row. `rows` are 2 * kBits
// bytes each (sixteen elements), `stride` bytes apart.
template <int kBits>
struct Columns;

template <>
struct Columns<4> {
  static void pack(const uint8_t* rows, int64_t stride, uint8_t* words) {
    Halves pairs[4];  // [byte][row]: of rows 2i and 2i + 1
    for (int i = 0; i < 4; ++i) {
      const uint8_t* row = rows + 2 * i * stride;
      pairs[i] = (Halves)interleave_low(eight_bytes(row), eight_bytes(row + stride));
    }
    const auto a = (Words)interleave_low(pairs[0], pairs[1]);
    const auto b = (Words)interleave_low(pairs[2], pairs[3]);
    const auto c = (Words)interleave_high(pairs[0], pairs[1]);
    const auto d = (Words)interleave_high(pairs[2], pairs[3]);
    // Two bytes of all eight rows each: four elements.
    store_elements(interleave_low(a, b), words);
    store_elements(interleave_high(a, b), words + 16);
    store_elements(interleave_low(c, d), words + 32);
    store_elements(interleave_high(c, d), words + 48);
  }
  static void unpack(const uint8_t* words, int64_t stride, uint8_t* rows) {
    uint64_t x[8];
    for (int b = 0; b < 8; ++b) {
      x[b] = spread_nibbles(load<uint32_t>(words + 8 * b)) |
             spread_nibbles(load<uint32_t>(words + 8 * b + 4)) << 4;
    }
    transpose_bytes(x);
    for (int r = 0; r < 8; ++r) store(rows + r * stride, x[r]);
  }

 private:
  static Bytes eight_bytes(const uint8_t* p) { return (Bytes)Doubles{load<uint64_t>(p), 0}; }
  // The nibbles of each half's bytes, one after the other.
  static Halves join_nibbles(Halves x) { return (x | x >> 4) & 0xff; }
  static void store_elements(Words two_bytes, uint8_t* words) {
    const auto x = (Halves)two_bytes;
    const auto all = (Words)low_bytes(join_nibbles(x & 0x0f0f), join_nibbles(x >> 4 & 0x0f0f));
    store_words(words, __builtin_shufflevector(all, all, 0, 2, 1, 3));
  }
};

template <>
struct Columns<8> {
  static void pack(const uint8_t* rows, int64_t stride, uint8_t* words) {
    const Bytes x[4] = {load_vector<Bytes>(rows), load_vector<Bytes>(rows + stride),
                        load_vector<Bytes>(rows + 2 * stride),
                        load_vector<Bytes>(rows + 3 * stride)};
    store_byte_columns(x, words);
  }
  static void unpack(const uint8_t* words, int64_t stride, uint8_t* rows) {
    for (int r = 0; r < 4; ++r) {
      for (int j = 0; j < kTile; ++j) rows[r * stride + j] = words[4 * j + r];
    }
  }
};

template <>
struct Columns<16> {
  static void pack(const uint8_t* rows, int64_t stride, uint8_t* words) {
    for (int j = 0; j < kTile; j += 8) {
      const auto a = load_vector<Halves>(rows + 2 * j);
      const auto b = load_vector<Halves>(rows + stride + 2 * j);
      store_words(words + 4 * j, interleave_low(a, b));
      store_words(words + 4 * j + 16, interleave_high(a, b));
    }
  }
  static void unpack(const uint8_t* words, int64_t stride, uint8_t* rows) {
    for (int j = 0; j < kTile; ++j) {
      store(rows + 2 * j, load<uint16_t>(words + 4 * j));
      store(rows + stride + 2 * j, load<uint16_t>(words + 4 * j + 2));
    }
  }
};

template <>
struct Columns<2> {
  static void pack(const uint8_t* rows, int64_t stride, uint8_t* words) {
    Bytes quarters[4];
    for (int r = 0; r < kTile; r += 4) {
      Bytes codes[4];
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = load<uint32_t>(rows + (r + i) * stride);
        codes[i] = (Bytes)Doubles{spread_bits<2>(x), spread_bits<2>(x >> 16)};
      }
      quarters[r / 4] = join_four(codes);
    }
    store_byte_columns(quarters, words);
  }
  static void unpack(const uint8_t* words, int64_t stride, uint8_t* rows) {
    uint32_t x[kTile] = {};
    for (int j = 0; j < kTile; ++j) {
      const uint32_t word = load<uint32_t>(words + 4 * j);
      for (int r = 0; r < kTile; ++r) x[r] |= ((word >> (2 * r)) & 3u) << (2 * j);
    }
    for (int r = 0; r < kTile; ++r) store(rows + r * stride, x[r]);
  }
};

// Sixteen channels of sixteen 3-bit tokens (six bytes a channel): 16 words of low bits, 16
// half-words of high bits.
void pack_three_bit(const uint8_t* rows, int64_t stride, uint8_t* group) {
  Bytes low[4];
  Bytes high[2] = {};
  for (int r = 0; r < kTile; r += 4) {
    Bytes codes[4];
    for (int i = 0; i < 4; ++i) {
      const uint8_t* row = rows + (r + i) * stride;
      const uint64_t x = load<uint32_t>(row) | static_cast<uint64_t>(load<uint16_t>(row + 4)) << 32;
      codes[i] = (Bytes)Doubles{spread_bits<3>(x), spread_bits<3>(x >> 24)};
      high[r / 8] |= (codes[i] >> 2) << (r % 8 + i);
      codes[i] &= 3;
    }
    low[r / 4] = join_four(codes);
  }
  store_byte_columns(low, group);
  store_words(group + 4 * kTile, interleave_low(high[0], high[1]));
  store_words(group + 5 * kTile, interleave_high(high[0], high[1]));
}

void unpack_three_bit(const uint8_t* group, int64_t stride, uint8_t* rows) {
  uint64_t x[kTile] = {};
  for (int j = 0; j < kTile; ++j) {
    const uint64_t low = load<uint32_t>(group + 4 * j);
    const uint64_t high = load<uint16_t>(group + 4 * kTile + 2 * j);
    for (int r = 0; r < kTile; ++r)
      x[r] |= (((low >> (2 * r)) & 3u) | ((high >> r) & 1u) << 2) << (3 * j);
  }
  for (int r = 0; r < kTile; ++r) {
    store(rows + r * stride, static_cast<uint32_t>(x[r]));
    store(rows + r * stride + 4, static_cast<uint16_t>(x[r] >> 32));
  }
}

// K codes of row formats: words stay whole, 16 tokens x words are transposed.
template <bool kToCpu>
void convert_key_words(int64_t row_words, int page_tokens, const uint8_t* source, uint8_t* target) {
  for (int tile = 0; tile < page_tokens / kTile; ++tile) {
    const int64_t start = tile * row_words * kTile * 4;
    const int64_t whole = row_words / 4 * 4;
    for (int64_t w = 0; w < whole; w += 4) {
      for (int t = 0; t < kTile; t += 4) {
        Words x[4];
        const int64_t planar = start + (t * row_words + w) * 4;
        const int64_t cpu = start + (w * kTile + t) * 4;
        const int64_t planar_step = row_words * 4, cpu_step = kTile * 4;
        for (int i = 0; i < 4; ++i)
          x[i] = load_words(source + (kToCpu ? planar + i * planar_step : cpu + i * cpu_step));
        transpose(x);
        for (int i = 0; i < 4; ++i)
          store_words(target + (kToCpu ? cpu + i * cpu_step : planar + i * planar_step), x[i]);
      }
    }
    for (int64_t w = whole; w < row_words; ++w) {
      for (int t = 0; t < kTile; ++t) {
        const int64_t planar = start + (t * row_words + w) * 4;
        const int64_t cpu = start + (w * kTile + t) * 4;
        store(target + (kToCpu ? cpu : planar), load<uint32_t>(source + (kToCpu ? planar : cpu)));
      }
    }
  }
}

// V codes: [token][channel] to [16 channels][e tokens][16 channels].
template <int kBits, bool kToCpu>
void convert_value_codes(const SideShape& shape, const uint8_t* source, uint8_t* target) {
  constexpr int e = 32 / kBits;
  const int64_t row_bytes = static_cast<int64_t>(shape.head_dim) * kBits / 8;
  int64_t words = 0;
  for (int group = 0; group < shape.head_dim / kTile; ++group) {
    for (int token = 0; token < shape.page_tokens; token += e, words += kTile * 4) {
      const int64_t rows = token * row_bytes + group * 2 * kBits;
      if constexpr (kToCpu)
        Columns<kBits>::pack(source + rows, row_bytes, target + words);
      else
        Columns<kBits>::unpack(source + words, row_bytes, target + rows);
    }
  }
}

// K codes of per-channel formats: [channel][token] to [16 tokens][e channels][16 tokens].
template <int kBits, bool kToCpu>
void convert_channel_codes(const SideShape& shape, const uint8_t* source, uint8_t* target) {
  constexpr int e = 32 / kBits;
  const int64_t row_bytes = static_cast<int64_t>(shape.page_tokens) * kBits / 8;
  int64_t words = 0;
  for (int tile = 0; tile < shape.page_tokens / kTile; ++tile) {
    for (int channel = 0; channel < shape.head_dim; channel += e, words += kTile * 4) {
      const int64_t rows = channel * row_bytes + tile * 2 * kBits;
      if constexpr (kToCpu)
        Columns<kBits>::pack(source + rows, row_bytes, target + words);
      else
        Columns<kBits>::unpack(source + words, row_bytes, target + rows);
    }
  }
}

template <bool kToCpu>
void convert_three_bit_codes(const SideShape& shape, const uint8_t* source, uint8_t* target) {
  constexpr int kGroupBytes = kTile * kTile * 3 / 8;
  const int64_t row_bytes = static_cast<int64_t>(shape.page_tokens) * 3 / 8;
  int64_t group = 0;
  for (int tile = 0; tile < shape.page_tokens / kTile; ++tile) {
    for (int channel = 0; channel < shape.head_dim; channel += kTile, group += kGroupBytes) {
      const int64_t rows = channel * row_bytes + tile * 6;
      if constexpr (kToCpu)
        pack_three_bit(source + rows, row_bytes, target + group);
      else
        unpack_three_bit(source + group, row_bytes, target + rows);
    }
  }
}

template <bool kToCpu>
void convert_codes(const SideShape& shape, const uint8_t* source, uint8_t* target) {
  const formats::FormatInfo& info = formats::format_info(shape.format.base);
  if (info.axis == BlockAxis::kToken) {
    switch (info.code_bits) {
      case 4: return convert_channel_codes<4, kToCpu>(shape, source, target);
      case 3: return convert_three_bit_codes<kToCpu>(shape, source, target);
      case 2: return convert_channel_codes<2, kToCpu>(shape, source, target);
      default: break;
    }
  } else if (shape.role == SideRole::kKeys) {
    const int64_t row_words = static_cast<int64_t>(shape.head_dim) * info.code_bits / 32;
    return convert_key_words<kToCpu>(row_words, shape.page_tokens, source, target);
  } else {
    switch (info.code_bits) {
      case 4: return convert_value_codes<4, kToCpu>(shape, source, target);
      case 8: return convert_value_codes<8, kToCpu>(shape, source, target);
      case 16: return convert_value_codes<16, kToCpu>(shape, source, target);
      default: break;
    }
  }
  KVANT_CHECK(false, "every registered code width has a cpu layout");
}

template <int kBytes, bool kToCpu>
void convert_scales_of_width(const SideShape& shape, const ScaleGrid& grid, const uint8_t* source,
                             uint8_t* target) {
  const bool by_channel = formats::format_info(shape.format.base).axis == BlockAxis::kToken;
  const int rows_per_run = !by_channel && shape.role == SideRole::kKeys ? kTile : grid.num_rows;
  // cpu: [run][block][part][row in run] with runs of 16 rows for K and one run otherwise.
  const int64_t entries = static_cast<int64_t>(grid.num_blocks) * grid.num_parts;
  for (int first = 0; first < grid.num_rows; first += rows_per_run) {
    const int64_t start = first * entries * kBytes;
    for (int64_t entry = 0; entry < entries; ++entry) {
      for (int row = 0; row < rows_per_run; ++row) {
        const int64_t planar = start + (row * entries + entry) * kBytes;
        const int64_t cpu = start + (entry * rows_per_run + row) * kBytes;
        std::memcpy(target + (kToCpu ? cpu : planar), source + (kToCpu ? planar : cpu), kBytes);
      }
    }
  }
}

template <bool kToCpu>
void convert_scales(const SideShape& shape, const uint8_t* source, uint8_t* target) {
  const ScaleGrid grid = scale_grid(shape);
  switch (grid.part_bytes) {
    case 1: return convert_scales_of_width<1, kToCpu>(shape, grid, source, target);
    case 2: return convert_scales_of_width<2, kToCpu>(shape, grid, source, target);
    case 4: return convert_scales_of_width<4, kToCpu>(shape, grid, source, target);
    default: return;  // no scales
  }
}

}  // namespace

void planar_to_cpu(const SideShape& shape, const ConstPlanarSide& source,
                   const PlanarSide& target) {
  convert_codes<true>(shape, source.codes, target.codes);
  convert_scales<true>(shape, source.scales, target.scales);
}

void cpu_to_planar(const SideShape& shape, const ConstPlanarSide& source,
                   const PlanarSide& target) {
  convert_codes<false>(shape, source.codes, target.codes);
  convert_scales<false>(shape, source.scales, target.scales);
}

}  // namespace kvant::cache::internal
