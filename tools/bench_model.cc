// `kvant bench model`: tokens per second of prefill and decode at several depths of context.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tools/bench.h"
#include "tools/model_options.h"

namespace kvant::tools {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  int64_t prompt_tokens = 512;
  int64_t decode_tokens = 64;
  std::vector<int64_t> depths = {0, 8192};
  int repetitions = 3;
};

struct Row {
  KvChoice kv;
  int64_t depth = 0;
  Spread prefill;  // tokens per second
  Spread decode;
  cache::CacheBytes cache;  // of the filled depth; at depth 0, at the end of decoding
};

// Any ids will do: speed does not depend on them. The same on every run.
std::vector<int32_t> make_tokens(int64_t count, int vocab) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  uint64_t state = 1;
  for (int32_t& token : tokens) {
    state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
    token = static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab));
  }
  return tokens;
}

// One cache at one depth; repetitions start from copies of the same filled sequence.
class DepthBench {
 public:
  DepthBench(model::Model& model, cache::KvCache& cache) : model_(model), cache_(cache) {}

  Status fill(std::span<const int32_t> tokens, const std::function<void(int64_t)>& on_step) {
    KVANT_ASSIGN(base_, cache_.add_sequence());
    KVANT_TRY(extend(base_, tokens, 0, on_step));
    bytes_ = cache_.bytes();
    return {};
  }
  // Tokens per second of `prompt` as one text after the filled depth.
  Result<double> prefill(std::span<const int32_t> prompt) {
    KVANT_ASSIGN(const cache::SequenceId id, cache_.fork(base_));
    const auto start = Clock::now();
    const Status done = extend(id, prompt, 1, {});
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    cache_.remove_sequence(id);
    KVANT_TRY(done);
    return static_cast<double>(prompt.size()) / seconds;
  }
  // Tokens per second, one at a time.
  Result<double> decode(std::span<const int32_t> tokens) {
    KVANT_ASSIGN(const cache::SequenceId id, cache_.fork(base_));
    const auto start = Clock::now();
    Status done;
    for (size_t i = 0; i < tokens.size() && done; ++i)
      done = extend(id, tokens.subspan(i, 1), 1, {});
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    // Beside a filled sequence the copy's tokens would count without the pages that they share.
    if (bytes_.tokens_now == 0) bytes_ = cache_.bytes();
    cache_.remove_sequence(id);
    KVANT_TRY(done);
    return static_cast<double>(tokens.size()) / seconds;
  }
  const cache::CacheBytes& bytes() const { return bytes_; }

 private:
  using Clock = std::chrono::steady_clock;

  Status extend(cache::SequenceId id, std::span<const int32_t> tokens, int logit_rows,
                const std::function<void(int64_t)>& on_step) {
    const auto ignore = [](int64_t, std::span<const float>) { return Status(); };
    const auto step = static_cast<size_t>(model_.max_step_tokens());
    for (size_t begin = 0; begin < tokens.size(); begin += step) {
      const auto part = tokens.subspan(begin, std::min(step, tokens.size() - begin));
      const bool last = begin + part.size() == tokens.size();
      const model::ForwardSequence sequence = {id, part, last ? logit_rows : 0};
      KVANT_TRY(model_.forward(std::span(&sequence, 1), cache_, ignore, &Console::stop_flag()));
      if (on_step) on_step(static_cast<int64_t>(begin + part.size()));
    }
    return {};
  }

  model::Model& model_;
  cache::KvCache& cache_;
  cache::SequenceId base_ = 0;
  cache::CacheBytes bytes_;
};

// Sizes for the filled sequence and its one copy; the copy shares what is closed.
Result<model::RuntimeOptions> sizes(const Options& options, const OpenModel& open,
                                    const KvChoice& kv, int64_t depth) {
  const int64_t longest = depth + std::max(options.prompt_tokens, options.decode_tokens);
  KVANT_ASSIGN(model::RuntimeOptions runtime,
               runtime_options(options.model, open, kv.format, longest));
  runtime.max_sequences = 2;
  runtime.total_tokens = longest + depth;
  return runtime;
}

Result<Row> measure(Console& console, const Options& options, OpenModel& open, const KvChoice& kv,
                    int64_t depth) {
  KVANT_ASSIGN(const model::RuntimeOptions runtime, sizes(options, open, kv, depth));
  KVANT_TRY(open.model->reserve(runtime));
  KVANT_ASSIGN(const auto cache, open.model->create_cache(runtime));
  DepthBench bench(*open.model, *cache);
  const int64_t fed = options.prompt_tokens + options.decode_tokens;
  const std::vector<int32_t> tokens = make_tokens(depth + fed, open.model->config().vocab_size);
  const std::span<const int32_t> all(tokens);
  const auto prompt =
      all.subspan(static_cast<size_t>(depth), static_cast<size_t>(options.prompt_tokens));
  const auto rest = all.last(static_cast<size_t>(options.decode_tokens));

  Progress progress(console, fmt::format("{} at depth {}", kv.asked, depth),
                    depth + fed * options.repetitions, "tokens");
  const auto update = [&](int64_t done) { progress.update(done); };
  KVANT_TRY(bench.fill(all.first(static_cast<size_t>(depth)), update));
  std::vector<double> prefill;
  std::vector<double> decode;
  for (int i = 0; i < options.repetitions; ++i) {
    if (!prompt.empty()) {
      KVANT_ASSIGN(const double speed, bench.prefill(prompt));
      prefill.push_back(speed);
    }
    if (!rest.empty()) {
      KVANT_ASSIGN(const double speed, bench.decode(rest));
      decode.push_back(speed);
    }
    progress.update(depth + fed * (i + 1));
  }
  Row row;
  row.kv = kv;
  row.depth = depth;
  row.cache = bench.bytes();
  if (!prefill.empty()) row.prefill = spread_of(std::move(prefill));
  if (!decode.empty()) row.decode = spread_of(std::move(decode));
  return row;
}

// Going beyond what the model was trained for says nothing about its text, but its speed is what it
// is.
void note_untrained_depths(Console& console, const Options& options, int64_t trained) {
  for (const int64_t depth : options.depths) {
    if (depth + std::max(options.prompt_tokens, options.decode_tokens) > trained) {
      console.note(
          fmt::format("depth {} goes beyond the {} tokens that the model was trained for: "
                      "only its speed means something",
                      depth, trained));
    }
  }
}

Json spread_json(const Spread& spread) {
  return {{"median", spread.median}, {"min", spread.min}, {"max", spread.max}};
}

Status print_row(Console& console, const Options& options, const OpenModel& open, const Row& row) {
  Json object = bench_json("model");
  object["model"] = options.model.model;
  object["backend"] = open.backend->info().description;
  object["kv"] = row.kv.asked;
  object["kv_resolved"] = row.kv.resolved;
  object["depth"] = row.depth;
  object["prompt_tokens"] = options.prompt_tokens;
  object["decode_tokens"] = options.decode_tokens;
  object["repetitions"] = options.repetitions;
  if (options.prompt_tokens > 0) object["prefill_tokens_per_second"] = spread_json(row.prefill);
  if (options.decode_tokens > 0) {
    object["decode_tokens_per_second"] = spread_json(row.decode);
    object["bits_per_value"] = row.cache.bits_per_value();
  }
  return print_json(console, object);
}

std::string cell(const Spread& spread) {
  if (spread.median == 0) return "-";
  return fmt::format("{:.1f} [{:.1f}, {:.1f}]", spread.median, spread.min, spread.max);
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(const std::vector<KvChoice> choices, parse_kv(options.kv));
  if (options.prompt_tokens + options.decode_tokens == 0) {
    return Error(ErrorCode::kInvalidArgument, "nothing to measure: -p and -n are both 0");
  }
  KVANT_ASSIGN(OpenModel open, open_model(console, options.model));
  note_untrained_depths(console, options, open.model->config().context_length);
  Table table({"kv", "depth", "prefill tokens/s [min, max]", "decode tokens/s [min, max]"});
  for (const KvChoice& choice : choices) {
    for (const int64_t depth : options.depths) {
      KVANT_ASSIGN(const Row row, measure(console, options, open, choice, depth));
      if (console.json()) {
        KVANT_TRY(print_row(console, options, open, row));
      } else {
        table.add_row(
            {choice.asked, fmt::format("{}", depth), cell(row.prefill), cell(row.decode)});
      }
    }
  }
  if (console.json()) return {};
  console.note(open.backend->info().description);
  return console.print(table.str());
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  options->model.beyond_training = true;
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kList);
  const auto count = CLI::Range(int64_t{0}, int64_t{1} << 24);
  app.add_option("-p,--prompt-tokens", options->prompt_tokens, "Tokens of a prefill; 0: none")
      ->check(count)
      ->capture_default_str();
  app.add_option("-n,--decode-tokens", options->decode_tokens, "Tokens to decode; 0: none")
      ->check(count)
      ->capture_default_str();
  app.add_option("-d,--depth", options->depths, "Tokens that are in the cache before, a list")
      ->delimiter(',')
      ->check(count)
      ->default_str("0,8192");
  app.add_option("-r,--repetitions", options->repetitions, "Measurements of each")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Bench model_bench = {
    .name = "model",
    .summary = "Tokens per second of prefill and decode, at several depths of context",
    .define = define,
};

}  // namespace kvant::tools
