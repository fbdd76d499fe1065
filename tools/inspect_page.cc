// Page files and plan files in words.
#include <fmt/format.h>

#include <algorithm>
#include <span>

#include "kvant/cache/page_object.h"
#include "kvant/formats/plan.h"
#include "tools/cli_support.h"
#include "tools/inspect_file.h"

namespace kvant::tools {
namespace {

std::string hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (const uint8_t byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

std::string_view layout_name(cache::Layout layout) {
  switch (layout) {
    case cache::Layout::kPlanar: return "planar";
    case cache::Layout::kCpu: return "cpu";
    case cache::Layout::kSm90: return "sm90";
  }
  return "?";
}

// "all 24 layers", "3 of 24 layers", "none".
template <typename Has>
std::string in_layers(const formats::QuantPlan& plan, Has has) {
  const auto count = std::count_if(plan.layers.begin(), plan.layers.end(), has);
  if (count == 0) return "none";
  if (count == static_cast<int64_t>(plan.layers.size())) return fmt::format("all {} layers", count);
  return fmt::format("{} of {} layers", count, plan.layers.size());
}

}  // namespace

Result<Report> inspect_page(const InspectOptions& options) {
  KVANT_ASSIGN(const std::vector<std::byte> bytes, cache::load_page_file(options.path));
  KVANT_ASSIGN(const cache::PageObject object, cache::parse_page_object(bytes));
  const cache::PageObjectHeader& header = object.header;
  const uint64_t last = header.first_position + header.num_tokens - 1;
  Report report;
  report.title = fmt::format("{}: a stored page of a KV cache, version {}", options.path,
                             cache::kPageObjectVersion);
  report.add("tokens",
             fmt::format("{} tokens at positions {} to {} (page {})", header.num_tokens,
                         header.first_position, last, header.first_position / header.page_tokens));
  report.add("layer group",
             fmt::format("{}, KV heads {} to {}", header.layer_group, header.first_kv_head,
                         header.first_kv_head + header.num_kv_heads - 1));
  report.add("layout", std::string(layout_name(header.layout)));
  report.add("payload", fmt::format("{} ({} a token), checksums match",
                                    format_bytes(static_cast<int64_t>(object.payload.size())),
                                    format_bytes(static_cast<int64_t>(object.payload.size()) /
                                                 header.num_tokens)));
  report.add("fingerprint", hex(header.fingerprint) + " (model, formats, plan, page size)");
  report.add("key", hex(header.key));
  report.add("parent key", hex(header.parent_key));
  report.add("token ids", fmt::format("{}", fmt::join(header.token_ids, " ")));
  report.json = {{"kind", "page"},
                 {"version", cache::kPageObjectVersion},
                 {"page_tokens", header.page_tokens},
                 {"num_tokens", header.num_tokens},
                 {"first_position", header.first_position},
                 {"layer_group", header.layer_group},
                 {"first_kv_head", header.first_kv_head},
                 {"num_kv_heads", header.num_kv_heads},
                 {"layout", layout_name(header.layout)},
                 {"payload_bytes", object.payload.size()},
                 {"fingerprint", hex(header.fingerprint)},
                 {"key", hex(header.key)},
                 {"parent_key", hex(header.parent_key)},
                 {"token_ids", header.token_ids}};
  return report;
}

Result<Report> inspect_plan(const InspectOptions& options) {
  KVANT_ASSIGN(const formats::QuantPlan plan, formats::QuantPlan::load(options.path));
  Report report;
  report.title = fmt::format("{}: a quantisation plan, version {}", options.path, plan.version);
  report.add("made for", plan.geometry_id);
  report.add("weights", plan.weights_id);
  report.add("cache format", plan.kv);
  report.add("corpus", plan.corpus_sha256);
  report.add("layers", fmt::format("{}", plan.layers.size()));
  report.json = {{"kind", "plan"},
                 {"version", plan.version},
                 {"geometry_id", plan.geometry_id},
                 {"weights_id", plan.weights_id},
                 {"kv", plan.kv},
                 {"corpus_sha256", plan.corpus_sha256},
                 {"num_layers", plan.layers.size()}};
  const auto term = [&](const char* name, formats::SidePlan formats::LayerPlan::*side,
                        std::vector<float> formats::SidePlan::*values) {
    const auto has = [&](const formats::LayerPlan& layer) {
      return !(layer.*side.*values).empty();
    };
    report.add(name, in_layers(plan, has));
    report.json["layers_with"][name] = std::count_if(plan.layers.begin(), plan.layers.end(), has);
  };
  using formats::LayerPlan;
  using formats::SidePlan;
  term("k scales", &LayerPlan::k, &SidePlan::global_scale);
  term("k bias", &LayerPlan::k, &SidePlan::bias);
  term("k smooth", &LayerPlan::k, &SidePlan::smooth);
  term("v scales", &LayerPlan::v, &SidePlan::global_scale);
  term("v bias", &LayerPlan::v, &SidePlan::bias);
  return report;
}

}  // namespace kvant::tools
