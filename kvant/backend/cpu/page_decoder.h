// What the decode passes need to know of one side of a page's format. A new cache format needs
// nothing here if its element and scale types are known (formats/format.h).
#pragma once

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/spec.h"

namespace kvant::backend::cpu {

struct PageDecoder {
  Code code = Code::kBf16;
  PageScale scale = PageScale::kNone;
  int block = 0;
  // Decoded values times this are the stored ones: g, and what kE4m3 leaves out.
  float factor = 1.0f;
};

// Whether a side's codes are small integers that products can use as they are stored: what
// attention_integer.h has kernels for.
bool integer_keys(const PageDecoder& decoder);
bool integer_values(const PageDecoder& decoder);

// Whether Bf16Kernels multiply a side of floating-point codes, for any number of rows.
bool in_bf16(const PageDecoder& decoder, int head_dim, int page_tokens);

// Whether products for few rows can decode a side in registers.
bool decodes_in_registers(const PageDecoder& decoder);

PageDecoder page_decoder(const formats::SideFormat& side, const formats::SideParams& params,
                         int head_dim);

}  // namespace kvant::backend::cpu
