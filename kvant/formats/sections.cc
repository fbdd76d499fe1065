#include "kvant/formats/sections.h"

#include "kvant/base/check.h"

namespace kvant::formats {
namespace {

int64_t padded(int64_t bytes) {
  return (bytes + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
}

}  // namespace

SideBytes side_bytes(const SideFormat& side, int page_tokens, int head_dim) {
  KVANT_CHECK(page_tokens == 16 || page_tokens == 32 || page_tokens == 64 || page_tokens == 128,
              "page_tokens is 16, 32, 64 or 128");
  KVANT_CHECK(head_dim >= 16 && head_dim <= 512 && head_dim % 16 == 0,
              "head_dim is a multiple of 16 in [16, 512]");
  const FormatInfo& info = format_info(side.base);
  const int64_t values = static_cast<int64_t>(page_tokens) * head_dim;
  int64_t num_blocks = 0;
  switch (info.axis) {
    case BlockAxis::kNone: break;
    case BlockAxis::kHeadDim: {
      const int block_size = info.block_size > 0 ? info.block_size : head_dim;
      num_blocks = static_cast<int64_t>(page_tokens) * ((head_dim + block_size - 1) / block_size);
      break;
    }
    case BlockAxis::kToken: {
      const int block_size = info.block_size > 0 ? info.block_size : page_tokens;
      num_blocks = static_cast<int64_t>(head_dim) * ((page_tokens + block_size - 1) / block_size);
      break;
    }
  }
  return {
      .codes = values * info.code_bits / 8,
      .scales = num_blocks * scale_bytes(info.scale),
      .mean = side.mean ? static_cast<int64_t>(head_dim) * 2 : 0,
  };
}

UnitSections unit_sections(const SideFormat& k, const SideFormat& v, int page_tokens,
                           int head_dim) {
  const SideBytes k_bytes = side_bytes(k, page_tokens, head_dim);
  const SideBytes v_bytes = side_bytes(v, page_tokens, head_dim);
  UnitSections sections;
  sections.k_scales = padded(k_bytes.codes);
  sections.k_mean = sections.k_scales + padded(k_bytes.scales);
  sections.v_codes = sections.k_mean + padded(k_bytes.mean);
  sections.v_scales = sections.v_codes + padded(v_bytes.codes);
  sections.bytes = sections.v_scales + padded(v_bytes.scales);
  return sections;
}

}  // namespace kvant::formats
