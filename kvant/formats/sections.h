// How many bytes one head's part of a page takes, and where its five sections start.
//
// A unit is the part of a page that belongs to one layer and one KV head (codecs.md section 5):
// [K codes | K scales | K mean | V codes | V scales], each zero-padded to 128 bytes. The sizes do
// not depend on the layout (planar, cpu, sm90): layouts only permute bytes inside a section.
#pragma once

#include <cstdint>

#include "kvant/formats/spec.h"

namespace kvant::formats {

inline constexpr int64_t kSectionAlignment = 128;

// Sizes in bytes, unpadded.
struct SideBytes {
  int64_t codes = 0;
  int64_t scales = 0;
  int64_t mean = 0;
};

// `page_tokens` in {16, 32, 64, 128}, `head_dim` a multiple of 16 in [16, 512].
SideBytes side_bytes(const SideFormat& side, int page_tokens, int head_dim);

// Byte offsets inside a unit; `bytes` is the unit's size (a multiple of 128).
struct UnitSections {
  int64_t k_codes = 0;
  int64_t k_scales = 0;
  int64_t k_mean = 0;
  int64_t v_codes = 0;
  int64_t v_scales = 0;
  int64_t bytes = 0;
};

UnitSections unit_sections(const SideFormat& k, const SideFormat& v, int page_tokens, int head_dim);

}  // namespace kvant::formats
