// `kvant bench model`: tokens per second of prefill and decode at several depths of context, of one
// sequence or of several side by side.
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

// How the cache gets to a depth.
constexpr const char* kFillPrefill = "prefill";  // the model reads a text
constexpr const char* kFillRandom = "random";    // random keys and values, without the model
constexpr const char* kBatchMax = "max";         // as many sequences as memory holds
// Of free memory, what those may take: the device's own needs grow a little later.
constexpr double kBatchMemoryShare = 0.98;

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  int64_t prompt_tokens = 512;
  int64_t decode_tokens = 64;
  std::vector<int64_t> depths = {0, 8192};
  int repetitions = 3;
  std::string fill = kFillPrefill;
  std::string batch = "1";

  bool random_fill() const { return fill == kFillRandom; }
};

struct Row {
  KvChoice kv;
  int64_t depth = 0;
  int batch = 1;
  Spread prefill;  // tokens per second, of all sequences together
  Spread decode;
  cache::CacheBytes cache;  // of the filled depth; at depth 0, at the end of decoding
  model::MemoryPlan plan;
  int64_t allocated = 0;  // bytes of the backend's memory while this row was measured
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

// One cache at one depth. What a repetition adds is taken away again: repetitions work on copies of
// sequences that the model has read, and shorten random ones (a copy's table would be memory that
// no plan of that many sequences has).
class DepthBench {
 public:
  struct Shape {
    int batch = 1;
    int64_t depth = 0;
    bool random = false;
  };
  DepthBench(model::Model& model, cache::KvCache& cache, const Shape& shape)
      : model_(model), cache_(cache), shape_(shape) {}

  // `tokens`: the text of every sequence; not read with random contexts.
  Status fill(std::span<const int32_t> tokens, const std::function<void(int64_t)>& on_step) {
    int64_t done = 0;
    for (int i = 0; i < shape_.batch; ++i) {
      KVANT_ASSIGN(const cache::SequenceId id, cache_.add_sequence());
      base_.push_back(id);
      if (shape_.random) continue;
      KVANT_TRY(extend(id, tokens, 0, [&](int64_t step) { on_step(done + step); }));
      done += shape_.depth;
    }
    if (shape_.random) KVANT_TRY(append_random(base_, shape_.depth, on_step));
    bytes_ = cache_.bytes();
    return {};
  }
  // Tokens per second of `prompt` as one text after the filled depth, in one sequence after the
  // other.
  Result<double> prefill(std::span<const int32_t> prompt) {
    KVANT_ASSIGN(const std::vector<cache::SequenceId> ids, begin());
    const auto start = Clock::now();
    for (const cache::SequenceId id : ids) KVANT_TRY(extend(id, prompt, 1, {}));
    return finish(start, ids, prompt.size());
  }
  // Tokens per second, one of each sequence at a time.
  Result<double> decode(std::span<const int32_t> tokens) {
    KVANT_ASSIGN(const std::vector<cache::SequenceId> ids, begin());
    std::vector<model::ForwardSequence> step(ids.size());
    const auto start = Clock::now();
    for (size_t i = 0; i < tokens.size(); ++i) {
      for (size_t j = 0; j < ids.size(); ++j) step[j] = {ids[j], tokens.subspan(i, 1), 1};
      KVANT_TRY(model_.forward(step, cache_, kIgnore, &Console::stop_flag()));
    }
    return finish(start, ids, tokens.size());
  }
  const cache::CacheBytes& bytes() const { return bytes_; }

 private:
  using Clock = std::chrono::steady_clock;
  static Status ignore(int64_t, std::span<const float>) { return {}; }
  static constexpr auto kIgnore = ignore;

  Result<std::vector<cache::SequenceId>> begin() {
    if (shape_.random) return base_;
    std::vector<cache::SequenceId> copies;
    for (const cache::SequenceId id : base_) {
      KVANT_ASSIGN(const cache::SequenceId copy, cache_.fork(id));
      copies.push_back(copy);
    }
    return copies;
  }

  // Tokens per second since `start`; brings the cache back to the filled depth.
  Result<double> finish(Clock::time_point start, std::span<const cache::SequenceId> ids,
                        size_t tokens_each) {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    // Beside filled sequences the copies' tokens would count without the pages that they share.
    if (bytes_.tokens_now == 0) bytes_ = cache_.bytes();
    for (const cache::SequenceId id : ids) {
      if (shape_.random) {
        // Fewer tokens remain where pages have left a window, or were encoded.
        KVANT_ASSIGN(const int64_t length, cache_.truncate(id, shape_.depth));
        if (length < shape_.depth)
          KVANT_TRY(append_random(std::span(&id, 1), shape_.depth - length, {}));
      } else {
        cache_.remove_sequence(id);
      }
    }
    return static_cast<double>(tokens_each * ids.size()) / seconds;
  }

  Status append_random(std::span<const cache::SequenceId> ids, int64_t num_tokens,
                       const std::function<void(int64_t)>& on_step) {
    return model_.append_random(
        ids, cache_,
        {.num_tokens = num_tokens, .on_step = on_step, .cancel = &Console::stop_flag()});
  }

  Status extend(cache::SequenceId id, std::span<const int32_t> tokens, int logit_rows,
                const std::function<void(int64_t)>& on_step) {
    const auto step = static_cast<size_t>(model_.max_step_tokens());
    for (size_t begin = 0; begin < tokens.size(); begin += step) {
      const auto part = tokens.subspan(begin, std::min(step, tokens.size() - begin));
      const bool last = begin + part.size() == tokens.size();
      const model::ForwardSequence sequence = {id, part, last ? logit_rows : 0};
      KVANT_TRY(model_.forward(std::span(&sequence, 1), cache_, kIgnore, &Console::stop_flag()));
      if (on_step) on_step(static_cast<int64_t>(begin + part.size()));
    }
    return {};
  }

  model::Model& model_;
  cache::KvCache& cache_;
  const Shape shape_;
  std::vector<cache::SequenceId> base_;
  cache::CacheBytes bytes_;
};

// Sizes for `batch` filled sequences, and for their copies if repetitions work on such; the copies
// share what is closed.
void set_batch(const Options& options, int batch, model::RuntimeOptions& runtime) {
  const int64_t longest = runtime.context_tokens;
  runtime.max_logit_rows = std::max(runtime.max_logit_rows, batch);
  runtime.max_sequences = options.random_fill() ? batch : 2 * batch;
  const int64_t of_copy = options.random_fill() ? 0 : 2 * runtime.page_tokens;
  runtime.total_tokens = batch * (longest + of_copy);
}

// The largest batch that memory holds, by the plan.
Result<int> largest_batch(const Options& options, const OpenModel& open,
                          const model::RuntimeOptions& runtime) {
  const auto fits = [&](int batch) -> Status {
    model::RuntimeOptions sized = runtime;
    set_batch(options, batch, sized);
    KVANT_ASSIGN(const model::MemoryPlan plan,
                 model::plan_memory(open.model->source(), *open.backend, sized));
    return check_fits(open, plan, sized.context_tokens, kBatchMemoryShare);
  };
  KVANT_TRY(fits(1));
  int low = 1;
  int high = runtime.max_step_tokens + 1;  // a step has one token of each
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

struct Sizes {
  int batch = 1;
  model::RuntimeOptions runtime;
};

Result<Sizes> sizes(const Options& options, const OpenModel& open, const KvChoice& kv,
                    int64_t depth) {
  const int64_t longest = depth + std::max(options.prompt_tokens, options.decode_tokens);
  Sizes sizes;
  KVANT_ASSIGN(sizes.runtime, runtime_options(options.model, open, kv.format, longest));
  if (options.batch == kBatchMax) {
    KVANT_ASSIGN(sizes.batch, largest_batch(options, open, sizes.runtime));
  } else {
    sizes.batch = std::stoi(options.batch);
  }
  set_batch(options, sizes.batch, sizes.runtime);
  return sizes;
}

Result<Row> measure(Console& console, const Options& options, OpenModel& open, const KvChoice& kv,
                    int64_t depth) {
  Row row;
  row.kv = kv;
  row.depth = depth;
  KVANT_ASSIGN(const Sizes sized, sizes(options, open, kv, depth));
  const model::RuntimeOptions& runtime = sized.runtime;
  row.batch = sized.batch;
  KVANT_TRY(open.model->reserve(runtime));
  KVANT_ASSIGN(const auto cache, open.model->create_cache(runtime));
  KVANT_ASSIGN(row.plan, model::plan_memory(open.model->source(), *open.backend, runtime));
  row.allocated = open.backend->memory().stats().total_now;
  DepthBench bench(*open.model, *cache,
                   {.batch = row.batch, .depth = depth, .random = options.random_fill()});
  const int64_t fed = options.prompt_tokens + options.decode_tokens;
  const int64_t read = options.random_fill() ? 0 : depth;
  const std::vector<int32_t> tokens = make_tokens(read + fed, open.model->config().vocab_size);
  const std::span<const int32_t> all(tokens);
  const auto prompt =
      all.subspan(static_cast<size_t>(read), static_cast<size_t>(options.prompt_tokens));
  const auto rest = all.last(static_cast<size_t>(options.decode_tokens));

  Progress progress(console, fmt::format("{} at depth {}", kv.asked, depth),
                    row.batch * (depth + fed * options.repetitions), "tokens");
  const auto update = [&](int64_t done) { progress.update(done); };
  KVANT_TRY(bench.fill(all.first(static_cast<size_t>(read)), update));
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
    progress.update(row.batch * (depth + fed * (i + 1)));
  }
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
  const backend::BackendInfo& info = open.backend->info();
  object["backend"] = info.description;
  object["kv"] = row.kv.asked;
  object["kv_resolved"] = row.kv.resolved;
  object["depth"] = row.depth;
  object["fill"] = options.fill;
  object["batch"] = row.batch;
  object["prompt_tokens"] = options.prompt_tokens;
  object["decode_tokens"] = options.decode_tokens;
  object["repetitions"] = options.repetitions;
  if (options.prompt_tokens > 0) object["prefill_tokens_per_second"] = spread_json(row.prefill);
  if (options.decode_tokens > 0) {
    object["decode_tokens_per_second"] = spread_json(row.decode);
    object["bits_per_value"] = row.cache.bits_per_value();
  }
  object["cache"] = cache_json(row.cache);
  object["memory"] = {{"planned_bytes", row.plan.total()},
                      {"allocated_bytes", row.allocated},
                      {"weights_bytes", row.plan.weights.matrices + row.plan.weights.parameters},
                      {"weights_in_file_bytes", row.plan.weights.in_place},
                      {"machine_bytes", info.memory_total},
                      {"free_beside_weights_bytes", info.memory_free}};
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
  if (options.random_fill()) {
    console.note("contexts are random keys and values: only speed and memory mean something");
  }
  Table table(
      {"kv", "batch", "depth", "prefill tokens/s [min, max]", "decode tokens/s [min, max]"});
  for (const KvChoice& choice : choices) {
    for (const int64_t depth : options.depths) {
      KVANT_ASSIGN(const Row row, measure(console, options, open, choice, depth));
      if (console.json()) {
        KVANT_TRY(print_row(console, options, open, row));
      } else {
        table.add_row({choice.asked, fmt::format("{}", row.batch), fmt::format("{}", depth),
                       cell(row.prefill), cell(row.decode)});
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
  app.add_option("--fill", options->fill,
                 "How the cache gets to the depth: 'prefill', the model reads a text; 'random', "
                 "synthetic contexts of random keys and values, any length in seconds")
      ->check(CLI::IsMember({kFillPrefill, kFillRandom}))
      ->capture_default_str();
  app.add_option("-b,--batch", options->batch,
                 "Sequences side by side, each at the depth; 'max': as many as memory holds")
      ->check(CLI::Range(1, 4096) | CLI::IsMember({kBatchMax}))
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
