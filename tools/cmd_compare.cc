// `kvant compare`: what cache formats cost and bring on one text, in one table.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/model/evaluate.h"
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
  int64_t max_tokens = 4096;
  int64_t decode_tokens = 32;
};

constexpr int64_t kMinTokens = 64;  // below that there is no closed page to compare
// Few, so that little of the output matrix counts as reading the text (CacheLogits::seconds).
constexpr int kLogitRows = 16;

struct Row {
  KvChoice kv;
  double bytes_per_token = 0;  // of a closed page
  cache::CacheBytes cache;
  double prefill_tokens_per_second = 0;
  double decode_tokens_per_second = 0;
  model::EvalSummary summary;

  int64_t bytes_now() const { return cache.stored_pages_now + cache.bf16_pages_now; }
};

// Bytes that one more token takes in closed pages, all layers.
double closed_bytes_per_token(const model::ModelConfig& config, const formats::CacheFormat& format,
                              int page_tokens) {
  const double values = 2.0 * config.num_layers * config.num_kv_heads * config.head_dim;
  return values * formats::asymptotic_bits_per_value(format, config.head_dim, page_tokens) / 8;
}

Result<std::vector<int32_t>> read_tokens(const Options& options, const OpenModel& open,
                                         int64_t context) {
  KVANT_ASSIGN(const model::Tokenizer* tokenizer, need_tokenizer(open));
  KVANT_ASSIGN(const std::string text, read_file(options.text));
  KVANT_ASSIGN(std::vector<int32_t> tokens,
               tokenizer->encode(
                   text, {.bos = model::Bos::kAsModel, .special = model::SpecialInText::kIgnore}));
  const int64_t limit = std::min(options.max_tokens, context - options.decode_tokens - 1);
  if (static_cast<int64_t>(tokens.size()) > limit) {
    tokens.resize(static_cast<size_t>(std::max<int64_t>(limit, 0)));
  }
  if (static_cast<int64_t>(tokens.size()) < kMinTokens) {
    return Error(
        ErrorCode::kInvalidArgument,
        fmt::format("{} tokens of '{}' fit; at least {} are needed: give a longer text or a "
                    "larger context",
                    tokens.size(), options.text, kMinTokens));
  }
  return tokens;
}

// Greedy continuation after the text, one token at a time.
Result<double> decode_speed(model::CacheLogits& cache, int vocab, int64_t num_tokens,
                            int32_t first) {
  if (num_tokens == 0) return 0.0;
  std::vector<float> logits(static_cast<size_t>(vocab));
  int32_t token = first;
  // The first step is not timed: it warms up what reading the text has not touched.
  KVANT_TRY(cache.extend(std::span(&token, 1), 0, 1, logits));
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < num_tokens; ++i) {
    token = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    KVANT_TRY(cache.extend(std::span(&token, 1), 0, 1, logits));
  }
  const auto elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(num_tokens) / std::chrono::duration<double>(elapsed).count();
}

Status measure(Console& console, const Options& options, OpenModel& open,
               std::span<const int32_t> tokens, std::vector<Row>& rows) {
  const model::ModelConfig& config = open.model->config();
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  std::vector<FormatCaches::Choice> choices;
  for (Row& row : rows) {
    choices.push_back({row.kv.format, {}});
    row.bytes_per_token = closed_bytes_per_token(config, row.kv.format, options.model.page_tokens);
  }
  KVANT_ASSIGN(FormatCaches caches,
               FormatCaches::create(options.model, open, choices,
                                    num_tokens + options.decode_tokens + 1, kLogitRows));

  ThreadPool pool(options.model.threads);
  const auto total = num_tokens * static_cast<int64_t>(rows.size());
  Progress progress(console, "reading the text in every format", total, "tokens");
  model::EvalRequest request;
  request.tokens = tokens;
  request.ctx = num_tokens;
  request.vocab = config.vocab_size;
  request.sources = caches.sources();
  request.pool = &pool;
  request.on_progress = [&](const model::EvalProgress& now) -> Status {
    progress.update(now.tokens_done);
    return Console::check_stop();
  };
  KVANT_ASSIGN(const model::EvalResult result, model::evaluate(request));
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    row.summary = result.summaries[i];
    row.prefill_tokens_per_second = static_cast<double>(num_tokens) / caches[i].seconds();
    progress.update(total, fmt::format("decoding with {}", row.kv.asked));
    KVANT_ASSIGN(row.decode_tokens_per_second,
                 decode_speed(caches[i], config.vocab_size, options.decode_tokens, tokens.back()));
    row.cache = caches[i].cache().bytes();
  }
  return {};
}

Status report(Console& console, const Options& options, size_t num_tokens,
              const std::vector<Row>& rows) {
  if (console.json()) {
    Json object = json_object("compare");
    object["model"] = options.model.model;
    object["text"] = options.text;
    object["tokens"] = num_tokens;
    object["decode_tokens"] = options.decode_tokens;
    Json results = Json::array();
    for (const Row& row : rows) {
      results.push_back({{"kv", row.kv.asked},
                         {"kv_resolved", row.kv.resolved},
                         {"cache_bytes_per_token", row.bytes_per_token},
                         {"cache_bytes_now", row.bytes_now()},
                         {"bits_per_value", row.cache.bits_per_value()},
                         {"prefill_tokens_per_second", row.prefill_tokens_per_second},
                         {"decode_tokens_per_second", row.decode_tokens_per_second},
                         {"kl_mean", row.summary.kl_mean},
                         {"top1", row.summary.top1},
                         {"ppl", row.summary.ppl}});
    }
    object["results"] = std::move(results);
    return print_json(console, object);
  }
  Table table({"kv", "cache bytes/token", "cache now", "prefill tokens/s", "decode tokens/s",
               fmt::format("KL to {}", rows[0].kv.asked)});
  for (const Row& row : rows) {
    table.add_row({row.kv.asked, fmt::format("{:.0f}", row.bytes_per_token),
                   format_bytes(row.bytes_now()),
                   fmt::format("{:.1f}", row.prefill_tokens_per_second),
                   fmt::format("{:.1f}", row.decode_tokens_per_second),
                   fmt::format("{:.5f}", row.summary.kl_mean)});
  }
  console.note(fmt::format("{} tokens of {}; KL in nats, mean over the text's second half",
                           num_tokens, options.text));
  return console.print(table.str());
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(std::vector<KvChoice> choices, parse_kv(options.kv, "bf16,8bit,nvfp4,4bit"));
  std::vector<Row> rows(choices.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i].kv = std::move(choices[i]);
  KVANT_ASSIGN(OpenModel open, open_model(console, options.model));
  const int64_t trained = open.model->config().context_length;
  const int64_t context = options.model.context > 0 ? options.model.context : trained;
  KVANT_ASSIGN(const std::vector<int32_t> tokens, read_tokens(options, open, context));
  KVANT_TRY(measure(console, options, open, tokens, rows));
  return report(console, options, tokens.size(), rows);
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kList);
  app.add_option("--text", options->text, "Text to read; '-' is standard input")
      ->type_name("FILE")
      ->required();
  app.add_option("--max-tokens", options->max_tokens, "Read at most the first N tokens of it")
      ->type_name("N")
      ->check(CLI::Range(kMinTokens, int64_t{1} << 24))
      ->capture_default_str();
  app.add_option("-n", options->decode_tokens, "Tokens to generate after the text, timed")
      ->type_name("N")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command compare_command = {
    .name = "compare",
    .summary = "Read a text with several cache formats: bytes, speed and accuracy in one table",
    .examples =
        "kvant compare model.gguf --text book.txt\n"
        "kvant compare model.gguf --kv bf16 --kv 8bit --kv k=int8+mean,v=nvfp4+46 --text book.txt "
        "--json",
    .define = define,
};

}  // namespace kvant::tools
