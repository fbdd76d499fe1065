#include "kvant/formats/spec.h"

#include <array>
#include <charconv>

#include "kvant/base/check.h"
#include "kvant/formats/sections.h"
#include "kvant/formats/suggest.h"

namespace kvant::formats {
namespace {

constexpr size_t kLongestSpec = 256;
constexpr int kMostRecentTokens = 1 << 24;

constexpr Preset kPresets[] = {
    {"8bit", "k=int8+mean,v=int8+sink", "nearly lossless on all models measured"},
    {"6bit", "k=fp8+mean,v=nvfp4+46+sink", "between 8bit and 4bit in size and error"},
    {"4bit", "k=int4:channel,v=nvfp4+46+sink", "the default: best known recipe of its size"},
    {"3bit", "k=int3:channel,v=int4+sink", "smallest; look at its cost on your model first"},
};

// ---- options of one side, in the order of codecs.md section 3 ----

struct SideOption {
  std::string_view name;
  bool SideFormat::*field;
  bool for_values;
};

constexpr SideOption kSideOptions[] = {
    {"mean", &SideFormat::mean, false},       {"bias", &SideFormat::bias, true},
    {"smooth", &SideFormat::smooth, false},   {"rot", &SideFormat::rotate, true},
    {"46", &SideFormat::four_over_six, true}, {"prerope", &SideFormat::pre_rope, false},
};

constexpr std::string_view kOptionNames =
    "+mean, +bias, +smooth, +rot, +46, +prerope, and for the whole sequence +sink, +recentN, "
    "+strict";

Error invalid(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

std::string plus(std::string_view option) {
  std::string text("+");
  text += option;
  return text;
}

bool has_four_over_six(const FormatInfo& info) {
  return info.element == Element::kE2m1 && info.scale == Scale::kE4m3;
}

// Why `option` cannot be combined with the base of `side`; empty if it can.
std::string objection(const SideOption& option, const FormatInfo& info) {
  if (option.field == &SideFormat::four_over_six && !has_four_over_six(info)) {
    return "+46 chooses between two scales of a block of nvfp4; " + std::string(info.name) +
           " has no such choice (use nvfp4+46 or leave it out)";
  }
  if (info.id == FormatId::kBf16 && option.field != &SideFormat::pre_rope) {
    return plus(option.name) +
           " prepares values for quantisation, and bf16 stores them as they are";
  }
  return "";
}

Status check_side(const SideFormat& side, bool values) {
  const FormatInfo& info = format_info(side.base);
  const std::string_view letter = values ? "v" : "k";
  if (values ? !info.for_values : !info.for_keys) {
    return invalid(std::string(info.name) + " is for " + (values ? "keys" : "values") +
                   " only, because its blocks lie along tokens; for example "
                   "k=" +
                   std::string(info.name) + ",v=nvfp4+46");
  }
  for (const SideOption& option : kSideOptions) {
    if (!(side.*option.field)) continue;
    if (values && !option.for_values) {
      return invalid(plus(option.name) + " is an option of keys; give it to the k part");
    }
    if (std::string reason = objection(option, info); !reason.empty()) {
      return invalid(std::string(letter) + ": " + reason);
    }
  }
  if (side.mean && side.bias) {
    return invalid("+mean and +bias both subtract an offset from the keys; choose one");
  }
  return {};
}

// ---- parsing ----

enum class Scope { kBoth, kKeys, kValues };

Error unknown_base(std::string_view base);

struct Parser {
  CacheFormat format;
  std::string_view preset;  // name of the preset that the bases come from, or empty

  Error duplicate(std::string_view option) const {
    if (preset.empty()) return invalid(plus(option) + " is given twice");
    return invalid(plus(option) + " is already part of " + std::string(preset) +
                   ", which stands for " + canonical_name(format));
  }

  Status sequence_option(std::string_view option, Scope scope, bool& known) {
    const bool recent = option.starts_with("recent");
    known = option == "sink" || option == "strict" || recent;
    if (!known) return {};
    if (scope == Scope::kKeys) {
      return invalid(plus(option) + " belongs to the whole sequence; give it after the v part");
    }
    if (recent) return recent_option(option);
    bool& field = option == "sink" ? format.sink : format.strict;
    if (field) return duplicate(option);
    field = true;
    return {};
  }

  Status recent_option(std::string_view option) {
    const std::string_view digits = option.substr(6);
    int tokens = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), tokens);
    const bool canonical = !digits.empty() && digits[0] >= '1' && digits[0] <= '9';
    if (error != std::errc() || end != digits.data() + digits.size() || !canonical ||
        tokens > kMostRecentTokens) {
      return invalid("+recentN takes a number of tokens from 1 to " +
                     std::to_string(kMostRecentTokens) + ", as in +recent128; found " +
                     quote_name(plus(option)));
    }
    if (format.recent_tokens != 0) return duplicate("recentN");
    format.recent_tokens = tokens;
    return {};
  }

  Status side_option(const SideOption& option, Scope scope) {
    if (scope == Scope::kValues && !option.for_values) {
      return invalid(plus(option.name) + " is an option of keys; give it to the k part");
    }
    std::array<SideFormat*, 2> sides = {&format.k, &format.v};
    std::string reason;
    bool applied = false;
    for (SideFormat* side : sides) {
      const bool values = side == &format.v;
      if (scope == (values ? Scope::kKeys : Scope::kValues)) continue;
      if (values && !option.for_values) continue;
      // Without a side an option applies wherever it can.
      std::string side_reason = objection(option, format_info(side->base));
      if (!side_reason.empty()) {
        reason = std::move(side_reason);
        continue;
      }
      if (side->*option.field) return duplicate(option.name);
      side->*option.field = true;
      applied = true;
    }
    return applied ? Status() : invalid(reason);
  }

  Status option(std::string_view name, Scope scope) {
    bool known = false;
    KVANT_TRY(sequence_option(name, scope, known));
    if (known) return {};
    std::vector<std::string_view> names = {"sink", "recentN", "strict"};
    for (const SideOption& row : kSideOptions) {
      if (row.name == name) return side_option(row, scope);
      names.push_back(row.name);
    }
    const std::string_view closest = closest_name(name, names);
    return invalid("unknown option " + quote_name(plus(name)) +
                   (closest.empty() ? "" : did_you_mean(plus(closest))) +
                   "; options: " + std::string(kOptionNames));
  }

  // "base{+opt}" of one side or of both.
  Status part(std::string_view text, Scope scope) {
    const size_t base_end = text.find('+');
    const std::string_view base = text.substr(0, base_end);
    KVANT_TRY(set_base(base, scope));
    size_t start = base_end;
    while (start != std::string_view::npos) {
      const size_t end = text.find('+', start + 1);
      const size_t length = end == std::string_view::npos ? end : end - start - 1;
      KVANT_TRY(option(text.substr(start + 1, length), scope));
      start = end;
    }
    return {};
  }

  Status set_base(std::string_view base, Scope scope) {
    for (const Preset& row : kPresets) {
      if (row.name != base) continue;
      if (scope != Scope::kBoth) {
        return invalid("preset " + std::string(base) + " stands for both sides (" +
                       std::string(row.spec) + "); give it without k= or v=");
      }
      KVANT_ASSIGN(format, parse_cache_format(row.spec));
      preset = row.name;
      return {};
    }
    const Result<FormatId> id = find_format(base);
    if (!id) return unknown_base(base);
    if (scope != Scope::kValues) format.k.base = *id;
    if (scope != Scope::kKeys) format.v.base = *id;
    if (scope == Scope::kBoth) KVANT_TRY(check_side(format.v, true));
    return {};
  }
};

Error unknown_base(std::string_view base) {
  std::vector<std::string_view> names;
  std::string formats, presets;
  for (const FormatInfo& info : all_formats()) {
    names.push_back(info.name);
    formats += formats.empty() ? "" : ", ";
    formats += info.name;
  }
  for (const Preset& row : kPresets) {
    names.push_back(row.name);
    presets += presets.empty() ? "" : ", ";
    presets += row.name;
  }
  return invalid("unknown format or preset " + quote_name(base) +
                 did_you_mean(closest_name(base, names)) + "; formats: " + formats +
                 "; presets: " + presets);
}

Result<CacheFormat> parse_two_sides(std::string_view spec) {
  const size_t comma = spec.find(',');
  const std::string_view k = spec.substr(0, comma);
  const std::string_view v = comma == std::string_view::npos ? "" : spec.substr(comma + 1);
  if (!k.starts_with("k=") || !v.starts_with("v=") || v.find(',') != std::string_view::npos) {
    return invalid("expected k=FORMAT,v=FORMAT (in this order) or one FORMAT for both sides");
  }
  Parser parser;
  KVANT_TRY(parser.part(k.substr(2), Scope::kKeys));
  KVANT_TRY(parser.part(v.substr(2), Scope::kValues));
  return parser.format;
}

Result<CacheFormat> parse_spec(std::string_view spec) {
  CacheFormat format;
  const bool sided =
      spec.starts_with("k=") || spec.starts_with("v=") || spec.find(',') != std::string_view::npos;
  if (sided) {
    KVANT_ASSIGN(format, parse_two_sides(spec));
  } else {
    Parser parser;
    KVANT_TRY(parser.part(spec, Scope::kBoth));
    format = parser.format;
  }
  KVANT_TRY(check_cache_format(format));
  return format;
}

std::string side_name(const SideFormat& side) {
  std::string name(format_info(side.base).name);
  for (const SideOption& option : kSideOptions) {
    if (side.*option.field) name += plus(option.name);
  }
  return name;
}

}  // namespace

bool CacheFormat::is_bf16() const {
  return k.base == FormatId::kBf16 && v.base == FormatId::kBf16;
}

std::span<const Preset> all_presets() {
  return kPresets;
}

Status check_side_format(const SideFormat& side, bool values) {
  return check_side(side, values);
}

Status check_cache_format(const CacheFormat& format) {
  KVANT_TRY(check_side(format.k, false));
  KVANT_TRY(check_side(format.v, true));
  if (format.recent_tokens < 0 || format.recent_tokens > kMostRecentTokens) {
    return invalid("recent tokens must be from 0 to " + std::to_string(kMostRecentTokens));
  }
  if (!format.strict) return {};
  for (const SideFormat* side : {&format.k, &format.v}) {
    const FormatInfo& info = format_info(side->base);
    if (info.axis == BlockAxis::kToken || side->mean) {
      return invalid(
          "+strict quantises each token when it is appended, which needs blocks that lie "
          "within one token; " +
          side_name(*side) + " needs a whole page");
    }
  }
  return {};
}

Result<CacheFormat> parse_cache_format(std::string_view spec) {
  if (spec.empty()) {
    return invalid(
        "a cache format is empty; for example 4bit, nvfp4+46 or "
        "k=int4:channel,v=nvfp4+46+sink");
  }
  if (spec.size() > kLongestSpec) {
    return invalid("a cache format of " + std::to_string(spec.size()) +
                   " characters is longer than " + std::to_string(kLongestSpec));
  }
  Result<CacheFormat> format = parse_spec(spec);
  if (!format) return format.error().with_context("cache format " + quote_name(spec));
  return format;
}

std::vector<std::string> split_format_list(std::string_view list) {
  std::vector<std::string> items;
  bool open_pair = false;  // the last item is a k= part without its v= part
  size_t start = 0;
  while (start <= list.size()) {
    const size_t end = std::min(list.find(',', start), list.size());
    const std::string_view item = list.substr(start, end - start);
    if (open_pair && item.starts_with("v=")) {
      items.back() += ',';
      items.back() += item;
      open_pair = false;
    } else {
      items.emplace_back(item);
      open_pair = item.starts_with("k=");
    }
    start = end + 1;
  }
  return items;
}

std::string canonical_name(const CacheFormat& format) {
  std::string name = "k=" + side_name(format.k) + ",v=" + side_name(format.v);
  if (format.sink) name += "+sink";
  if (format.recent_tokens > 0) name += "+recent" + std::to_string(format.recent_tokens);
  if (format.strict) name += "+strict";
  return name;
}

std::string file_name_form(std::string_view spec) {
  std::string name(spec);
  for (char& c : name) c = c == '+' ? '.' : c == '%' ? 'p' : c;
  return name;
}

double asymptotic_bits_per_value(const CacheFormat& format, int head_dim, int page_tokens) {
  const int64_t bytes = unit_sections(format.k, format.v, page_tokens, head_dim).bytes;
  return 8.0 * static_cast<double>(bytes) / (2.0 * page_tokens * head_dim);
}

}  // namespace kvant::formats
