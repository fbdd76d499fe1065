// `kvant plan`: what fits into memory, and what every byte is for.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tools/command.h"
#include "tools/json_output.h"
#include "tools/model_options.h"

namespace kvant::tools {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  std::string memory;
  int sequences = 1;
};

// One cache format and what it takes.
struct Row {
  KvChoice kv;
  model::RuntimeOptions runtime;
  model::MemoryPlan plan;

  // What a budget has to hold: allocations at their highest, and the part of the file that is read
  // where it lies.
  int64_t needed() const { return plan.peak() + plan.weights.in_place; }
};

class Planner {
 public:
  Planner(const Options& options, const model::ModelSource& source, const backend::Backend& backend,
          const formats::QuantPlan* quant_plan)
      : options_(options), source_(source), backend_(backend), quant_plan_(quant_plan) {}

  Result<Row> plan(const KvChoice& kv, int64_t context, int sequences) const {
    Row row;
    row.kv = kv;
    row.runtime.format = kv.format;
    row.runtime.plan = quant_plan_;
    row.runtime.page_tokens = options_.model.page_tokens;
    row.runtime.max_step_tokens = backend_.info().step_tokens;
    row.runtime.context_tokens = context;
    row.runtime.max_sequences = sequences;
    KVANT_ASSIGN(row.plan, model::plan_memory(source_, backend_, row.runtime));
    return row;
  }

  // The longest context, or with -c the largest number of sequences of that context, that `budget`
  // bytes hold.
  Result<Row> fit(const KvChoice& kv, int64_t budget) const {
    const bool many = options_.model.context > 0;
    const int64_t limit = many ? kMaxSequences : source_.config().context_length;
    const auto at = [&](int64_t n) {
      return many ? plan(kv, options_.model.context, static_cast<int>(n))
                  : plan(kv, n, options_.sequences);
    };
    KVANT_ASSIGN(Row best, at(1));
    if (best.needed() > budget) {
      return Error(ErrorCode::kResourceExhausted,
                   fmt::format("{} do not hold this model: {} for {} and --kv {}",
                               format_bytes(budget), format_bytes(best.needed()),
                               many ? "one sequence" : "a context of one token", kv.asked));
    }
    int64_t low = 1;
    int64_t high = limit + 1;  // does not fit, or is more than the model can use
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      Result<Row> row = at(middle);
      if (row && row->needed() <= budget) {
        best = std::move(*row);
        low = middle;
      } else {
        high = middle;
      }
    }
    return best;
  }

 private:
  static constexpr int64_t kMaxSequences = 1 << 16;
  const Options& options_;
  const model::ModelSource& source_;
  const backend::Backend& backend_;
  const formats::QuantPlan* quant_plan_;
};

Result<std::vector<Row>> make_rows(const Options& options, const Planner& planner,
                                   int64_t trained) {
  KVANT_ASSIGN(const std::vector<KvChoice> choices, parse_kv(options.kv, "bf16,8bit,4bit"));
  std::vector<Row> rows;
  for (const KvChoice& choice : choices) {
    if (!options.memory.empty()) {
      KVANT_ASSIGN(const int64_t budget, parse_bytes(options.memory));
      KVANT_ASSIGN(Row row, planner.fit(choice, budget));
      rows.push_back(std::move(row));
    } else {
      const int64_t context = options.model.context > 0 ? options.model.context : trained;
      KVANT_ASSIGN(Row row, planner.plan(choice, context, options.sequences));
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

std::string group_name(const cache::GroupBytes& group) {
  const std::string kind = group.group.geometry.window > 0
                               ? fmt::format("window {}", group.group.geometry.window)
                               : std::string("full attention");
  return fmt::format("{}, {} layers", kind, group.group.layers.size());
}

// ---- text ----

// One line of the table: a label, and its bytes in each plan.
struct Line {
  std::string label;
  std::function<int64_t(const Row&)> bytes;
};

std::vector<Line> cache_lines(size_t group, const std::string& name) {
  using Group = cache::GroupBytes;
  const auto of = [group](int64_t (*bytes)(const Group&)) {
    return [group, bytes](const Row& row) { return bytes(row.plan.groups[group]); };
  };
  return {
      {fmt::format("{}: codes of closed pages", name),
       of([](const Group& g) { return g.stored_pages * g.code_bytes; })},
      {"  their scales", of([](const Group& g) { return g.stored_pages * g.scale_bytes; })},
      {"  their means", of([](const Group& g) { return g.stored_pages * g.mean_bytes; })},
      {"  their padding", of([](const Group& g) { return g.stored_pages * g.padding_bytes(); })},
      {"  BF16 pages (open, sink, recent)",
       of([](const Group& g) { return g.bf16_pages * g.bf16_page_bytes; })},
  };
}

std::vector<Line> lines(const Row& first) {
  std::vector<Line> all = {
      {"weights, read in the file", [](const Row& r) { return r.plan.weights.in_place; }},
      {"weights, repacked", [](const Row& r) { return r.plan.weights.matrices; }},
      {"norms, biases", [](const Row& r) { return r.plan.weights.parameters; }},
  };
  for (size_t i = 0; i < first.plan.groups.size(); ++i) {
    for (Line& line : cache_lines(i, group_name(first.plan.groups[i]))) {
      all.push_back(std::move(line));
    }
  }
  all.push_back({"staging of pages that fill", [](const Row& r) { return r.plan.cache.staging; }});
  all.push_back({"page tables", [](const Row& r) { return r.plan.cache.tables; }});
  all.push_back({"activations", [](const Row& r) { return r.plan.activations; }});
  all.push_back({"workspace", [](const Row& r) { return r.plan.backend_workspace; }});
  all.push_back({"total", [](const Row& r) { return r.plan.total() + r.plan.weights.in_place; }});
  return all;
}

std::string table_text(const std::vector<Row>& rows) {
  std::vector<std::string> header = {""};
  std::vector<std::string> contexts = {"context, tokens"};
  std::vector<std::string> sequences = {"sequences"};
  for (const Row& row : rows) {
    header.push_back(row.kv.asked);
    contexts.push_back(fmt::format("{}", row.runtime.context_tokens));
    sequences.push_back(fmt::format("{}", row.runtime.max_sequences));
  }
  Table table(std::move(header));
  table.add_row(std::move(contexts));
  table.add_row(std::move(sequences));
  for (const Line& line : lines(rows[0])) {
    std::vector<std::string> cells = {line.label};
    bool any = false;
    for (const Row& row : rows) {
      const int64_t bytes = line.bytes(row);
      any = any || bytes != 0;
      cells.push_back(bytes == 0 ? "-" : format_bytes(bytes));
    }
    if (any) table.add_row(std::move(cells));
  }
  return table.str();
}

// ---- JSON ----

Json group_json(const cache::GroupBytes& group) {
  return {{"layers", group.group.layers.size()},
          {"window", group.group.geometry.window},
          {"closed_pages", group.stored_pages},
          {"closed_page_bytes", group.stored_page_bytes},
          {"closed_page_code_bytes", group.code_bytes},
          {"closed_page_scale_bytes", group.scale_bytes},
          {"closed_page_mean_bytes", group.mean_bytes},
          {"closed_page_padding_bytes", group.padding_bytes()},
          {"bf16_pages", group.bf16_pages},
          {"bf16_page_bytes", group.bf16_page_bytes}};
}

Json row_json(const Row& row, int head_dim) {
  const model::MemoryPlan& plan = row.plan;
  Json groups = Json::array();
  for (const cache::GroupBytes& group : plan.groups) groups.push_back(group_json(group));
  return {{"kv", row.kv.asked},
          {"kv_resolved", row.kv.resolved},
          {"bits_per_value_asymptotic",
           formats::asymptotic_bits_per_value(row.kv.format, head_dim, row.runtime.page_tokens)},
          {"context_tokens", row.runtime.context_tokens},
          {"sequences", row.runtime.max_sequences},
          {"weights_in_file_bytes", plan.weights.in_place},
          {"weights_bytes", plan.weights.matrices},
          {"parameters_bytes", plan.weights.parameters},
          {"closed_pages_bytes", plan.cache.stored_pages_reserved},
          {"bf16_pages_bytes", plan.cache.bf16_pages_reserved},
          {"staging_bytes", plan.cache.staging},
          {"tables_bytes", plan.cache.tables},
          {"activations_bytes", plan.activations},
          {"workspace_bytes", plan.backend_workspace},
          {"allocated_bytes", plan.total()},
          {"allocated_peak_bytes", plan.peak()},
          {"total_bytes", plan.total() + plan.weights.in_place},
          {"groups", std::move(groups)}};
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(const auto source, open_source(options.model));
  KVANT_ASSIGN(const auto backend, open_backend(options.model));
  KVANT_ASSIGN(const auto quant_plan, open_plan(console, options.model, *source));
  const Planner planner(options, *source, *backend, quant_plan ? &*quant_plan : nullptr);
  const model::ModelConfig& config = source->config();
  KVANT_ASSIGN(const std::vector<Row> rows, make_rows(options, planner, config.context_length));
  if (options.model.context > config.context_length) {
    console.note(fmt::format("the model was trained for at most {} tokens", config.context_length));
  }
  if (console.json()) {
    Json object = json_object("plan");
    object["model"] = options.model.model;
    object["page_tokens"] = options.model.page_tokens;
    object["attn"] = options.model.attn;
    Json results = Json::array();
    for (const Row& row : rows) results.push_back(row_json(row, config.head_dim));
    object["results"] = std::move(results);
    return print_json(console, object);
  }
  for (const Row& row : rows) {
    if (!options.memory.empty() && options.model.context == 0 &&
        row.runtime.context_tokens == config.context_length) {
      console.note(fmt::format("{}: memory is left; the model was trained for {} tokens",
                               row.kv.asked, config.context_length));
    }
  }
  return console.print(table_text(rows));
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kList);
  app.add_option(
         "--memory", options->memory,
         "Find the longest context that this much memory holds; with -c, the most sequences")
      ->type_name("SIZE");
  app.add_option("--sequences", options->sequences, "Sequences that are in the cache together")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command plan_command = {
    .name = "plan",
    .summary = "Say what fits into memory, and what every byte is for",
    .examples =
        "kvant plan model.gguf --memory 8GiB --kv bf16,8bit,4bit\n"
        "kvant plan model.gguf -c 8192 --json\n"
        "kvant plan llama-3.1-8b --weights dummy --memory 24GiB -c 32768",
    .define = define,
};

}  // namespace kvant::tools
