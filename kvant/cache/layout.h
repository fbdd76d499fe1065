// The order of elements inside a unit, for every layout, and exact converters between layouts.
//
// Planar is the codec's order (formats/codec.h) and the interchange order; `cpu` is ADR 0002,
// `sm90` is ADR 0004. A layout only permutes bits inside a section: section sizes and the mean
// section are the same in all of them. Used by backends when they close pages, by page export and
// import, and by tests as the definition. Thread-safe (pure functions); nothing is allocated except
// where said.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvant/cache/view.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/sections.h"
#include "kvant/formats/spec.h"

namespace kvant::cache {

enum class SideRole : uint8_t { kKeys, kValues };

// One side (keys or values) of one unit.
struct SideShape {
  formats::SideFormat format;
  SideRole role = SideRole::kKeys;
  int page_tokens = 0;
  int head_dim = 0;
};

struct UnitShape {
  formats::SideFormat k;
  formats::SideFormat v;
  int page_tokens = 0;
  int head_dim = 0;

  SideShape keys() const { return {k, SideRole::kKeys, page_tokens, head_dim}; }
  SideShape values() const { return {v, SideRole::kValues, page_tokens, head_dim}; }
};

// Where the bits of one element lie in a section: bits [shift, shift + width) of the element are
// bits [bit, bit + width) of the section, read as a little-endian bit string.
struct BitField {
  int64_t bit = 0;
  int width = 0;
  int shift = 0;
};
struct ElementPlace {
  BitField fields[2];
  int num_fields = 0;
};

// The definition of a layout. `token` in [0, page_tokens), `channel` in [0, head_dim).
ElementPlace code_place(Layout layout, const SideShape& shape, int token, int channel);

// Scale entries of a side: num_rows * num_blocks entries of num_parts parts of part_bytes each.
// Rows are tokens (blocks along head_dim) or channels (blocks along tokens, num_blocks = 1). Parts
// of a pair: 0 is the scale, 1 the zero.
struct ScaleGrid {
  int num_rows = 0;
  int num_blocks = 0;
  int num_parts = 0;  // 0: the format stores no scales
  int part_bytes = 0;
};
ScaleGrid scale_grid(const SideShape& shape);
// Byte offset of one part in the scale section.
int64_t scale_place(Layout layout, const SideShape& shape, int row, int block, int part);

// The sections of one side inside a unit.
formats::PlanarSide side_of_unit(std::byte* unit, const formats::UnitSections& sections,
                                 const SideShape& shape);
formats::ConstPlanarSide side_of_unit(const std::byte* unit, const formats::UnitSections& sections,
                                      const SideShape& shape);

// Rewrites codes, scales and mean of one side in another order; padding is not touched. The two
// must not overlap. planar <-> cpu is fast (it is part of closing a page); the others go bit by
// bit.
void convert_side(const SideShape& shape, Layout from, const formats::ConstPlanarSide& source,
                  Layout to, const formats::PlanarSide& target);

// A whole unit of unit_sections(...).bytes; padding of the target becomes zero.
void convert_unit(const UnitShape& shape, Layout from, const std::byte* source, Layout to,
                  std::byte* target);

// ---- BF16 units (open, sink, recent and staging pages) ----

// One token's key and value, BF16 [head_dim] each, into a BF16 unit.
void write_bf16_token(Layout layout, int page_tokens, int head_dim, std::byte* unit, int token,
                      const uint16_t* k, const uint16_t* v);
// The same from fp32, rounded to nearest even.
void write_f32_token(Layout layout, int page_tokens, int head_dim, std::byte* unit, int token,
                     const float* k, const float* v);
// The first `num_tokens` tokens of one side as fp32 rows [num_tokens][head_dim].
void read_bf16_side(Layout layout, int page_tokens, int head_dim, const std::byte* unit,
                    SideRole role, int num_tokens, float* rows);

// Byte offset of one BF16 element of a unit in `cpu` layout: for kernels that write rows
// themselves.
constexpr int64_t cpu_bf16_key_offset(int head_dim, int token, int channel) {
  return ((static_cast<int64_t>(token / 16) * (head_dim / 2) + channel / 2) * 16 + token % 16) * 4 +
         (channel % 2) * 2;
}
// From the start of the V codes section, which is page_tokens * head_dim * 2 bytes into the unit.
constexpr int64_t cpu_bf16_value_offset(int page_tokens, int token, int channel) {
  return ((static_cast<int64_t>(channel / 16) * (page_tokens / 2) + token / 2) * 16 +
          channel % 16) *
             4 +
         (token % 2) * 2;
}

namespace internal {
// planar <-> cpu of one side's codes and scales (layout_cpu.cc).
void planar_to_cpu(const SideShape& shape, const formats::ConstPlanarSide& source,
                   const formats::PlanarSide& target);
void cpu_to_planar(const SideShape& shape, const formats::ConstPlanarSide& source,
                   const formats::PlanarSide& target);
}  // namespace internal

}  // namespace kvant::cache
