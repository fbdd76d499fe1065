// `kvant bench NAME`: the table of benches. `kvant bench MODEL` is `kvant bench model MODEL`.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "kvant/base/check.h"
#include "tools/bench.h"
#include "tools/command.h"

namespace kvant::tools {

Json bench_json(std::string_view name) {
  Json object = json_object("bench");
  object["bench"] = name;
  return object;
}

Spread spread_of(std::vector<double> values) {
  KVANT_CHECK(!values.empty(), "something was measured");
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  const double median =
      values.size() % 2 == 1 ? values[half] : 0.5 * (values[half - 1] + values[half]);
  return {median, values.front(), values.back()};
}

namespace {

constexpr const Bench* kBenches[] = {&model_bench, &attention_bench, &engine_bench, &serve_bench};

CommandBody define(CLI::App& app) {
  struct Choice {
    CLI::App* app;
    CommandBody body;
  };
  auto choices = std::make_shared<std::vector<Choice>>();
  for (const Bench* bench : kBenches) {
    CLI::App* nested = app.add_subcommand(std::string(bench->name), std::string(bench->summary));
    choices->push_back({nested, bench->define(*nested)});
  }
  // Without the name of a bench, the options are those of `bench model`.
  CommandBody model_body = model_bench.define(app);
  for (CLI::Option* option : app.get_options()) option->required(false);
  app.require_subcommand(0, 1);
  const CLI::Option* model = app.get_option("MODEL");
  return [choices, model_body, model](Console& console) -> Status {
    for (const Choice& choice : *choices) {
      if (choice.app->parsed()) return choice.body(console);
    }
    if (model->count() == 0) {
      return Error(ErrorCode::kInvalidArgument, "which bench? Give its name or a model file");
    }
    return model_body(console);
  };
}

}  // namespace

const Command bench_command = {
    .name = "bench",
    .summary = "Measure speed: of a model, of attention, of the engine or a server under load",
    .examples =
        "kvant bench model model.gguf -p 512 -n 64 -d 0,4096 -r 3 --kv bf16,4bit\n"
        "kvant bench model qwen2.5-0.5b --weights dummy --json\n"
        "kvant bench model llama-3.1-8b --weights dummy -p 0 -d 131072 --fill random --batch 4\n"
        "kvant bench attention --heads 32/8 --tokens 32768 --kv bf16,4bit\n"
        "kvant bench engine llama-3.1-8b --weights dummy --device cuda -n 150 --input-tokens 20000 "
        "--output-tokens 2000\n"
        "kvant bench serve http://127.0.0.1:8000 --workload multi-turn -n 50 -c 16 --turns 5\n"
        "kvant bench serve --request-rate 4 --goal-ttft 1000 --goal-itl 50 --json",
    .define = define,
};

}  // namespace kvant::tools
