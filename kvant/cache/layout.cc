#include "kvant/cache/layout.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "kvant/base/check.h"

namespace kvant::cache {

using formats::BlockAxis;
using formats::ConstPlanarSide;
using formats::Element;
using formats::FormatInfo;
using formats::PlanarSide;
using formats::Scale;

static_assert(std::endian::native == std::endian::little, "pages are little-endian in memory");

namespace {

constexpr int kTile =
    16;  // tokens of a K tile, channels of a V group, both sides of an MMA fragment

const FormatInfo& info_of(const SideShape& shape) {
  return formats::format_info(shape.format.base);
}

ElementPlace one_field(int64_t bit, int width) {
  ElementPlace place;
  place.fields[0] = {bit, width, 0};
  place.num_fields = 1;
  return place;
}

ElementPlace planar_place(const SideShape& shape, int token, int channel) {
  const FormatInfo& info = info_of(shape);
  const int64_t index = info.axis == BlockAxis::kToken
                            ? static_cast<int64_t>(channel) * shape.page_tokens + token
                            : static_cast<int64_t>(token) * shape.head_dim + channel;
  return one_field(index * info.code_bits, info.code_bits);
}

// ---- cpu: ADR 0002 ----

ElementPlace cpu_place(const SideShape& shape, int token, int channel) {
  const int bits = info_of(shape).code_bits;
  if (bits == 3) {  // two low bits in 16 words, the high bits in 16 half-words, per 16 channels
    const int64_t group =
        static_cast<int64_t>(token / kTile) * (shape.head_dim / kTile) + channel / kTile;
    const int64_t group_bit = group * kTile * kTile * 3;
    ElementPlace place;
    place.fields[0] = {group_bit + (token % kTile) * 32 + (channel % kTile) * 2, 2, 0};
    place.fields[1] = {group_bit + kTile * 32 + (token % kTile) * 16 + channel % kTile, 1, 2};
    place.num_fields = 2;
    return place;
  }
  const int e = 32 / bits;  // elements of a word
  if (shape.role == SideRole::kKeys) {
    const int64_t word =
        (static_cast<int64_t>(token / kTile) * (shape.head_dim / e) + channel / e) * kTile +
        token % kTile;
    return one_field(word * 32 + (channel % e) * bits, bits);
  }
  const int64_t word =
      (static_cast<int64_t>(channel / kTile) * (shape.page_tokens / e) + token / e) * kTile +
      channel % kTile;
  return one_field(word * 32 + (token % e) * bits, bits);
}

int64_t cpu_scale_entry(const SideShape& shape, const ScaleGrid& grid, int row, int block,
                        int part) {
  if (info_of(shape).axis == BlockAxis::kToken)
    return static_cast<int64_t>(part) * grid.num_rows + row;
  if (shape.role == SideRole::kKeys) {
    const int64_t tile_block = static_cast<int64_t>(row / kTile) * grid.num_blocks + block;
    return (tile_block * grid.num_parts + part) * kTile + row % kTile;
  }
  return (static_cast<int64_t>(block) * grid.num_parts + part) * grid.num_rows + row;
}

// ---- sm90: ADR 0004 ----

// An element's place in the A fragments of mma.m16n8k16: fragment `tile` of 16 tokens and `step` of
// 16 channels; in it lane, register 0..3 and parity (which half of the register).
struct FragmentPlace {
  int tile;
  int step;
  int lane;
  int reg;
  int parity;
};

FragmentPlace fragment_place(SideRole role, int token, int channel) {
  // Rows of A are tokens for K and channels for V^T.
  const int row = (role == SideRole::kKeys ? token : channel) % kTile;
  const int column = (role == SideRole::kKeys ? channel : token) % kTile;
  return {.tile = token / kTile,
          .step = channel / kTile,
          .lane = (row % 8) * 4 + (column % 8) / 2,
          .reg = row / 8 + 2 * (column / 8),
          .parity = column % 2};
}

constexpr int kLanes = 32;

// Bit offset of word `word` of lane `lane` in a tile whose lanes own `num_words` words each, stored
// as chunks of up to four words: [chunk][lane][word in chunk].
int64_t chunked_word_bit(int num_words, int lane, int word) {
  const int chunk = word / 4;
  const int chunk_words = std::min(4, num_words - chunk * 4);
  return (static_cast<int64_t>(chunk) * 4 * kLanes + lane * chunk_words + word % 4) * 32;
}

// Places of sign (bit 0 of the pair) and magnitude in a half-word, by register (gpu-friendly order
// of E2M1: one mask and at most one shift or multiply yields a pair of fp16).
constexpr int kE2m1SignBit[4] = {15, 12, 14, 13};
constexpr int kE2m1FieldBit[4] = {9, 6, 3, 0};

// The two low bits of the 2- and 3-bit formats: pairs of k-steps share a word, a last odd step has
// half-words.
int64_t two_bit_offset(const FragmentPlace& at, int num_steps) {
  const int pair = at.step / 2;
  const int64_t pair_bit = static_cast<int64_t>(pair) * kLanes * 32;
  if (pair * 2 + 1 < num_steps)
    return pair_bit + at.lane * 32 + at.parity * 16 + (at.step % 2) * 8 + at.reg * 2;
  return pair_bit + at.lane * 16 + at.parity * 8 + at.reg * 2;
}

// The high bit of the 3-bit format: four k-steps share a word, up to three last steps have bytes.
int64_t high_bit_offset(const FragmentPlace& at, int num_steps) {
  const int quad = at.step / 4;
  const int64_t quad_bit = static_cast<int64_t>(quad) * kLanes * 32;
  if (quad * 4 + 3 < num_steps)
    return quad_bit + at.lane * 32 + at.parity * 16 + (at.step % 4) * 4 + at.reg;
  return quad_bit + (at.step % 4) * kLanes * 8 + at.lane * 8 + at.parity * 4 + at.reg;
}

ElementPlace sm90_place(const SideShape& shape, int token, int channel) {
  const FormatInfo& info = info_of(shape);
  const int bits = info.code_bits;
  const int num_steps = shape.head_dim / kTile;
  const FragmentPlace at = fragment_place(shape.role, token, channel);
  const int64_t tile_bit = static_cast<int64_t>(at.tile) * kTile * shape.head_dim * bits;
  ElementPlace place;
  if (bits <= 3) {
    place.fields[0] = {tile_bit + two_bit_offset(at, num_steps), 2, 0};
    place.num_fields = 1;
    if (bits == 3) {
      const int64_t low_plane = static_cast<int64_t>(kTile) * shape.head_dim * 2;
      place.fields[1] = {tile_bit + low_plane + high_bit_offset(at, num_steps), 1, 2};
      place.num_fields = 2;
    }
    return place;
  }
  // A lane owns 8 elements of each k-step: one word of 4-bit codes, two of 8-bit, four of 16-bit.
  const int step_words = bits / 4;
  const int num_words = num_steps * step_words;
  if (bits == 4) {
    const int64_t word_bit = tile_bit + chunked_word_bit(num_words, at.lane, at.step);
    const int64_t half_bit = word_bit + at.parity * 16;
    if (info.element != Element::kE2m1) return one_field(half_bit + at.reg * 4, 4);
    place.fields[0] = {half_bit + kE2m1FieldBit[at.reg], 3, 0};
    place.fields[1] = {half_bit + kE2m1SignBit[at.reg], 1, 3};
    place.num_fields = 2;
    return place;
  }
  const int regs_per_word = 4 / step_words;
  const int word = at.step * step_words + at.reg / regs_per_word;
  const int64_t word_bit = tile_bit + chunked_word_bit(num_words, at.lane, word);
  const int reg_bits = 2 * bits;
  return one_field(word_bit + (at.reg % regs_per_word) * reg_bits + at.parity * bits, bits);
}

int64_t sm90_scale_entry(const SideShape& shape, const ScaleGrid& grid, int row, int block,
                         int part) {
  if (info_of(shape).axis == BlockAxis::kToken) {
    // Per k-step and lane column t an MMA operand: zeros of channels 2t, 2t + 1, their scales, then
    // the same of channels 2t + 8, 2t + 9.
    const int in_step = row % kTile;
    const int t = (in_step % 8) / 2;
    const int pair = (in_step / 8) * 2 + (part == 0 ? 1 : 0);
    return static_cast<int64_t>(row / kTile) * 2 * kTile + t * 8 + pair * 2 + in_step % 2;
  }
  const int in_tile = row % kTile;
  const int64_t tile = static_cast<int64_t>(row / kTile) * kTile * grid.num_blocks * grid.num_parts;
  if (shape.role == SideRole::kKeys) {
    // [g][rows g, g + 8][block][part]: a quad's scales of two rows are adjacent.
    const int64_t pair_row = (in_tile % 8) * 2 + in_tile / 8;
    return tile + (pair_row * grid.num_blocks + block) * grid.num_parts + part;
  }
  // [t][block][part][tokens 2t, 2t + 1, 2t + 8, 2t + 9].
  const int64_t t = (in_tile % 8) / 2;
  const int four = (in_tile / 8) * 2 + in_tile % 2;
  return tile + ((t * grid.num_blocks + block) * grid.num_parts + part) * 4 + four;
}

// ---- generic converters ----

uint32_t read_bits(const uint8_t* section, const BitField& field) {
  const int64_t byte = field.bit / 8;
  const int offset = static_cast<int>(field.bit % 8);
  uint32_t value = 0;
  for (int i = 0; i * 8 < offset + field.width; ++i)
    value |= static_cast<uint32_t>(section[byte + i]) << (8 * i);
  return (value >> offset) & ((1u << field.width) - 1u);
}

void or_bits(uint8_t* section, const BitField& field, uint32_t value) {
  const int64_t byte = field.bit / 8;
  const int offset = static_cast<int>(field.bit % 8);
  const uint32_t shifted = value << offset;
  for (int i = 0; i * 8 < offset + field.width; ++i)
    section[byte + i] = static_cast<uint8_t>(section[byte + i] | (shifted >> (8 * i)));
}

uint32_t read_element(const uint8_t* section, const ElementPlace& place) {
  uint32_t code = 0;
  for (int f = 0; f < place.num_fields; ++f)
    code |= read_bits(section, place.fields[f]) << place.fields[f].shift;
  return code;
}

void or_element(uint8_t* section, const ElementPlace& place, uint32_t code) {
  for (int f = 0; f < place.num_fields; ++f) {
    const BitField& field = place.fields[f];
    or_bits(section, field, (code >> field.shift) & ((1u << field.width) - 1u));
  }
}

void convert_generic(const SideShape& shape, Layout from, const ConstPlanarSide& source, Layout to,
                     const PlanarSide& target) {
  const formats::SideBytes bytes =
      formats::side_bytes(shape.format, shape.page_tokens, shape.head_dim);
  std::memset(target.codes, 0, static_cast<size_t>(bytes.codes));
  for (int token = 0; token < shape.page_tokens; ++token) {
    for (int channel = 0; channel < shape.head_dim; ++channel) {
      const uint32_t code = read_element(source.codes, code_place(from, shape, token, channel));
      or_element(target.codes, code_place(to, shape, token, channel), code);
    }
  }
  const ScaleGrid grid = scale_grid(shape);
  for (int row = 0; row < grid.num_rows; ++row) {
    for (int block = 0; block < grid.num_blocks; ++block) {
      for (int part = 0; part < grid.num_parts; ++part) {
        std::memcpy(target.scales + scale_place(to, shape, row, block, part),
                    source.scales + scale_place(from, shape, row, block, part),
                    static_cast<size_t>(grid.part_bytes));
      }
    }
  }
}

}  // namespace

ElementPlace code_place(Layout layout, const SideShape& shape, int token, int channel) {
  switch (layout) {
    case Layout::kPlanar: return planar_place(shape, token, channel);
    case Layout::kCpu: return cpu_place(shape, token, channel);
    case Layout::kSm90: return sm90_place(shape, token, channel);
  }
  KVANT_CHECK(false, "a layout is one of three");
  return {};
}

ScaleGrid scale_grid(const SideShape& shape) {
  const FormatInfo& info = info_of(shape);
  ScaleGrid grid;
  if (info.scale == Scale::kNone) return grid;
  grid.num_parts = info.scale == Scale::kF16Pair ? 2 : 1;
  grid.part_bytes = formats::scale_bytes(info.scale) / grid.num_parts;
  if (info.axis == BlockAxis::kToken) {
    grid.num_rows = shape.head_dim;
    grid.num_blocks = 1;
  } else {
    grid.num_rows = shape.page_tokens;
    grid.num_blocks =
        info.block_size == 0 ? 1 : (shape.head_dim + info.block_size - 1) / info.block_size;
  }
  return grid;
}

int64_t scale_place(Layout layout, const SideShape& shape, int row, int block, int part) {
  const ScaleGrid grid = scale_grid(shape);
  int64_t entry = 0;
  switch (layout) {
    case Layout::kPlanar:
      entry = (static_cast<int64_t>(row) * grid.num_blocks + block) * grid.num_parts + part;
      break;
    case Layout::kCpu: entry = cpu_scale_entry(shape, grid, row, block, part); break;
    case Layout::kSm90: entry = sm90_scale_entry(shape, grid, row, block, part); break;
  }
  return entry * grid.part_bytes;
}

PlanarSide side_of_unit(std::byte* unit, const formats::UnitSections& sections,
                        const SideShape& shape) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(unit);
  if (shape.role == SideRole::kValues)
    return {bytes + sections.v_codes, bytes + sections.v_scales, nullptr};
  return {bytes + sections.k_codes, bytes + sections.k_scales,
          shape.format.mean ? reinterpret_cast<uint16_t*>(bytes + sections.k_mean) : nullptr};
}

ConstPlanarSide side_of_unit(const std::byte* unit, const formats::UnitSections& sections,
                             const SideShape& shape) {
  const PlanarSide side = side_of_unit(const_cast<std::byte*>(unit), sections, shape);
  return {side.codes, side.scales, side.mean};
}

void convert_side(const SideShape& shape, Layout from, const ConstPlanarSide& source, Layout to,
                  const PlanarSide& target) {
  if (shape.format.mean && target.mean != nullptr)
    std::memcpy(target.mean, source.mean, static_cast<size_t>(shape.head_dim) * 2);
  if (from == to) {
    const formats::SideBytes bytes =
        formats::side_bytes(shape.format, shape.page_tokens, shape.head_dim);
    std::memcpy(target.codes, source.codes, static_cast<size_t>(bytes.codes));
    if (bytes.scales > 0)
      std::memcpy(target.scales, source.scales, static_cast<size_t>(bytes.scales));
  } else if (from == Layout::kPlanar && to == Layout::kCpu) {
    internal::planar_to_cpu(shape, source, target);
  } else if (from == Layout::kCpu && to == Layout::kPlanar) {
    internal::cpu_to_planar(shape, source, target);
  } else {
    convert_generic(shape, from, source, to, target);
  }
}

void convert_unit(const UnitShape& shape, Layout from, const std::byte* source, Layout to,
                  std::byte* target) {
  const formats::UnitSections sections =
      formats::unit_sections(shape.k, shape.v, shape.page_tokens, shape.head_dim);
  std::memset(target, 0, static_cast<size_t>(sections.bytes));
  for (const SideShape& side : {shape.keys(), shape.values()}) {
    convert_side(side, from, side_of_unit(source, sections, side), to,
                 side_of_unit(target, sections, side));
  }
}

}  // namespace kvant::cache
