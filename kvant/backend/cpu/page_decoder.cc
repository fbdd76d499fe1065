#include "kvant/backend/cpu/page_decoder.h"

#include "kvant/formats/format.h"

namespace kvant::backend::cpu {
namespace {

Code code_of(const formats::FormatInfo& info) {
  switch (info.element) {
    case formats::Element::kBf16: return Code::kBf16;
    case formats::Element::kF16: return Code::kF16;
    case formats::Element::kE4m3: return Code::kE4m3;
    case formats::Element::kE5m2: return Code::kE5m2;
    case formats::Element::kE2m1: return Code::kE2m1;
    case formats::Element::kSigned: return Code::kS8;
    case formats::Element::kUnsigned:
      return info.code_bits == 2 ? Code::kU2 : info.code_bits == 3 ? Code::kU3 : Code::kU4;
  }
  return Code::kBf16;
}

PageScale scale_of(const formats::FormatInfo& info) {
  switch (info.scale) {
    case formats::Scale::kNone: return PageScale::kNone;
    case formats::Scale::kE4m3: return PageScale::kE4m3;
    case formats::Scale::kE8m0: return PageScale::kE8m0;
    case formats::Scale::kF16: return PageScale::kF16;
    case formats::Scale::kF16Pair:
      return info.axis == formats::BlockAxis::kToken ? PageScale::kChannelPair
                                                     : PageScale::kF16Pair;
    case formats::Scale::kF32: return PageScale::kF32;
  }
  return PageScale::kNone;
}

}  // namespace

bool integer_keys(const PageDecoder& decoder) {
  const auto is = [&](Code code, PageScale scale, int block) {
    return decoder.code == code && decoder.scale == scale && decoder.block == block;
  };
  return is(Code::kE2m1, PageScale::kE4m3, 16) || is(Code::kE2m1, PageScale::kE8m0, 32) ||
         is(Code::kS8, PageScale::kF16, 32) || is(Code::kU4, PageScale::kF16Pair, 32) ||
         decoder.scale == PageScale::kChannelPair;
}

bool integer_values(const PageDecoder& decoder) {
  return integer_keys(decoder) && decoder.scale != PageScale::kChannelPair;
}

bool in_bf16(const PageDecoder& decoder, int head_dim, int page_tokens) {
  const bool plain = decoder.scale == PageScale::kNone;
  const bool by_token = decoder.scale == PageScale::kF32 && decoder.block >= head_dim;
  const bool by_block = decoder.scale == PageScale::kE8m0 && decoder.block == 32;
  const bool takes_code = (decoder.code == Code::kBf16 && plain) ||
                          (decoder.code == Code::kE4m3 && (plain || by_token || by_block));
  return takes_code && head_dim % 32 == 0 && page_tokens % 32 == 0;
}

bool decodes_in_registers(const PageDecoder& decoder) {
  if (decoder.code == Code::kE4m3) {
    return decoder.scale == PageScale::kNone || decoder.scale == PageScale::kF32 ||
           decoder.scale == PageScale::kE8m0;
  }
  const bool is_float =
      decoder.code == Code::kBf16 || decoder.code == Code::kF16 || decoder.code == Code::kE5m2;
  return is_float && decoder.scale == PageScale::kNone;
}

PageDecoder page_decoder(const formats::SideFormat& side, const formats::SideParams& params,
                         int head_dim) {
  const formats::FormatInfo& info = formats::format_info(side.base);
  PageDecoder decoder;
  decoder.code = code_of(info);
  decoder.scale = scale_of(info);
  decoder.block = info.block_size == 0 ? head_dim : info.block_size;
  if (info.global_scale != formats::GlobalScale::kNone) decoder.factor = params.global_scale;
  if (decoder.code == Code::kE4m3 && decoder.scale == PageScale::kNone)
    decoder.factor *= kE4m3Factor;
  return decoder;
}

}  // namespace kvant::backend::cpu
