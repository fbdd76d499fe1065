// `kvant needle`: whether facts in a long text are found again with a quantised cache.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/model/eval_stats.h"
#include "kvant/model/needle.h"
#include "tools/bundled_text.h"
#include "tools/command.h"
#include "tools/json_output.h"
#include "tools/model_options.h"

namespace kvant::tools {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  std::vector<int64_t> lengths;
  std::vector<std::string> tasks;
  int samples = 10;
  uint64_t seed = 42;
  std::string text;
};

constexpr int64_t kDefaultLengths[] = {1024, 4096, 8192};

// One format, length and task.
struct Cell {
  size_t kv = 0;
  int64_t length = 0;
  model::NeedleTask task = model::NeedleTask::kSingle;
  double bits_per_value = 0;  // at the prompt's end, of the last sample
  double accuracy = 0;
  model::TokenScores nll;  // of the samples; the base is the first format
  model::EvalSummary summary;
};

Result<std::vector<int64_t>> asked_lengths(const Options& options, const OpenModel& open) {
  const int64_t trained = open.model->config().context_length;
  std::vector<int64_t> lengths = options.lengths;
  if (lengths.empty()) {
    for (const int64_t length : kDefaultLengths) {
      if (length <= trained) lengths.push_back(length);
    }
    if (lengths.empty()) lengths.push_back(trained);
  }
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  if (lengths.back() > trained) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("--lengths {}: the model was trained for at most {} tokens",
                             lengths.back(), trained));
  }
  return lengths;
}

Result<std::vector<model::NeedleTask>> asked_tasks(const Options& options) {
  std::vector<model::NeedleTask> tasks;
  for (const std::string& name : options.tasks) {
    const auto task = model::find_needle_task(name);
    if (!task) {
      return Error(ErrorCode::kInvalidArgument,
                   fmt::format("--tasks {}: expected single, multi-key or multi-value", name));
    }
    tasks.push_back(*task);
  }
  if (tasks.empty())
    tasks.assign(std::begin(model::kAllNeedleTasks), std::end(model::kAllNeedleTasks));
  return tasks;
}

// All samples of one length: in every format, one after the other.
class LengthRun {
 public:
  LengthRun(const Options& options, OpenModel& open, const model::NeedleMaker& maker,
            Progress& progress)
      : options_(options), open_(open), maker_(maker), progress_(progress) {}

  Status run(const std::vector<KvChoice>& choices, std::span<const model::NeedleTask> tasks,
             int64_t length, std::vector<Cell>& cells) {
    std::vector<std::unique_ptr<cache::KvCache>> caches;
    ModelOptions sized = options_.model;
    sized.context = length;
    for (const KvChoice& choice : choices) {
      KVANT_ASSIGN(model::RuntimeOptions runtime,
                   runtime_options(sized, open_, choice.format, length));
      model::size_for_needles(runtime, length);
      if (caches.empty()) KVANT_TRY(open_.model->reserve(runtime));
      KVANT_ASSIGN(auto cache, open_.model->create_cache(runtime));
      caches.push_back(std::move(cache));
    }
    for (const model::NeedleTask task : tasks) {
      std::vector<Cell> row(choices.size());
      for (size_t i = 0; i < row.size(); ++i) {
        row[i].kv = i;
        row[i].length = length;
        row[i].task = task;
      }
      for (int sample = 0; sample < options_.samples; ++sample) {
        KVANT_TRY(run_sample(task, length, sample, caches, row));
      }
      for (Cell& cell : row) {
        cell.accuracy /= options_.samples;
        cell.summary = model::summarize(cell.nll, 1);
        cells.push_back(std::move(cell));
      }
    }
    return {};
  }

 private:
  Status run_sample(model::NeedleTask task, int64_t length, int index,
                    std::vector<std::unique_ptr<cache::KvCache>>& caches, std::vector<Cell>& row) {
    KVANT_ASSIGN(const model::NeedleSample sample, maker_.make({.task = task,
                                                                .length = length,
                                                                .sample = index,
                                                                .num_samples = options_.samples,
                                                                .seed = options_.seed}));
    double base_nll = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      Cell& cell = row[i];
      const auto on_tokens = [&](int64_t tokens) -> Status {
        progress_.update(done_ += tokens,
                         fmt::format("{} of {} tokens", model::needle_task_name(task), length));
        cell.bits_per_value = caches[i]->bytes().bits_per_value();
        return Console::check_stop();
      };
      KVANT_ASSIGN(
          const model::NeedleScore score,
          model::score_needle(*open_.model, *caches[i], sample, on_tokens, &Console::stop_flag()));
      if (i == 0) base_nll = score.nll;
      cell.accuracy += score.accuracy;
      cell.nll.nll.push_back(score.nll);
      cell.nll.delta_nll.push_back(score.nll - base_nll);
      cell.nll.kl.push_back(0);
      cell.nll.same_top.push_back(1);
    }
    return {};
  }

  const Options& options_;
  OpenModel& open_;
  const model::NeedleMaker& maker_;
  Progress& progress_;
  int64_t done_ = 0;
};

// One row for each length and format, the tasks side by side.
std::string table_text(const std::vector<KvChoice>& choices, const std::vector<Cell>& cells,
                       std::span<const model::NeedleTask> tasks) {
  std::vector<std::string> header = {"length", "kv", "bits/value"};
  for (const model::NeedleTask task : tasks) {
    header.emplace_back(model::needle_task_name(task));
    header.emplace_back("ΔNLL [95 % interval]");
  }
  Table table(std::move(header), {1});
  // Cells are ordered by length, task, format.
  const size_t per_length = tasks.size() * choices.size();
  for (size_t first = 0; first < cells.size(); first += per_length) {
    for (size_t kv = 0; kv < choices.size(); ++kv) {
      const Cell& head = cells[first + kv];
      std::vector<std::string> row = {std::to_string(head.length), choices[kv].asked,
                                      fmt::format("{:.2f}", head.bits_per_value)};
      for (size_t task = 0; task < tasks.size(); ++task) {
        const Cell& cell = cells[first + task * choices.size() + kv];
        const model::EvalSummary& summary = cell.summary;
        row.push_back(fmt::format("{:.1f} %", 100 * cell.accuracy));
        row.push_back(fmt::format("{:+.3f} [{:+.3f}, {:+.3f}]", summary.delta_nll,
                                  summary.delta_nll_low, summary.delta_nll_high));
      }
      table.add_row(std::move(row));
    }
  }
  return table.str();
}

Json cells_json(const std::vector<KvChoice>& choices, const std::vector<Cell>& cells) {
  Json results = Json::array();
  for (const Cell& cell : cells) {
    results.push_back({{"kv", choices[cell.kv].asked},
                       {"kv_resolved", choices[cell.kv].resolved},
                       {"length", cell.length},
                       {"task", std::string(model::needle_task_name(cell.task))},
                       {"bits_per_value", cell.bits_per_value},
                       {"accuracy", cell.accuracy},
                       {"nll", cell.summary.nll},
                       {"delta_nll", cell.summary.delta_nll},
                       {"delta_nll_low", cell.summary.delta_nll_low},
                       {"delta_nll_high", cell.summary.delta_nll_high}});
  }
  return results;
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(const std::vector<KvChoice> choices, parse_kv(options.kv, "bf16,4bit"));
  KVANT_ASSIGN(const std::vector<model::NeedleTask> tasks, asked_tasks(options));
  KVANT_ASSIGN(const std::string text, read_file_or(options.text, novel_text()));
  KVANT_ASSIGN(OpenModel open, open_model(console, options.model));
  KVANT_ASSIGN(const model::Tokenizer* tokenizer, need_tokenizer(open));
  KVANT_ASSIGN(const model::NeedleMaker maker, model::NeedleMaker::create(*tokenizer, text));
  KVANT_ASSIGN(const std::vector<int64_t> lengths, asked_lengths(options, open));
  int64_t total = 0;
  for (const int64_t length : lengths) {
    total += length * options.samples * static_cast<int64_t>(tasks.size() * choices.size());
  }
  std::vector<Cell> cells;
  {
    Progress progress(console, "reading haystacks", total, "tokens");
    LengthRun length_run(options, open, maker, progress);
    for (const int64_t length : lengths) {
      KVANT_TRY(length_run.run(choices, tasks, length, cells));
    }
  }
  if (console.json()) {
    Json object = json_object("needle");
    object["model"] = options.model.model;
    object["text"] = options.text.empty() ? std::string(kBundledName) : options.text;
    object["samples"] = options.samples;
    object["seed"] = options.seed;
    object["candidates"] = model::kNeedleCandidates;
    object["base"] = choices[0].asked;
    object["results"] = cells_json(choices, cells);
    return print_json(console, object);
  }
  console.note(fmt::format(
      "{} samples each; the share of right answers found among {} candidates (by chance 12.5 %, "
      "multi-value 50 %); ΔNLL of the right answers relative to {}, nats",
      options.samples, model::kNeedleCandidates, choices[0].asked));
  return console.print(table_text(choices, cells, tasks));
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kList);
  app.add_option("--lengths", options->lengths,
                 "Tokens of text and question, a list (default: those of 1024,4096,8192 that the "
                 "model was trained for)")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{256}, int64_t{1} << 24));
  app.add_option("--tasks", options->tasks, "Of single,multi-key,multi-value (default: all)")
      ->type_name("NAME,...")
      ->delimiter(',');
  app.add_option("--samples", options->samples, "Questions per length and task")
      ->type_name("N")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  app.add_option("--seed", options->seed, "Of keys, numbers and places")->capture_default_str();
  app.add_option("--text", options->text,
                 "Prose to hide the needles in; '-' is standard input (default: a bundled novel)")
      ->type_name("FILE");
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command needle_command = {
    .name = "needle",
    .summary = "Measure how well facts hidden in long texts are found, by cache format",
    .examples =
        "kvant needle model.gguf --kv bf16,8bit,4bit\n"
        "kvant needle model.gguf --kv bf16,4bit --lengths 2048,8192 --samples 40 --json",
    .define = define,
};

}  // namespace kvant::tools
