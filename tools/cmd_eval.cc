// `kvant eval`: what a cache format costs, in llama.cpp's perplexity protocol.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvant/model/evaluate.h"
#include "tools/bundled_text.h"
#include "tools/command.h"
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

// One cache format with its result.
struct Row {
  KvChoice kv;
  double bits_per_value = 0;
  double bits_per_value_asymptotic = 0;
  model::EvalSummary summary;
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
  std::string text;
  if (options.text.empty()) {
    text = registers_text();
  } else {
    KVANT_ASSIGN(text, read_file(options.text));
  }
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

Status measure(Console& console, const Options& options, const Task& task, OpenModel& open,
               std::vector<Row>& rows) {
  const model::ModelConfig& config = open.model->config();
  std::vector<formats::CacheFormat> formats;
  for (Row& row : rows) {
    formats.push_back(row.kv.format);
    row.bits_per_value_asymptotic = formats::asymptotic_bits_per_value(
        row.kv.format, config.head_dim, options.model.page_tokens);
  }
  KVANT_ASSIGN(FormatCaches caches,
               FormatCaches::create(options.model, open, formats, task.ctx, kLogitRows));
  KVANT_ASSIGN(const auto writer, make_writer(options, task, config.vocab_size));
  ThreadPool pool(options.model.threads);
  Progress progress(console, "evaluating", static_cast<int64_t>(task.tokens.size() * caches.size()),
                    "tokens");

  model::EvalRequest request;
  request.tokens = task.tokens;
  request.ctx = task.ctx;
  request.bos = chunk_bos(open);
  request.vocab = config.vocab_size;
  request.sources = caches.sources();
  request.base = task.base ? &*task.base : nullptr;
  request.save = writer.get();
  request.pool = &pool;
  request.on_progress = [&](const model::EvalProgress& now) -> Status {
    progress.update(now.tokens_done,
                    now.first_ppl > 0 ? fmt::format("ppl {:.3f}", now.first_ppl) : std::string());
    return Console::stop_requested() ? Status(Console::cancelled()) : Status();
  };
  KVANT_ASSIGN(const std::vector<model::EvalSummary> summaries, model::evaluate(request));
  if (writer) KVANT_TRY(writer->finish());
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].summary = summaries[i];
    rows[i].bits_per_value = caches[i].cache().bytes().bits_per_value();
  }
  return {};
}

Json row_json(const Row& row) {
  const model::EvalSummary& summary = row.summary;
  return {{"kv", row.kv.asked},
          {"kv_resolved", row.kv.resolved},
          {"bits_per_value", row.bits_per_value},
          {"bits_per_value_asymptotic", row.bits_per_value_asymptotic},
          {"ppl", summary.ppl},
          {"nll", summary.nll},
          {"delta_nll", summary.delta_nll},
          {"delta_nll_low", summary.delta_nll_low},
          {"delta_nll_high", summary.delta_nll_high},
          {"kl_mean", summary.kl_mean},
          {"kl_median", summary.kl_median},
          {"kl_p99", summary.kl_p99},
          {"top1", summary.top1}};
}

std::string table_text(const std::vector<Row>& rows) {
  Table table({"kv", "bits/value", "ppl", "ΔNLL [95 % interval]", "KL mean", "KL median", "KL 99 %",
               "top-1"});
  for (const Row& row : rows) {
    const model::EvalSummary& summary = row.summary;
    table.add_row({row.kv.asked, fmt::format("{:.2f}", row.bits_per_value),
                   fmt::format("{:.4f}", summary.ppl),
                   fmt::format("{:+.4f} [{:+.4f}, {:+.4f}]", summary.delta_nll,
                               summary.delta_nll_low, summary.delta_nll_high),
                   fmt::format("{:.5f}", summary.kl_mean), fmt::format("{:.5f}", summary.kl_median),
                   fmt::format("{:.5f}", summary.kl_p99),
                   fmt::format("{:.2f} %", 100 * summary.top1)});
  }
  return table.str();
}

Status report(Console& console, const Options& options, const Task& task,
              const std::vector<Row>& rows) {
  const int64_t scored = rows[0].summary.num_tokens;
  const std::string base = task.base ? options.kl_base : rows[0].kv.asked;
  if (!console.json()) {
    console.note(fmt::format("{} chunks of {} tokens, {} tokens scored; ΔNLL and KL relative to {}",
                             task.chunks(), task.ctx, scored, base));
    return console.print(table_text(rows));
  }
  Json object = json_object("eval");
  object["model"] = options.model.model;
  object["text"] = options.text.empty() && !task.base ? kRegistersName : options.text;
  object["ctx"] = task.ctx;
  object["chunks"] = task.chunks();
  object["tokens_scored"] = scored;
  object["base"] = base;
  Json results = Json::array();
  for (const Row& row : rows) results.push_back(row_json(row));
  object["results"] = std::move(results);
  return print_json(console, object);
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(std::vector<KvChoice> choices, parse_kv(options.kv));
  std::vector<Row> rows(choices.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i].kv = std::move(choices[i]);
  KVANT_ASSIGN(OpenModel open, open_model(console, options.model));
  KVANT_ASSIGN(const Task task, make_task(options, open));
  Options sized = options;
  sized.model.context = task.ctx;
  KVANT_TRY(measure(console, sized, task, open, rows));
  return report(console, options, task, rows);
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
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command eval_command = {
    .name = "eval",
    .summary = "Measure perplexity and KL divergence of cache formats on a text",
    .examples =
        "kvant eval model.gguf --kv bf16,8bit,4bit\n"
        "kvant eval model.gguf --kv bf16,8bit,4bit --text wiki.txt --chunks 16\n"
        "kvant eval model.gguf --kv bf16 --text wiki.txt --save-logits base.kld\n"
        "kvant eval model.gguf --kv nvfp4,4bit --kl-base base.kld --json",
    .define = define,
};

}  // namespace kvant::tools
