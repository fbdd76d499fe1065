// `kvant eval`: what a cache format costs, in llama.cpp's perplexity protocol.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "kvant/model/evaluate.h"
#include "kvant/model/identity.h"
#include "tools/bundled_text.h"
#include "tools/command.h"
#include "tools/eval_layers.h"
#include "tools/eval_report.h"
#include "tools/eval_state.h"
#include "tools/format_caches.h"
#include "tools/json_output.h"
#include "tools/model_options.h"

namespace kvant::tools {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  std::string text;
  int64_t ctx = 0;  // 0: -c, or the base file's, or 512
  int64_t chunks = 0;
  std::string save_logits;
  std::string kl_base;
  std::string report;        // folder
  std::string resume;        // file
  int64_t layer_chunks = 0;  // 0: no errors by layer
};

constexpr int64_t kDefaultCtx = 512;
constexpr int kLogitRows = 64;  // enough to keep the output matrix's product busy

// What is fed, and what it is compared with.
struct Task {
  std::vector<int32_t> tokens;  // [chunks][ctx]
  int64_t ctx = 0;
  std::optional<model::LogitsFile> base;

  int64_t chunks() const { return static_cast<int64_t>(tokens.size()) / ctx; }
};

Result<int64_t> asked_ctx(const Options& options) {
  const int64_t context = options.model.context;
  if (options.ctx > 0 && context > 0 && options.ctx != context) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("--ctx {} and -c {}: chunks fill the whole context, give one of them",
                             options.ctx, context));
  }
  return std::max(options.ctx, context);
}

Result<std::vector<int32_t>> tokenize(const Options& options, const OpenModel& open) {
  KVANT_ASSIGN(const std::string text, read_file_or(options.text, registers_text()));
  KVANT_ASSIGN(const model::Tokenizer* tokenizer, need_tokenizer(open));
  return tokenizer->encode(text,
                           {.bos = model::Bos::kAsModel, .special = model::SpecialInText::kIgnore});
}

Status check_base(const Options& options, const Task& task, int64_t ctx) {
  const int64_t base_ctx = task.base->header().ctx;
  if (ctx == 0 || ctx == base_ctx) return {};
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("--ctx {} does not fit '{}', which was made with chunks of {}", ctx,
                           options.kl_base, base_ctx));
}

Result<Task> make_task(const Options& options, const OpenModel& open) {
  Task task;
  KVANT_ASSIGN(const int64_t ctx, asked_ctx(options));
  task.ctx = ctx > 0 ? ctx : kDefaultCtx;
  if (!options.kl_base.empty()) {
    KVANT_ASSIGN(task.base, model::LogitsFile::open(options.kl_base));
    KVANT_TRY(check_base(options, task, ctx));
    task.ctx = task.base->header().ctx;
  }
  std::vector<int32_t> text;
  if (!options.text.empty() || !task.base) {
    KVANT_ASSIGN(text, tokenize(options, open));
  }
  const std::span<const int32_t> all =
      task.base ? task.base->tokens() : std::span<const int32_t>(text);
  KVANT_ASSIGN(const auto whole, model::whole_chunks(all, task.ctx, options.chunks));
  const bool other_text =
      whole.size() > text.size() || !std::equal(whole.begin(), whole.end(), text.begin());
  if (task.base && !options.text.empty() && other_text) {
    return Error(
        ErrorCode::kInvalidArgument,
        fmt::format("'{}' was made from another text than '{}', or with another tokenizer; "
                    "leave out --text to use the tokens that are in the file",
                    options.kl_base, options.text));
  }
  task.tokens.assign(whole.begin(), whole.end());
  return task;
}

Result<std::unique_ptr<model::LogitsFileWriter>> make_writer(const Options& options,
                                                             const Task& task, int vocab) {
  if (options.save_logits.empty()) return std::unique_ptr<model::LogitsFileWriter>();
  const model::LogitsFileHeader header = {static_cast<int32_t>(task.ctx), vocab,
                                          static_cast<int32_t>(task.chunks())};
  return model::LogitsFileWriter::create(options.save_logits, header, task.tokens);
}

// BOS as the model wants it; -1: none. Random weights have no vocabulary to look it up in.
int32_t chunk_bos(const OpenModel& open) {
  if (!open.tokenizer || !open.tokenizer->adds_bos()) return -1;
  return open.tokenizer->bos().value_or(-1);
}

std::string file_hash(const std::string& path) {
  const Result<std::string> bytes = read_file(path);
  return bytes ? model::to_hex(model::sha256(*bytes)) : std::string();
}

// Size and time of a base, which may be too large to hash.
Json base_stamp(const std::string& path) {
  std::error_code error;
  const auto size = static_cast<int64_t>(std::filesystem::file_size(path, error));
  const auto time = std::filesystem::last_write_time(path, error).time_since_epoch().count();
  return {size, static_cast<int64_t>(time)};
}

// All that decides the scores.
Result<EvalIdentity> identity_of(const Options& options, const Task& task, const OpenModel& open,
                                 const EvalReport& report) {
  const auto bytes = std::as_bytes(std::span(task.tokens));
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  KVANT_ASSIGN(const model::Sha256 weights,
               model::weights_id(open.model->source(), model::default_cache_dir()));
  EvalIdentity identity;
  Json formats = Json::array();
  for (const EvalRow& row : report.rows) formats.push_back(row.kv_resolved);
  identity.facts = {
      {"kvant version", KVANT_VERSION},
      {"weights", model::to_hex(weights)},
      {"ctx", task.ctx},
      {"number of chunks", task.chunks()},
      {"text", model::to_hex(model::sha256(text))},
      {"BOS", chunk_bos(open)},
      {"kv", std::move(formats)},
      {"page size in tokens", options.model.page_tokens},
      {"device", options.model.device},
      {"plan", options.model.plan.empty() ? Json() : Json(file_hash(options.model.plan))},
      {"base", task.base ? base_stamp(options.kl_base) : Json()},
      {"chunks by layer", options.layer_chunks}};
  identity.num_formats = report.rows.size();
  identity.scored_per_chunk = model::scored_per_chunk(task.ctx);
  identity.num_chunks = task.chunks();
  return identity;
}

// What a run works on; all of it outlives the run.
struct Work {
  Console& console;
  const Options& options;
  const Task& task;
  OpenModel& open;
  const std::vector<KvChoice>& choices;
  EvalState* state;  // null: nothing is kept

  Status measure(EvalReport& report) const;
  Status measure_by_layer(EvalReport& report) const;
};

Status Work::measure(EvalReport& report) const {
  const int vocab = open.model->config().vocab_size;
  std::vector<FormatCaches::Choice> formats;
  for (const KvChoice& choice : choices) formats.push_back({choice.format, {}});
  KVANT_ASSIGN(FormatCaches caches,
               FormatCaches::create(options.model, open, formats, task.ctx, kLogitRows));
  KVANT_ASSIGN(const auto writer, make_writer(options, task, vocab));
  ThreadPool pool(options.model.threads);
  Progress progress(console, "evaluating", static_cast<int64_t>(task.tokens.size() * caches.size()),
                    "tokens");
  std::vector<double> bits(caches.size());

  model::EvalRequest request;
  request.tokens = task.tokens;
  request.ctx = task.ctx;
  request.bos = chunk_bos(open);
  request.vocab = vocab;
  request.sources = caches.sources();
  request.base = task.base ? &*task.base : nullptr;
  request.save = writer.get();
  request.pool = &pool;
  if (state != nullptr && state->data().chunks > 0) {
    request.done = state->data().scores;
    bits = state->data().bits_per_value;
    console.note(fmt::format("'{}' has {} of {} chunks", options.resume, state->data().chunks,
                             task.chunks()));
  }
  request.on_chunk = [&](int64_t chunk, std::span<const model::TokenScores> scores) -> Status {
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = caches[i].cache().bytes().bits_per_value();
    return state != nullptr ? state->add_chunk(chunk, scores, bits) : Status();
  };
  request.on_progress = [&](const model::EvalProgress& now) -> Status {
    progress.update(now.tokens_done,
                    now.first_ppl > 0 ? fmt::format("ppl {:.3f}", now.first_ppl) : std::string());
    return Console::check_stop();
  };
  KVANT_ASSIGN(const model::EvalResult result, model::evaluate(request));
  if (writer) KVANT_TRY(writer->finish());
  for (size_t i = 0; i < report.rows.size(); ++i) {
    report.rows[i].summary = result.summaries[i];
    report.rows[i].bits_per_value = bits[i];
  }
  report.tokens_scored = result.summaries[0].num_tokens;
  add_details(report, result.scores);
  return {};
}

Status Work::measure_by_layer(EvalReport& report) const {
  std::vector<LayerRequest> requests(choices.size());
  int64_t total = 0;
  for (size_t i = 0; i < choices.size(); ++i) {
    LayerRequest& request = requests[i];
    request.format = choices[i].format;
    request.ctx = task.ctx;
    request.bos = chunk_bos(open);
    request.tokens =
        std::span(task.tokens)
            .first(static_cast<size_t>(std::min(options.layer_chunks, task.chunks()) * task.ctx));
    if (request.format.is_bf16()) continue;
    for (int layer = 0; layer < open.model->config().num_layers; ++layer) {
      const auto known = state != nullptr ? state->layer(i, layer) : std::nullopt;
      if (known) {
        report.rows[i].layers.push_back(*known);
      } else {
        request.layers.push_back(layer);
      }
    }
    total += layer_tokens(request);
  }
  Progress progress(console, "evaluating layer by layer", total, "tokens");
  int64_t done = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].on_tokens = [&](int64_t tokens) -> Status {
      progress.update(done += tokens, choices[i].asked);
      return Console::check_stop();
    };
    requests[i].on_layer = [&](const LayerError& error) -> Status {
      report.rows[i].layers.push_back(error);
      return state != nullptr ? state->add_layer(i, error) : Status();
    };
    KVANT_TRY(measure_layers(options.model, open, requests[i]));
  }
  report.layer_chunks = std::min(options.layer_chunks, task.chunks());
  return {};
}

// The command that gives the same numbers.
std::string command_line(const Options& options, const Task& task,
                         const std::vector<KvChoice>& choices) {
  std::string line = fmt::format("kvant eval {}", options.model.model);
  std::vector<std::string> names;
  for (const KvChoice& choice : choices) names.push_back(choice.asked);
  line +=
      fmt::format(" --kv {} --ctx {} --chunks {}", fmt::join(names, ","), task.ctx, task.chunks());
  if (options.model.page_tokens != 64) {
    line += fmt::format(" --page-tokens {}", options.model.page_tokens);
  }
  if (!options.text.empty()) line += " --text " + options.text;
  if (!options.kl_base.empty()) line += " --kl-base " + options.kl_base;
  if (!options.model.plan.empty()) line += " --plan " + options.model.plan;
  if (options.layer_chunks > 0) line += fmt::format(" --by-layer {}", options.layer_chunks);
  return line;
}

EvalReport empty_report(const Options& options, const Task& task, const OpenModel& open,
                        const std::vector<KvChoice>& choices) {
  EvalReport report;
  report.command = command_line(options, task, choices);
  report.model = options.model.model;
  report.text = options.text.empty() && !task.base ? kBundledName : options.text;
  report.base_is_row = !task.base;
  report.base = task.base ? options.kl_base : choices[0].asked;
  report.ctx = task.ctx;
  report.chunks = task.chunks();
  report.page_tokens = options.model.page_tokens;
  for (const KvChoice& choice : choices) {
    EvalRow row;
    row.kv = choice.asked;
    row.kv_resolved = choice.resolved;
    row.bits_per_value_asymptotic = formats::asymptotic_bits_per_value(
        choice.format, open.model->config().head_dim, options.model.page_tokens);
    report.rows.push_back(std::move(row));
  }
  return report;
}

Status run(Console& console, const Options& options) {
  if (!options.resume.empty() && !options.save_logits.empty()) {
    return Error(ErrorCode::kInvalidArgument,
                 "--save-logits needs the predictions of all chunks and --resume keeps only their "
                 "scores: give one of them");
  }
  KVANT_ASSIGN(const std::vector<KvChoice> choices, parse_kv(options.kv));
  if (!options.report.empty()) KVANT_TRY(make_report_folder(options.report));
  KVANT_ASSIGN(OpenModel open, open_model(console, options.model));
  KVANT_ASSIGN(const Task task, make_task(options, open));
  Options sized = options;
  sized.model.context = task.ctx;
  EvalReport report = empty_report(options, task, open, choices);
  std::unique_ptr<EvalState> state;
  if (!options.resume.empty()) {
    KVANT_ASSIGN(const EvalIdentity identity, identity_of(options, task, open, report));
    KVANT_ASSIGN(state, EvalState::open(options.resume, identity));
  }
  const Work work = {console, sized, task, open, choices, state.get()};
  KVANT_TRY(work.measure(report));
  if (options.layer_chunks > 0) KVANT_TRY(work.measure_by_layer(report));
  if (!options.report.empty()) {
    KVANT_TRY(write_eval_report(report, options.report));
    console.note(fmt::format("report: {}/report.html and report.md", options.report));
  }
  if (console.json()) return print_json(console, eval_json(report));
  console.note(fmt::format("{} chunks of {} tokens, {} tokens scored; ΔNLL and KL relative to {}",
                           report.chunks, report.ctx, report.tokens_scored, report.base));
  return console.print(eval_table(report));
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kList);
  app.add_option(
         "--text", options->text,
         "Text to predict; '-' is standard input (default: the base's, or a bundled text of "
         "prose, dialogue, a dictionary, code and lists)")
      ->type_name("FILE");
  app.add_option("--ctx", options->ctx, "Tokens per chunk (default: 512, or the base's)")
      ->check(CLI::Range(int64_t{4}, int64_t{1} << 24));
  app.add_option("--chunks", options->chunks, "Only the first N chunks (default: all)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--save-logits", options->save_logits,
                 "Write the first format's predictions to a logits file of llama.cpp's perplexity "
                 "tool (2 bytes a token of the vocabulary and scored position)")
      ->type_name("FILE");
  app.add_option("--kl-base", options->kl_base,
                 "Compare with this logits file (from --save-logits, llama-perplexity or "
                 "bench/quality/exact_base.py) instead of the first format")
      ->type_name("FILE");
  app.add_option("--report", options->report,
                 "Write a report with plots into this folder: report.html, report.md, report.json")
      ->type_name("DIR");
  app.add_option("--by-layer", options->layer_chunks,
                 "Also quantise one layer at a time, over the first N chunks")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--resume", options->resume,
                 "Keep what is finished in this file, and go on from there if it exists")
      ->type_name("FILE");
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command eval_command = {
    .name = "eval",
    .summary = "Measure perplexity and KL divergence of cache formats on a text",
    .examples =
        "kvant eval model.gguf --kv bf16,8bit,4bit\n"
        "kvant eval model.gguf --kv bf16,8bit,4bit --text wiki.txt --chunks 16\n"
        "kvant eval model.gguf --kv bf16,8bit,4bit --by-layer 1 --report out --resume out.state\n"
        "kvant eval model.gguf --kv bf16 --text wiki.txt --save-logits base.kld\n"
        "kvant eval model.gguf --kv nvfp4,4bit --kl-base base.kld --json",
    .define = define,
};

}  // namespace kvant::tools
