// Closed forms of where codes and scales lie in a unit, for kernels: the same as layout.h, callable
// on the device.
//
// kvant::cache::code_place and scale_place are the definition; page_map_test.cc compares every bit
// of every format, page size and head_dim. Only `sm90` (ADR 0004) and `planar` are here: a device
// never holds another. Thread-safe (pure functions of plain data).
#pragma once

#include <cstdint>

#include "kvant/base/host_device.h"
#include "kvant/cache/layout.h"
#include "kvant/formats/format.h"
#include "kvant/formats/sections.h"

namespace kvant::backend::cuda {

inline constexpr int kTile = 16;   // tokens and channels of an MMA fragment
inline constexpr int kLanes = 32;  // lanes of a fragment

// What kernels need to know about one side of a unit: plain data, passed by value.
struct SideMap {
  formats::FormatId base = formats::FormatId::kBf16;
  bool values = false;   // else keys
  bool columns = false;  // blocks along tokens (":channel")
  bool e2m1 = false;     // codes in the E2M1 bit order
  int code_bits = 16;
  int page_tokens = 0;
  int head_dim = 0;
  int block_size = 0;  // elements per block; the whole row or column where the format says so
  int num_blocks = 0;  // per row, 0 without scales; 1 for ":channel"
  int num_parts = 0;   // 2: scale and zero
  int part_bytes = 0;
  int code_bytes = 0;  // of the section, unpadded
  int scale_bytes = 0;
};

inline SideMap make_side_map(const cache::SideShape& shape) {
  const formats::FormatInfo& info = formats::format_info(shape.format.base);
  const cache::ScaleGrid grid = cache::scale_grid(shape);
  const formats::SideBytes bytes =
      formats::side_bytes(shape.format, shape.page_tokens, shape.head_dim);
  SideMap map;
  map.base = shape.format.base;
  map.values = shape.role == cache::SideRole::kValues;
  map.columns = info.axis == formats::BlockAxis::kToken;
  map.e2m1 = info.element == formats::Element::kE2m1;
  map.code_bits = info.code_bits;
  map.page_tokens = shape.page_tokens;
  map.head_dim = shape.head_dim;
  map.block_size = info.block_size != 0 ? info.block_size
                   : map.columns        ? shape.page_tokens
                                        : shape.head_dim;
  map.num_blocks = grid.num_parts == 0 ? 0 : grid.num_blocks;
  map.num_parts = grid.num_parts;
  map.part_bytes = grid.part_bytes;
  map.code_bytes = static_cast<int>(bytes.codes);
  map.scale_bytes = static_cast<int>(bytes.scales);
  return map;
}

// Bits [shift, shift + width) of a code are bits [bit, bit + width) of the section; no field of
// `sm90` crosses a 32-bit word.
struct CodeField {
  int32_t bit = 0;
  int8_t width = 0;
  int8_t shift = 0;
};
struct CodeFields {
  CodeField field[2];
  int num = 0;
};

// An element's place in the fragments: rows of the A operand are tokens for K, channels for V.
struct Fragment {
  int tile;
  int step;
  int lane;
  int reg;
  int parity;
};

KVANT_HD constexpr Fragment fragment_of(bool values, int token, int channel) {
  const int row = (values ? channel : token) % kTile;
  const int column = (values ? token : channel) % kTile;
  return {token / kTile, channel / kTile, row % 8 * 4 + column % 8 / 2, row / 8 + column / 8 * 2,
          column % 2};
}

// Word index, in its tile, of word `word` of a lane that owns `num_words`: chunks of four.
KVANT_HD constexpr int chunked_word(int num_words, int lane, int word) {
  const int chunk = word / 4;
  const int rest = num_words - chunk * 4;
  return chunk * 4 * kLanes + lane * (rest < 4 ? rest : 4) + word % 4;
}

// Bit of the sign and of the lowest magnitude bit of E2M1 in its half-word, by register.
KVANT_HD constexpr int e2m1_sign_bit(int reg) {
  return reg == 0 ? 15 : reg == 1 ? 12 : reg == 2 ? 14 : 13;
}
KVANT_HD constexpr int e2m1_field_bit(int reg) {
  return 9 - 3 * reg;
}

KVANT_HD constexpr CodeFields sm90_code_fields(const SideMap& map, int token, int channel) {
  const int bits = map.code_bits;
  const int num_steps = map.head_dim / kTile;
  const Fragment at = fragment_of(map.values, token, channel);
  const int tile_bit = at.tile * kTile * map.head_dim * bits;
  CodeFields out;
  out.num = 1;
  if (bits <= 3) {
    const bool pair = at.step / 2 * 2 + 1 < num_steps;
    const int low = pair ? at.lane * 32 + at.parity * 16 + at.step % 2 * 8 + at.reg * 2
                         : at.lane * 16 + at.parity * 8 + at.reg * 2;
    out.field[0] = {tile_bit + at.step / 2 * kLanes * 32 + low, 2, 0};
    if (bits == 2) return out;
    const bool quad = at.step / 4 * 4 + 3 < num_steps;
    const int high = quad ? at.lane * 32 + at.parity * 16 + at.step % 4 * 4 + at.reg
                          : at.step % 4 * kLanes * 8 + at.lane * 8 + at.parity * 4 + at.reg;
    out.field[1] = {tile_bit + kTile * map.head_dim * 2 + at.step / 4 * kLanes * 32 + high, 1, 2};
    out.num = 2;
    return out;
  }
  const int step_words = bits / 4;
  if (bits == 4) {
    const int half = tile_bit + chunked_word(num_steps, at.lane, at.step) * 32 + at.parity * 16;
    if (!map.e2m1) {
      out.field[0] = {half + at.reg * 4, 4, 0};
      return out;
    }
    out.field[0] = {half + e2m1_field_bit(at.reg), 3, 0};
    out.field[1] = {half + e2m1_sign_bit(at.reg), 1, 3};
    out.num = 2;
    return out;
  }
  const int word_regs = 4 / step_words;
  const int word = at.step * step_words + at.reg / word_regs;
  const int bit = tile_bit + chunked_word(num_steps * step_words, at.lane, word) * 32;
  out.field[0] = {bit + at.reg % word_regs * 2 * bits + at.parity * bits, static_cast<int8_t>(bits),
                  0};
  return out;
}

KVANT_HD constexpr CodeField planar_code_field(const SideMap& map, int token, int channel) {
  const int index =
      map.columns ? channel * map.page_tokens + token : token * map.head_dim + channel;
  return {index * map.code_bits, static_cast<int8_t>(map.code_bits), 0};
}

// Byte offset of one part of a scale entry: rows are tokens, or channels of ":channel" formats.
KVANT_HD constexpr int sm90_scale_byte(const SideMap& map, int row, int block, int part) {
  const int in_tile = row % kTile;
  if (map.columns) {
    const int t = in_tile % 8 / 2;
    const int pair = in_tile / 8 * 2 + (part == 0 ? 1 : 0);
    return (row / kTile * 2 * kTile + t * 8 + pair * 2 + in_tile % 2) * map.part_bytes;
  }
  const int tile = row / kTile * kTile * map.num_blocks * map.num_parts;
  if (!map.values) {
    const int pair_row = in_tile % 8 * 2 + in_tile / 8;
    return (tile + (pair_row * map.num_blocks + block) * map.num_parts + part) * map.part_bytes;
  }
  const int t = in_tile % 8 / 2;
  const int four = in_tile / 8 * 2 + in_tile % 2;
  return (tile + ((t * map.num_blocks + block) * map.num_parts + part) * 4 + four) * map.part_bytes;
}

KVANT_HD constexpr int planar_scale_byte(const SideMap& map, int row, int block, int part) {
  return ((row * map.num_blocks + block) * map.num_parts + part) * map.part_bytes;
}

}  // namespace kvant::backend::cuda
