// `kvant calibrate`: a quantisation plan for a model, measured on a text.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/calib/calibrate.h"
#include "kvant/model/evaluate.h"
#include "kvant/model/identity.h"
#include "tools/bundled_text.h"
#include "tools/command.h"
#include "tools/json_output.h"
#include "tools/model_options.h"

namespace kvant::tools {
namespace {

// Everything that a plan can hold, in frames that other formats can be fitted to.
constexpr std::string_view kDefaultKv = "k=nvfp4+bias+smooth+46,v=nvfp4+46+sink";
// Not the text that `kvant eval` predicts if none is given: a plan is judged on other text.
constexpr std::string_view kBundledName = "bundled novel";

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  std::string text;
  std::string output;
  int64_t ctx = 512;
  int64_t chunks = 32;
  double smooth_alpha = 0.5;
};

struct Corpus {
  std::string name;
  std::string sha256;
  std::vector<int32_t> tokens;  // [chunks][ctx]
};

// `count` of the chunks of `ctx` tokens, spread evenly over the text; the first token of each is
// BOS where the model wants it (the protocol of `kvant eval`).
std::vector<int32_t> spread_chunks(std::span<const int32_t> whole, int64_t ctx, int64_t count,
                                   const model::Tokenizer& tokenizer) {
  const int64_t available = static_cast<int64_t>(whole.size()) / ctx;
  count = std::min(count, available);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    const auto chunk =
        whole.subspan(static_cast<size_t>(i * available / count * ctx), static_cast<size_t>(ctx));
    tokens.insert(tokens.end(), chunk.begin(), chunk.end());
    if (tokenizer.adds_bos() && tokenizer.bos())
      tokens[static_cast<size_t>(i * ctx)] = *tokenizer.bos();
  }
  return tokens;
}

Result<Corpus> read_corpus(const Options& options, const OpenModel& open) {
  KVANT_ASSIGN(const model::Tokenizer* tokenizer, need_tokenizer(open));
  Corpus corpus;
  KVANT_ASSIGN(const std::string text, read_file_or(options.text, novel_text()));
  corpus.name = options.text.empty() ? kBundledName : options.text;
  corpus.sha256 = model::to_hex(model::sha256(text));
  KVANT_ASSIGN(const std::vector<int32_t> tokens,
               tokenizer->encode(
                   text, {.bos = model::Bos::kAsModel, .special = model::SpecialInText::kIgnore}));
  KVANT_ASSIGN(const auto whole, model::whole_chunks(tokens, options.ctx, 0));
  corpus.tokens = spread_chunks(whole, options.ctx, options.chunks, *tokenizer);
  return corpus;
}

Result<formats::QuantPlan> measure(Console& console, const Options& options, const KvChoice& kv,
                                   const Corpus& corpus, OpenModel& open) {
  calib::CalibrationConfig config;
  config.format = kv.format;
  config.page_tokens = options.model.page_tokens;
  config.context_tokens = options.ctx;
  config.smooth_alpha = options.smooth_alpha;
  config.corpus_sha256 = corpus.sha256;
  config.cancel = &Console::stop_flag();
  // The sizes that calibrate() will ask for: fails where the model or memory do not allow them.
  KVANT_TRY(
      runtime_options(options.model, open, calib::calibration_runtime(config).format, options.ctx));
  const int passes = calib::calibration_passes(kv.format);
  const int64_t total = static_cast<int64_t>(corpus.tokens.size()) * passes;
  Progress progress(console, "calibrating", total, "tokens");
  int64_t done = 0;
  const auto loop = [&](const calib::RunSequence& run) -> Status {
    const std::span<const int32_t> tokens(corpus.tokens);
    const size_t ctx = static_cast<size_t>(options.ctx);
    for (size_t first = 0; first < tokens.size(); first += ctx) {
      KVANT_TRY(run(tokens.subspan(first, ctx)));
      done += options.ctx;
      progress.update(done);
    }
    return {};
  };
  return calib::calibrate(*open.model, config, loop);
}

// One kind of tensor over all layers.
struct Term {
  std::string name;
  int64_t layers = 0;
  int64_t values = 0;
  float smallest = 0, largest = 0;
};

std::vector<Term> summarize(const formats::QuantPlan& plan) {
  struct Row {
    const char* name;
    formats::SidePlan formats::LayerPlan::*side;
    std::vector<float> formats::SidePlan::*values;
  };
  using formats::LayerPlan;
  using formats::SidePlan;
  const Row rows[] = {{"k.global_scale", &LayerPlan::k, &SidePlan::global_scale},
                      {"k.bias", &LayerPlan::k, &SidePlan::bias},
                      {"k.smooth", &LayerPlan::k, &SidePlan::smooth},
                      {"v.global_scale", &LayerPlan::v, &SidePlan::global_scale},
                      {"v.bias", &LayerPlan::v, &SidePlan::bias}};
  std::vector<Term> terms;
  for (const Row& row : rows) {
    Term term{.name = row.name};
    for (const LayerPlan& layer : plan.layers) {
      for (const float value : layer.*row.side.*row.values) {
        term.smallest = term.values == 0 ? value : std::min(term.smallest, value);
        term.largest = term.values == 0 ? value : std::max(term.largest, value);
        ++term.values;
      }
      term.layers += (layer.*row.side.*row.values).empty() ? 0 : 1;
    }
    if (term.values > 0) terms.push_back(std::move(term));
  }
  return terms;
}

Status report(Console& console, const Options& options, const KvChoice& kv, const Corpus& corpus,
              const formats::QuantPlan& plan) {
  const std::vector<Term> terms = summarize(plan);
  const int64_t chunks = static_cast<int64_t>(corpus.tokens.size()) / options.ctx;
  if (!console.json()) {
    console.note(fmt::format("{} chunks of {} tokens of {}; plan for {}", chunks, options.ctx,
                             corpus.name, plan.kv));
    Table table({options.output, "layers", "values", "smallest", "largest"});
    for (const Term& term : terms) {
      table.add_row({term.name, fmt::format("{}", term.layers), fmt::format("{}", term.values),
                     fmt::format("{:.4g}", term.smallest), fmt::format("{:.4g}", term.largest)});
    }
    return console.print(table.str());
  }
  std::error_code error;
  Json object = json_object("calibrate");
  object["model"] = options.model.model;
  object["text"] = corpus.name;
  object["corpus_sha256"] = corpus.sha256;
  object["kv"] = kv.asked;
  object["kv_resolved"] = plan.kv;
  object["ctx"] = options.ctx;
  object["chunks"] = chunks;
  object["tokens"] = corpus.tokens.size();
  object["smooth_alpha"] = options.smooth_alpha;
  object["geometry_id"] = plan.geometry_id;
  object["weights_id"] = plan.weights_id;
  object["output"] = options.output;
  object["output_bytes"] = std::filesystem::file_size(options.output, error);
  Json tensors = Json::array();
  for (const Term& term : terms) {
    tensors.push_back({{"name", term.name},
                       {"layers", term.layers},
                       {"values", term.values},
                       {"smallest", term.smallest},
                       {"largest", term.largest}});
  }
  object["tensors"] = std::move(tensors);
  return print_json(console, object);
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(const std::vector<KvChoice> choices, parse_kv(options.kv, kDefaultKv));
  if (choices.size() != 1) {
    return Error(ErrorCode::kInvalidArgument,
                 "a plan is for one cache format: give one with --kv, or calibrate once for each");
  }
  const KvChoice& kv = choices[0];
  if (calib::calibration_passes(kv.format) == 0) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("{} needs no plan: it has neither +bias nor +smooth nor a scale of "
                             "fp8 or nvfp4",
                             kv.asked));
  }
  KVANT_ASSIGN(OpenModel open, open_model(console, options.model));
  KVANT_ASSIGN(const Corpus corpus, read_corpus(options, open));
  KVANT_ASSIGN(const formats::QuantPlan plan, measure(console, options, kv, corpus, open));
  KVANT_TRY(plan.save(options.output));
  return report(console, options, kv, corpus, plan);
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  app.remove_option(app.get_option("--plan"));
  app.remove_option(app.get_option("--context"));  // --ctx is the context
  app.add_option("-o,--output", options->output, "File to write the plan to")
      ->type_name("FILE")
      ->required();
  app.add_option("--text", options->text,
                 "Text like what the model will read; '-' is standard input (default: a bundled "
                 "piece of a novel)")
      ->type_name("FILE");
  app.add_option("--kv", options->kv,
                 fmt::format("Cache format that the plan is for: what it holds follows from its "
                             "options (default: {})",
                             kDefaultKv))
      ->type_name("SPEC")
      ->expected(1)
      ->allow_extra_args(false);
  app.add_option("--ctx", options->ctx, "Tokens per chunk; each starts with an empty cache")
      ->check(CLI::Range(int64_t{16}, int64_t{1} << 24))
      ->capture_default_str();
  app.add_option("--chunks", options->chunks, "At most so many chunks, spread over the text")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  app.add_option("--smooth-alpha", options->smooth_alpha,
                 "+smooth: factors are |k|^ALPHA / |q|^(1 - ALPHA), largest of each channel")
      ->type_name("ALPHA")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command calibrate_command = {
    .name = "calibrate",
    .summary = "Measure scales, biases and smoothing factors of a model's cache on a text",
    .examples =
        "kvant calibrate model.gguf --text book.txt -o model.kvplan\n"
        "kvant eval model.gguf --plan model.kvplan --kv bf16,k=nvfp4+bias+smooth,v=nvfp4+sink\n"
        "kvant calibrate model.gguf --text book.txt --kv fp8:head+bias -o fp8.kvplan",
    .define = define,
};

}  // namespace kvant::tools
