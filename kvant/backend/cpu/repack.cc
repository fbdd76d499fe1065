#include "kvant/backend/cpu/repack.h"

#include <array>
#include <cstring>

namespace kvant::backend::cpu {
namespace {

constexpr int kVectorBytes = 4 * kTileRows;

void store_u32(uint8_t* p, uint32_t v) {
  std::memcpy(p, &v, 4);
}
void copy_u16(uint8_t* target, const uint8_t* source) {
  std::memcpy(target, source, 2);
}

// Packs 32 codes of `kBits` bits into lane `lane` of a block's vectors; `block` is the lane's first
// word.
template <int kBits>
void pack_codes(const uint8_t (&code)[kBlock], uint8_t* block) {
  if constexpr (kBits == 8) {
    for (int group = 0; group < 8; ++group) {
      const uint8_t* c = code + 8 * (group / 2) + 2 * (group % 2);
      store_u32(block + group * kVectorBytes,
                static_cast<uint32_t>(c[0]) | static_cast<uint32_t>(c[4]) << 8 |
                    static_cast<uint32_t>(c[1]) << 16 | static_cast<uint32_t>(c[5]) << 24);
    }
    return;
  }
  for (int v = 0; v < 4; ++v) {
    uint32_t word = 0;
    for (int t = 0; t < 4; ++t) {
      const uint8_t* c = code + 2 * (4 * v + t);
      word |= (static_cast<uint32_t>(c[0] & 15) | static_cast<uint32_t>(c[1] & 15) << 16)
              << (4 * t);
    }
    store_u32(block + v * kVectorBytes, word);
  }
  // Where the high bits of a pair are, matrix_layout.h.
  const auto group_of = [](int pair) { return 2 * (pair / 4) + pair % 2; };
  const auto byte_of = [](int pair) { return pair / 2 % 2; };
  if constexpr (kBits == 5) {
    uint32_t word = 0;
    for (int pair = 0; pair < 16; ++pair) {
      word |= (static_cast<uint32_t>(code[2 * pair] >> 4) |
               static_cast<uint32_t>(code[2 * pair + 1] >> 4) << 16)
              << (8 * byte_of(pair) + group_of(pair));
    }
    store_u32(block + 4 * kVectorBytes, word);
  }
  if constexpr (kBits == 6) {
    uint32_t words[2] = {0, 0};
    for (int pair = 0; pair < 16; ++pair) {
      words[group_of(pair) / 4] |= (static_cast<uint32_t>(code[2 * pair] >> 4) |
                                    static_cast<uint32_t>(code[2 * pair + 1] >> 4) << 16)
                                   << (8 * byte_of(pair) + 2 * (group_of(pair) % 4));
    }
    for (int v = 0; v < 2; ++v) store_u32(block + (4 + v) * kVectorBytes, words[v]);
  }
}

// Nibble byte j holds input j (low) and input j + 16 (high).
void unpack_nibbles(const uint8_t* nibbles, uint8_t (&code)[kBlock]) {
  for (int j = 0; j < 16; ++j) {
    code[j] = nibbles[j] & 15;
    code[j + 16] = nibbles[j] >> 4;
  }
}
void add_fifth_bits(const uint8_t* bits, uint8_t (&code)[kBlock]) {
  uint32_t high;
  std::memcpy(&high, bits, 4);
  for (int j = 0; j < kBlock; ++j) {
    code[j] = static_cast<uint8_t>(code[j] | ((high >> j) & 1u) << 4);
  }
}

// Q4_0, Q4_1, Q5_0, Q5_1: f16 a, with kHasMin f16 b, with five bits u32, 16 nibble bytes.
template <int kBits, bool kHasMin>
void pack_blocks_of_32(const uint8_t* in, int64_t num_blocks, int lane, uint8_t* codes,
                       uint8_t* scales) {
  constexpr int kScales = kHasMin ? 2 : 1;
  constexpr int kHighBytes = kBits == 5 ? 4 : 0;
  uint8_t code[kBlock];
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int i = 0; i < kScales; ++i) {
      copy_u16(scales + 2 * (kTileRows * (kScales * block + i) + lane), in + 2 * i);
    }
    unpack_nibbles(in + 2 * kScales + kHighBytes, code);
    if constexpr (kBits == 5) add_fifth_bits(in + 2 * kScales, code);
    pack_codes<kBits>(code, codes + block * (kBits * 4 * kTileRows) + 4 * lane);
    in += 2 * kScales + kHighBytes + 16;
  }
}

void pack_q8_0(const uint8_t* in, int64_t num_blocks, int lane, uint8_t* codes, uint8_t* scales) {
  uint8_t code[kBlock];
  for (int64_t block = 0; block < num_blocks; ++block, in += 34) {
    copy_u16(scales + 2 * (kTileRows * block + lane), in);
    for (int j = 0; j < kBlock; ++j) code[j] = static_cast<uint8_t>(in[2 + j] ^ 0x80u);  // q + 128
    pack_codes<8>(code, codes + block * (32 * kTileRows) + 4 * lane);
  }
}

// Q4_K, Q5_K; the source's bit order is stated in formats/weight_types.cc.
template <int kBits>
void pack_super_blocks(const uint8_t* in, int64_t num_blocks, int lane, uint8_t* codes,
                       uint8_t* scales) {
  constexpr int kNibbles = kBits == 5 ? 48 : 16;  // offset of the nibble bytes
  uint8_t code[kBlock];
  for (int64_t super = 0; super < num_blocks; ++super, in += kNibbles + 128) {
    uint8_t* out = scales + super * 20 * kTileRows;
    copy_u16(out + 2 * lane, in);
    copy_u16(out + 2 * kTileRows + 2 * lane, in + 2);
    uint8_t* fine = out + 4 * kTileRows + lane;
    for (int j = 0; j < 8; ++j) {
      const uint8_t* p = in + 4;
      const bool first = j < 4;
      fine[2 * kTileRows * j] =
          static_cast<uint8_t>(first ? p[j] & 63 : (p[j + 4] & 15) | (p[j - 4] >> 6) << 4);
      fine[2 * kTileRows * j + kTileRows] =
          static_cast<uint8_t>(first ? p[j + 4] & 63 : p[j + 4] >> 4 | (p[j] >> 6) << 4);
      const uint8_t* q = in + kNibbles + 32 * (j / 2);
      for (int i = 0; i < kBlock; ++i) {
        code[i] = static_cast<uint8_t>((q[i] >> (4 * (j % 2))) & 15);
        if constexpr (kBits == 5)
          code[i] = static_cast<uint8_t>(code[i] | ((in[16 + i] >> j) & 1) << 4);
      }
      pack_codes<kBits>(code, codes + (8 * super + j) * (kBits * 4 * kTileRows) + 4 * lane);
    }
  }
}

void pack_q6_k(const uint8_t* in, int64_t num_blocks, int lane, uint8_t* codes, uint8_t* scales) {
  uint8_t code[kBlock];
  for (int64_t super = 0; super < num_blocks; ++super, in += 210) {
    uint8_t* out = scales + super * 18 * kTileRows;
    copy_u16(out + 2 * lane, in + 208);
    for (int i = 0; i < 16; ++i) out[2 * kTileRows + kTileRows * i + lane] = in[192 + i];
    for (int j = 0; j < 8; ++j) {
      const int half = j / 4;
      const int group = j % 4;
      const uint8_t* low = in + 64 * half + 32 * (group % 2);
      const uint8_t* high = in + 128 + 32 * half;
      for (int i = 0; i < kBlock; ++i) {
        code[i] = static_cast<uint8_t>(((low[i] >> (4 * (group / 2))) & 15) |
                                       ((high[i] >> (2 * group)) & 3) << 4);
      }
      pack_codes<6>(code, codes + (8 * super + j) * (24 * kTileRows) + 4 * lane);
    }
  }
}

template <int kBytes>
void pack_floats(const uint8_t* in, int64_t num_blocks, int lane, uint8_t* codes, uint8_t*) {
  for (int64_t i = 0; i < num_blocks; ++i) {
    std::memcpy(codes + kBytes * (kTileRows * i + lane), in + kBytes * i, kBytes);
  }
}

// The scale takes the 2^8 by which the kernels' codes are too small (Simd::load_e4m3); below 2^120,
// as amax / 448 is, that is exact.
void pack_f8_e4m3(const uint8_t* in, int64_t num_blocks, int lane, uint8_t* codes,
                  uint8_t* scales) {
  float scale;
  std::memcpy(&scale, in, 4);
  scale *= 256.0f;
  std::memcpy(scales + 4 * lane, &scale, 4);
  pack_floats<1>(in + 4, num_blocks, lane, codes, scales);
}

// In the order of WeightKind.
constexpr std::array<RepackFormat, kNumWeightKinds> kFormats = {{
    {32, 16, 2, pack_blocks_of_32<4, false>},
    {32, 16, 4, pack_blocks_of_32<4, true>},
    {32, 20, 2, pack_blocks_of_32<5, false>},
    {32, 20, 4, pack_blocks_of_32<5, true>},
    {32, 32, 2, pack_q8_0},
    {256, 128, 20, pack_super_blocks<4>},
    {256, 160, 20, pack_super_blocks<5>},
    {256, 192, 18, pack_q6_k},
    {1, 4, 0, pack_floats<4>},
    {1, 2, 0, pack_floats<2>},
    {1, 2, 0, pack_floats<2>},
    {1, 1, 0, pack_f8_e4m3, 4},
}};

}  // namespace

const RepackFormat& repack_format(WeightKind kind) {
  return kFormats[static_cast<size_t>(kind)];
}

}  // namespace kvant::backend::cpu
