#include "tools/model_options.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <utility>

#include "kvant/model/identity.h"

namespace kvant::tools {
namespace {

constexpr int64_t kDefaultContext = 32768;
constexpr int64_t kSmallestDefaultContext = 512;
// Of free memory, what a default context may take: the rest of the system needs some too.
constexpr double kMemoryShare = 0.8;

struct WeightsChoice {
  bool dummy = false;
  model::WeightStorage storage = model::WeightStorage::kAsInFile;
  formats::WeightType type = formats::WeightType::kQ4_0;
};

Result<WeightsChoice> parse_weights(std::string_view text) {
  WeightsChoice choice;
  if (text == "file") return choice;
  if (text == "fp8") {
    choice.storage = model::WeightStorage::kF8E4m3;
    return choice;
  }
  choice.dummy = true;
  if (text == "dummy") return choice;
  if (text.starts_with("dummy:")) {
    KVANT_ASSIGN(choice.type, model::parse_dummy_type(text.substr(6)));
    return choice;
  }
  return Error(
      ErrorCode::kInvalidArgument,
      fmt::format("--weights {}: expected file, fp8, dummy, or dummy:TYPE with Q4_0, Q4_K, "
                  "Q8_0, BF16 or F8_E4M3",
                  text));
}

}  // namespace

void add_model_options(CLI::App& app, ModelOptions& options) {
  app.add_option("MODEL", options.model,
                 "GGUF file; with --weights dummy a config.json or the name of a built-in one")
      ->required();
  app.add_option("--plan", options.plan, "Quantisation plan: scales and biases")->type_name("FILE");
  app.add_option("--page-tokens", options.page_tokens, "Tokens per page of the cache")
      ->check(CLI::IsMember({16, 32, 64, 128}))
      ->capture_default_str();
  app.add_option("-c,--context", options.context,
                 "Context in tokens (default: the model's, as far as memory allows)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  app.add_option("-t,--threads", options.threads, "Threads (default: one per processor)")
      ->check(CLI::Range(1, 1024));
  app.add_flag(
      "--deterministic", options.deterministic,
      "Results do not depend on threads, chunks or neighbours, to the bit (always so on CPUs)");
  app.add_option("--weights", options.weights,
                 "'file', 'fp8' to re-quantise the file's matrices to E4M3 with a scale a row, or "
                 "'dummy' for random weights ('dummy:Q8_0': of that type)")
      ->capture_default_str();
  app.add_option("--device", options.device,
                 "Backend: cpu, cuda (an NVIDIA GPU, best of the Hopper generation) or reference")
      ->capture_default_str();
  app.add_option("--memory-limit", options.memory_limit,
                 "Refuse to take more memory than this for pages, workspace and repacked weights")
      ->type_name("SIZE");
  app.add_option(
         "--prefill-workspace", options.prefill_workspace,
         "GPUs: memory for 16-bit copies of pages while prompts are read (default: 512M, or "
         "what the context needs)")
      ->type_name("SIZE");
  app.add_option("--attn", options.attn,
                 "GPUs: operands of prompts' attention: 16bit, or fp8 (faster, errors of some "
                 "percent)")
      ->check(CLI::IsMember({"16bit", "fp8"}))
      ->capture_default_str();
}

void add_kv_option(CLI::App& app, std::vector<std::string>& kv, KvOption option) {
  CLI::Option* added = app.add_option(
      "--kv", kv,
      option == KvOption::kList ? "Cache formats, a list A,B,C; may repeat (default: 4bit)"
                                : "Cache format: a preset (8bit, 6bit, 4bit, 3bit), 'nvfp4', "
                                  "'k=int8+mean,v=nvfp4+46', ... (default: 4bit)");
  added->type_name("SPEC")->allow_extra_args(false);
  if (option == KvOption::kOne) added->expected(1);
}

Result<std::vector<KvChoice>> parse_kv(const std::vector<std::string>& kv,
                                       std::string_view fallback) {
  std::vector<std::string> specs;
  for (const std::string& list : kv) {
    for (std::string& spec : formats::split_format_list(list)) specs.push_back(std::move(spec));
  }
  if (specs.empty()) specs = formats::split_format_list(fallback);
  std::vector<KvChoice> choices;
  for (std::string& spec : specs) {
    KVANT_ASSIGN(const formats::CacheFormat format, formats::parse_cache_format(spec));
    choices.push_back({std::move(spec), formats::canonical_name(format), format});
  }
  return choices;
}

Result<std::unique_ptr<model::ModelSource>> open_source(const ModelOptions& options) {
  KVANT_ASSIGN(const WeightsChoice weights, parse_weights(options.weights));
  if (!weights.dummy) return model::ModelSource::open(options.model, weights.storage);
  KVANT_ASSIGN(model::ModelConfig config, model::load_config(options.model));
  return model::ModelSource::dummy(std::move(config), weights.type);
}

Result<std::unique_ptr<backend::Backend>> open_backend(const ModelOptions& options) {
  KVANT_ASSIGN(const int64_t limit, parse_optional_bytes(options.memory_limit));
  KVANT_ASSIGN(const int64_t prefill_workspace, parse_optional_bytes(options.prefill_workspace));
  return backend::create_backend({.name = options.device,
                                  .num_threads = options.threads,
                                  .memory_limit = limit,
                                  .prefill_workspace = prefill_workspace,
                                  .prompt_attention = options.attn == "fp8"
                                                          ? backend::PromptAttention::kFp8
                                                          : backend::PromptAttention::k16Bit,
                                  .deterministic = options.deterministic,
                                  .row_queries = options.row_queries});
}

Result<std::optional<formats::QuantPlan>> open_plan(Console& console, const ModelOptions& options,
                                                    const model::ModelSource& source) {
  if (options.plan.empty()) return std::optional<formats::QuantPlan>();
  KVANT_ASSIGN(formats::QuantPlan plan, formats::QuantPlan::load(options.plan));
  if (Status fits = model::check_plan_geometry(plan, source.config()); !fits) {
    return fits.error().with_context(options.plan);
  }
  KVANT_ASSIGN(const model::Sha256 weights, model::weights_id(source, model::default_cache_dir()));
  if (plan.weights_id != model::to_hex(weights)) {
    console.warn(
        fmt::format("{} was made for other weights of the same geometry; its scales may not "
                    "fit well",
                    options.plan));
  }
  return std::optional<formats::QuantPlan>(std::move(plan));
}

void warn_of_left_out_scales(Console& console, const std::string& file,
                             const formats::QuantPlan& plan, const formats::CacheFormat& format) {
  const auto fitted = formats::fit_plan(plan, format);
  if (!fitted || (!fitted->k_scales_left_out && !fitted->v_scales_left_out)) return;
  const std::string name = formats::canonical_name(format);
  console.warn(fmt::format(
      "the scales of {} in {} are for {} and do not fit {}, which uses 1 instead; for its own: "
      "kvant calibrate --kv {}",
      !fitted->v_scales_left_out   ? "keys"
      : !fitted->k_scales_left_out ? "values"
                                   : "keys and values",
      file, plan.kv, name, name));
}

Result<OpenModel> open_model(Console& console, const ModelOptions& options) {
  OpenModel open;
  open.console = &console;
  KVANT_ASSIGN(std::unique_ptr<model::ModelSource> source, open_source(options));
  KVANT_ASSIGN(open.backend, open_backend(options));
  KVANT_ASSIGN(open.memory_limit, parse_optional_bytes(options.memory_limit));
  KVANT_ASSIGN(open.plan, open_plan(console, options, *source));
  if (source->gguf() != nullptr) {
    KVANT_ASSIGN(open.tokenizer, model::Tokenizer::create(*source->gguf()));
  }
  std::optional<Progress> progress;
  const auto on_progress = [&](int64_t done, int64_t total) {
    constexpr int64_t kMiB = int64_t{1} << 20;
    if (!progress) progress.emplace(console, "loading weights", total / kMiB, "MiB");
    progress->update(done / kMiB);
    return !Console::stop_requested();
  };
  KVANT_ASSIGN(open.model,
               model::Model::load(std::move(source), *open.backend, {.progress = on_progress}));
  return open;
}

Result<const model::Tokenizer*> need_tokenizer(const OpenModel& open) {
  if (open.tokenizer) return &*open.tokenizer;
  return Error(ErrorCode::kUnsupported,
               "random weights have no tokenizer; use `kvant bench` with them");
}

Status check_fits(const OpenModel& open, const model::MemoryPlan& plan, int64_t context,
                  double share) {
  const auto free =
      static_cast<int64_t>(static_cast<double>(open.backend->info().memory_free) * share);
  const int64_t needed = plan.cache.stored_pages_reserved + plan.cache.bf16_pages_reserved +
                         plan.cache.staging + plan.cache.tables + plan.activations +
                         plan.backend_workspace;
  const auto too_much = [&](int64_t left, std::string_view of_what) {
    return Error(
        ErrorCode::kResourceExhausted,
        fmt::format("a context of {} tokens needs {} beside the weights, {} are {}; ask for "
                    "less with -c, or for a smaller cache format with --kv",
                    context, format_bytes(needed), format_bytes(left), of_what));
  };
  if (free > 0 && needed > free) return too_much(free, "free");
  if (open.memory_limit > 0) {
    const MemoryStats used = open.backend->memory().stats();
    const int64_t left =
        open.memory_limit - used.bytes_now[static_cast<size_t>(MemoryUse::kWeights)];
    if (needed > left) return too_much(std::max<int64_t>(0, left), "left of --memory-limit");
  }
  return {};
}

Result<model::RuntimeOptions> runtime_options(const ModelOptions& options, const OpenModel& open,
                                              const formats::CacheFormat& format,
                                              int64_t wanted_context) {
  const model::Model& model = *open.model;
  model::RuntimeOptions runtime;
  runtime.format = format;
  runtime.plan = open.plan ? &*open.plan : nullptr;
  if (open.plan && std::exchange(open.warned_of, formats::canonical_name(format)) !=
                       formats::canonical_name(format)) {
    warn_of_left_out_scales(*open.console, options.plan, *open.plan, format);
  }
  runtime.page_tokens = options.page_tokens;
  runtime.max_step_tokens = open.backend->info().step_tokens;
  const int64_t trained = model.config().context_length;
  const bool chosen = options.context > 0 || wanted_context > 0;
  runtime.context_tokens = options.context > 0  ? options.context
                           : wanted_context > 0 ? wanted_context
                                                : std::min(trained, kDefaultContext);
  if (runtime.context_tokens > trained && !options.beyond_training) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("a context of {} tokens; the model was trained for at most {}",
                             runtime.context_tokens, trained));
  }
  for (;;) {
    KVANT_ASSIGN(const model::MemoryPlan plan,
                 model::plan_memory(model.source(), *open.backend, runtime));
    const Status fits = check_fits(open, plan, runtime.context_tokens, chosen ? 1 : kMemoryShare);
    if (fits) return runtime;
    if (chosen || runtime.context_tokens <= kSmallestDefaultContext) return fits.error();
    runtime.context_tokens /= 2;
  }
}

Json cache_json(const cache::CacheBytes& bytes) {
  return {{"tokens", bytes.tokens_now},
          {"bytes", bytes.stored_pages_now + bytes.bf16_pages_now},
          {"closed_page_bytes", bytes.stored_pages_now},
          {"bf16_page_bytes", bytes.bf16_pages_now},
          {"bits_per_value", bytes.bits_per_value()}};
}

}  // namespace kvant::tools
