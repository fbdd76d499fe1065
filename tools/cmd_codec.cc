// `kvant codec`: raw codec bytes, for comparison with other implementations; the list of formats.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kvant/base/cpu_level.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/format.h"
#include "kvant/formats/spec.h"
#include "tools/command.h"

namespace kvant::tools {
namespace {

using formats::CacheFormat;
using formats::Codec;
using formats::FormatInfo;
using formats::SideFormat;

constexpr int64_t kValuesAtOnce = 1 << 18;  // between two looks at Ctrl-C

struct Options {
  std::string action;
  std::string kv;
  int head_dim = 0;
  float global_scale = 1.0f;
};

Error usage(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

// The one side that a format string stands for here.
Result<SideFormat> parse_side(const std::string& kv) {
  KVANT_ASSIGN(const CacheFormat format, formats::parse_cache_format(kv));
  const SideFormat allowed = {
      .base = format.k.base, .rotate = format.k.rotate, .four_over_six = format.k.four_over_six};
  const CacheFormat expected = {.k = allowed, .v = allowed};
  const bool two_sides = kv.find('=') != std::string::npos;
  if (two_sides || !(format == expected)) {
    return usage(fmt::format(
        "--kv {}: expected one base format, optionally with +46 or +rot (it stands for {})", kv,
        formats::canonical_name(format)));
  }
  return allowed;
}

Result<Codec> make_codec(Console& console, const Options& options) {
  KVANT_ASSIGN(const SideFormat side, parse_side(options.kv));
  if (!std::isfinite(options.global_scale) || options.global_scale <= 0.0f) {
    return usage("--global-scale: expected a finite number above 0");
  }
  const FormatInfo& info = formats::format_info(side.base);
  if (info.global_scale == formats::GlobalScale::kNone && options.global_scale != 1.0f) {
    console.note(fmt::format("{} has no global scale; --global-scale is not used", info.name));
  }
  KVANT_ASSIGN(const CpuLevel level, choose_cpu_level());
  return Codec::create(side, options.head_dim, level);
}

// Number of whole rows in the input.
Result<int64_t> count_rows(size_t input_bytes, int64_t row_bytes, std::string_view row_text) {
  const int64_t bytes = static_cast<int64_t>(input_bytes);
  if (bytes % row_bytes != 0) {
    return Error(
        ErrorCode::kCorruptData,
        fmt::format("standard input has {} bytes, which is not a whole number of rows of {} "
                    "bytes ({})",
                    bytes, row_bytes, row_text));
  }
  return bytes / row_bytes;
}

std::string_view as_text(const std::vector<uint8_t>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Status encode(Console& console, const Codec& codec, float global_scale) {
  const int64_t dim = codec.head_dim();
  KVANT_ASSIGN(const std::string input, read_stdin());
  KVANT_ASSIGN(const int64_t num_rows,
               count_rows(input.size(), dim * 4, fmt::format("{} float32 values", dim)));
  const int64_t code_bytes = codec.row_code_bytes(), scale_bytes = codec.row_scale_bytes();
  std::vector<uint8_t> scales(static_cast<size_t>(num_rows * scale_bytes));
  const int64_t step = std::max<int64_t>(1, kValuesAtOnce / dim);
  std::vector<float> x(static_cast<size_t>(std::min(step, num_rows) * dim));
  std::vector<uint8_t> codes(static_cast<size_t>(std::min(step, num_rows) * code_bytes));
  formats::EncodeStats total;
  for (int64_t row = 0; row < num_rows; row += step) {
    KVANT_TRY(Console::check_stop());
    const int64_t rows = std::min(step, num_rows - row);
    std::memcpy(x.data(), input.data() + row * dim * 4, static_cast<size_t>(rows * dim * 4));
    const formats::EncodeStats stats = codec.encode_rows(x.data(), rows, global_scale, codes.data(),
                                                         scales.data() + row * scale_bytes);
    total.non_finite += stats.non_finite;
    total.saturated += stats.saturated;
    codes.resize(static_cast<size_t>(rows * code_bytes));
    KVANT_TRY(console.print(as_text(codes)));
  }
  KVANT_TRY(console.print(as_text(scales)));
  if (total.non_finite > 0) {
    console.warn(fmt::format("{} of {} values are not finite; an engine would refuse them",
                             total.non_finite, num_rows * dim));
  }
  if (total.saturated > 0) {
    console.note(fmt::format("{} of {} values were saturated", total.saturated, num_rows * dim));
  }
  return {};
}

Status decode(Console& console, const Codec& codec, float global_scale) {
  const int64_t dim = codec.head_dim();
  const int64_t code_bytes = codec.row_code_bytes(), scale_bytes = codec.row_scale_bytes();
  KVANT_ASSIGN(const std::string input, read_stdin());
  KVANT_ASSIGN(const int64_t num_rows,
               count_rows(input.size(), code_bytes + scale_bytes,
                          fmt::format("{} of codes and {} of scales", code_bytes, scale_bytes)));
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(input.data());
  const uint8_t* scales = codes + num_rows * code_bytes;
  const int64_t step = std::max<int64_t>(1, kValuesAtOnce / dim);
  std::vector<float> x(static_cast<size_t>(std::min(step, num_rows) * dim));
  for (int64_t row = 0; row < num_rows; row += step) {
    KVANT_TRY(Console::check_stop());
    const int64_t rows = std::min(step, num_rows - row);
    codec.decode_rows(codes + row * code_bytes, scales + row * scale_bytes, rows, global_scale,
                      x.data());
    KVANT_TRY(console.print(
        {reinterpret_cast<const char*>(x.data()), static_cast<size_t>(rows * dim * 4)}));
  }
  return {};
}

// The table of docs/formats/README.md.
Status list(Console& console) {
  const auto block = [](const FormatInfo& info) -> std::string {
    switch (info.axis) {
      case formats::BlockAxis::kNone: return "-";
      case formats::BlockAxis::kToken: return "all tokens of a page, one channel";
      case formats::BlockAxis::kHeadDim: break;
    }
    return info.block_size == 0 ? "one token-head" : fmt::format("{} channels", info.block_size);
  };
  constexpr std::string_view kScales[] = {"-",   "E4M3", "E8M0", "f16", "f16 scale and f16 zero",
                                          "fp32"};
  constexpr std::string_view kGlobal[] = {"-", "per layer and side", "per KV head"};
  std::string text =
      "| format | what it is | sides | block | block scale | scale of a plan | bits per value |\n"
      "|---|---|---|---|---|---|---|\n";
  for (const FormatInfo& info : formats::all_formats()) {
    const std::string name(info.name);
    const CacheFormat format = {.k = {.base = info.id}, .v = {.base = info.id}};
    text += fmt::format("| `{}` | {} | {} | {} | {} | {} | {} |\n", name, info.summary,
                        info.for_values ? "K, V" : "K", block(info),
                        kScales[static_cast<size_t>(info.scale)],
                        kGlobal[static_cast<size_t>(info.global_scale)],
                        formats::asymptotic_bits_per_value(format, 128, 64));
  }
  text += "\nBits per value: a closed page of 64 tokens with head_dim 128, everything counted.\n";
  text += "\n| preset | stands for | |\n|---|---|---|\n";
  for (const formats::Preset& preset : formats::all_presets()) {
    text += fmt::format("| `{}` | `{}` | {} |\n", preset.name, preset.spec, preset.summary);
  }
  return console.print(text);
}

void add_codec_options(CLI::App& app, Options& options) {
  app.add_option("--kv", options.kv, "Base format whose blocks lie within a row, with +46 or +rot")
      ->required();
  app.add_option("--head-dim", options.head_dim, "Values in a row")->required();
  app.add_option("--global-scale", options.global_scale,
                 "The scale g of fp8, fp8:head, fp8e5m2 and nvfp4")
      ->capture_default_str();
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  const auto add = [&](const char* name, const char* help) {
    CLI::App* action = app.add_subcommand(name, help);
    action->callback([options, name] { options->action = name; });
    return action;
  };
  add_codec_options(
      *add("encode",
           "Rows of little-endian float32 on standard input to the codes of all rows, "
           "then the block scales of all rows"),
      *options);
  add_codec_options(*add("decode", "The other way"), *options);
  add("list", "The formats and presets, as Markdown");
  app.require_subcommand(1);
  return [options](Console& console) -> Status {
    if (options->action == "list") return list(console);
    KVANT_ASSIGN(const Codec codec, make_codec(console, *options));
    return options->action == "encode" ? encode(console, codec, options->global_scale)
                                       : decode(console, codec, options->global_scale);
  };
}

}  // namespace

const Command codec_command = {
    .name = "codec",
    .summary = "Encode and decode raw rows with a cache format, or list the formats",
    .examples =
        "kvant codec encode --kv nvfp4+46 --head-dim 128 --global-scale 0.01 < rows.f32 > "
        "rows.nvfp4\n"
        "kvant codec decode --kv nvfp4+46 --head-dim 128 --global-scale 0.01 < rows.nvfp4 > "
        "back.f32\n"
        "kvant codec list",
    .json = JsonOutput::kNone,
    .define = define,
};

}  // namespace kvant::tools
