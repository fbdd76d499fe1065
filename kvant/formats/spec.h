// Cache format strings: parsing, presets, canonical form (codecs.md sections 3 and 4).
//
//   spec = base{+opt} | k=base{+opt},v=base{+opt} | preset
//
// The same string is used in C++, CLI, JSON, metrics and files. Plain values, thread-safe.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/formats/format.h"

namespace kvant::formats {

// One side (keys or values) of a cache format with its options (codecs.md section 3).
struct SideFormat {
  FormatId base = FormatId::kBf16;
  bool mean = false;           // K: subtract the page's per-channel mean
  bool bias = false;           // subtract a static vector of the plan
  bool smooth = false;         // K: divide by per-channel factors of the plan
  bool rotate = false;         // Hadamard rotation along head_dim
  bool four_over_six = false;  // nvfp4: choose each block's scale by error
  bool pre_rope = false;       // K: stored before RoPE

  bool operator==(const SideFormat&) const = default;
};

// A complete cache format. `sink`, `recent_tokens` and `strict` belong to the sequence.
struct CacheFormat {
  SideFormat k;
  SideFormat v;
  bool sink = false;      // the first page stays BF16 in full-attention layers
  int recent_tokens = 0;  // the last N tokens stay BF16, rounded up to pages
  bool strict = false;    // quantise at append, for comparison with engines that do

  bool operator==(const CacheFormat&) const = default;
  // True if closed pages are plain BF16 and nothing is ever encoded.
  bool is_bf16() const;
};

struct Preset {
  std::string_view name;
  std::string_view spec;
  std::string_view summary;
};

std::span<const Preset> all_presets();
inline constexpr std::string_view kDefaultFormat = "4bit";

// Parses one spec; presets are resolved. kInvalidArgument for unknown or duplicate options and for
// options that a side or base cannot have, naming what is supported.
Result<CacheFormat> parse_cache_format(std::string_view spec);

// The rules that parsing applies, for formats made in code: each side's options fit its base and
// the sequence's options fit both sides. kInvalidArgument says what does not fit.
Status check_cache_format(const CacheFormat& format);
Status check_side_format(const SideFormat& side, bool values);

// Splits "A,B,C", where an item that starts with "k=" includes the "v=" item after it.
std::vector<std::string> split_format_list(std::string_view list);

// Canonical form, e.g. "k=int4:channel,v=nvfp4+46+sink": both sides, options in the order of
// section 3.
std::string canonical_name(const CacheFormat& format);

// The canonical name as part of a file name or URL: '+' becomes '.', '%' becomes 'p'.
std::string file_name_form(std::string_view spec);

// Stored bits per value of closed pages of this format alone, side data and section padding
// included
// (`bits_per_value_asymptotic`), for a head dimension and a page size in tokens.
double asymptotic_bits_per_value(const CacheFormat& format, int head_dim, int page_tokens);

}  // namespace kvant::formats
