// What the bytes of a KV-cache format mean: one row of facts per format.
//
// Everything else that needs to know a format (codecs, pages, kernels, planner, CLI) reads its row;
// nothing derived is typed in twice. codecs.md section 2 is the definition. Thread-safe
// (constants). Adding a format: one header with what format_concept.h asks for, one line in
// formats.def.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "kvant/base/result.h"

namespace kvant::formats {

// One value per base format: k<Type> for each line of formats.def. The numbers are part of the
// stored-page fingerprint.
enum class FormatId : uint8_t {
#define KVANT_FORMAT(number, Type, header) k##Type = number,
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT
};

// The number system of one stored element.
enum class Element : uint8_t { kBf16, kF16, kE4m3, kE5m2, kE2m1, kSigned, kUnsigned };

// Along which axis the elements of one block lie.
enum class BlockAxis : uint8_t {
  kNone,     // no block: no side data, or one scale for a whole tensor
  kHeadDim,  // consecutive channels of one token
  kToken,    // consecutive tokens of one channel (":channel" formats; all tokens of a page)
};

// Side data stored per block.
enum class Scale : uint8_t {
  kNone,
  kE4m3,     // 1 byte, multiplied by the plan's global scale g
  kE8m0,     // 1 byte, a power of two
  kF16,      // 2 bytes
  kF16Pair,  // 4 bytes: scale, then zero (the block's minimum)
  kF32,      // 4 bytes
};

// Which scale of the plan (g of codecs.md section 2) a format reads; absent means 1.
enum class GlobalScale : uint8_t { kNone, kPerTensor, kPerHead };

struct FormatInfo {
  FormatId id;
  std::string_view name;  // as in format strings, e.g. "int4:channel"
  Element element;
  int code_bits;  // stored bits per element, side data not counted
  BlockAxis axis;
  int block_size;  // elements per block; 0: the whole row (kHeadDim) or page column (kToken)
  Scale scale;
  GlobalScale global_scale;
  bool for_keys;
  bool for_values;
  std::string_view summary;  // one line for people
};

// All formats in the order of FormatId.
std::span<const FormatInfo> all_formats();
const FormatInfo& format_info(FormatId id);
// kInvalidArgument lists the names that exist.
Result<FormatId> find_format(std::string_view name);

constexpr int scale_bytes(Scale scale) {
  switch (scale) {
    case Scale::kNone: return 0;
    case Scale::kE4m3:
    case Scale::kE8m0: return 1;
    case Scale::kF16: return 2;
    case Scale::kF16Pair:
    case Scale::kF32: return 4;
  }
  return 0;
}

// Number of levels minus one of an asymmetric integer format (15, 7, 3).
constexpr int unsigned_steps(int code_bits) {
  return (1 << code_bits) - 1;
}

}  // namespace kvant::formats
