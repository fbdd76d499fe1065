// Model files in words, and what of them is supported.
#include <fmt/format.h>

#include <map>
#include <set>

#include "kvant/model/chat_template.h"
#include "kvant/model/config.h"
#include "kvant/model/gguf.h"
#include "kvant/model/tokenizer.h"
#include "tools/cli_support.h"
#include "tools/inspect_file.h"

namespace kvant::tools {
namespace {

using model::Gguf;
using model::GgufTensor;
using model::ModelConfig;

std::string text_of(const Gguf& gguf, std::string_view key) {
  const auto value = gguf.string(key);
  return value ? std::string(*value) : "";
}

std::string windows_of(const ModelConfig& config) {
  std::set<int> sizes;
  int windowed = 0;
  for (const int window : config.layer_window) {
    if (window == 0) continue;
    sizes.insert(window);
    ++windowed;
  }
  if (windowed == 0) return "full attention in all layers";
  return fmt::format("window of {} tokens in {} of {} layers", fmt::join(sizes, ", "), windowed,
                     config.num_layers);
}

void add_config(const ModelConfig& config, Report& report) {
  report.add("geometry", fmt::format("{} layers of {} channels, {} query heads, {} KV heads of {}",
                                     config.num_layers, config.dim, config.num_query_heads,
                                     config.num_kv_heads, config.head_dim));
  if (config.num_experts > 0) {
    report.add("experts", fmt::format("{} a layer, {} used for a token", config.num_experts,
                                      config.num_experts_used));
  }
  report.add("attention", windows_of(config));
  report.add("context", fmt::format("{} tokens", config.context_length));
  report.add("geometry id", config.geometry_id());
  const int64_t values = int64_t{2} * config.num_layers * config.num_kv_heads * config.head_dim;
  report.add("cache",
             fmt::format("{} values a token; {} in BF16", values, format_bytes(2 * values)));
  report.json["geometry"] = {{"id", config.geometry_id()},
                             {"num_layers", config.num_layers},
                             {"dim", config.dim},
                             {"num_query_heads", config.num_query_heads},
                             {"num_kv_heads", config.num_kv_heads},
                             {"head_dim", config.head_dim},
                             {"vocab_size", config.vocab_size},
                             {"context_length", config.context_length},
                             {"num_experts", config.num_experts}};
}

// Number and bytes of tensors by type.
void add_types(const Gguf& gguf, Report& report) {
  std::map<std::string, std::pair<int64_t, int64_t>> types;
  for (const GgufTensor& tensor : gguf.tensors()) {
    auto& [count, bytes] = types[std::string(formats::weight_type_name(tensor.type))];
    ++count;
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  std::string text;
  for (const auto& [name, what] : types) {
    text += fmt::format("{}{} {} ({})", text.empty() ? "" : ", ", what.first, name,
                        format_bytes(what.second));
    report.json["tensor_types"][name] = {{"count", what.first}, {"bytes", what.second}};
  }
  report.add("tensors", fmt::format("{}: {}", gguf.tensors().size(), text));
}

void add_metadata(const Gguf& gguf, Report& report) {
  Json list = Json::array();
  for (const std::string_view key : gguf.keys()) {
    const model::GgufValue& value = *gguf.find(key);
    const bool array = value.type == model::GgufValueType::kArray;
    const std::string type =
        array ? fmt::format("{} x {}", value.count, gguf_value_type_name(value.element_type))
              : std::string(gguf_value_type_name(value.type));
    report.add("key", fmt::format("{} ({})", key, type));
    list.push_back({{"key", std::string(key)}, {"type", type}});
  }
  report.json["metadata"] = std::move(list);
}

void add_tensors(const Gguf& gguf, Report& report) {
  Json list = Json::array();
  for (const GgufTensor& tensor : gguf.tensors()) {
    const std::vector<int64_t> dims(tensor.dims.begin(), tensor.dims.begin() + tensor.num_dims);
    const std::string_view type = formats::weight_type_name(tensor.type);
    report.add("tensor", fmt::format("{} {} [{}]", tensor.name, type, fmt::join(dims, ", ")));
    list.push_back({{"name", std::string(tensor.name)}, {"type", type}, {"dims", dims}});
  }
  report.json["tensors"] = std::move(list);
}

// "supported", or why not.
template <typename T>
std::string verdict(const Result<T>& result) {
  return result ? "supported" : "not supported: " + result.error().message();
}

// Whether the stored chat template is one that `kvant run` renders.
void add_chat_template(const Gguf& gguf, const Result<model::Tokenizer>& tokenizer,
                       Report& report) {
  const bool stored = gguf.has("tokenizer.chat_template");
  report.json["chat_template"] = stored;
  if (!stored) return report.add("chat template", "none: a base model");
  if (!tokenizer) return report.add("chat template", "stored in the file");
  const Result<model::ChatTemplate> chat = model::ChatTemplate::create(gguf, *tokenizer);
  report.add("chat template", fmt::format("stored in the file: {}", verdict(chat)));
  report.json["chat_template_supported"] = chat.has_value();
}

}  // namespace

Result<Report> inspect_model(const InspectOptions& options) {
  KVANT_ASSIGN(const Gguf gguf, Gguf::open(options.path));
  const Result<ModelConfig> config = model::read_config(gguf);
  const Result<model::Tokenizer> tokenizer = model::Tokenizer::create(gguf);
  const bool supported = config.has_value() && tokenizer.has_value();

  Report report;
  report.title = fmt::format("{}: a model, GGUF version {}, {}", options.path, gguf.version(),
                             format_bytes(gguf.file_bytes()));
  report.json = {{"kind", "model"},
                 {"version", gguf.version()},
                 {"file_bytes", gguf.file_bytes()},
                 {"supported", supported},
                 {"architecture", text_of(gguf, "general.architecture")},
                 {"name", text_of(gguf, "general.name")}};
  report.add("name", text_of(gguf, "general.name"));
  report.add("architecture",
             fmt::format("{}: {}", text_of(gguf, "general.architecture"), verdict(config)));
  if (config) add_config(*config, report);
  const std::string kind = text_of(gguf, "tokenizer.ggml.model");
  const std::string pre = text_of(gguf, "tokenizer.ggml.pre");
  report.add("tokenizer",
             fmt::format("{}{}{}: {}", kind, pre.empty() ? "" : "/", pre, verdict(tokenizer)));
  report.json["tokenizer"] = {{"model", kind}, {"pre", pre}, {"supported", tokenizer.has_value()}};
  add_chat_template(gguf, tokenizer, report);
  if (!config) report.json["architecture_error"] = config.error().message();
  if (!tokenizer) report.json["tokenizer"]["error"] = tokenizer.error().message();
  add_types(gguf, report);
  if (options.metadata) add_metadata(gguf, report);
  if (options.tensors) add_tensors(gguf, report);
  return report;
}

}  // namespace kvant::tools
