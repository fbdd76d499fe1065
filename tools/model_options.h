// The options that all commands share which run a model, and opening what they name.
//
//   ModelOptions options;  add_model_options(app, options);
//   KVANT_ASSIGN(OpenModel open, open_model(console, options));
//   KVANT_ASSIGN(RuntimeOptions runtime, runtime_options(options, open, kv.format));
//   KVANT_TRY(open.model->reserve(runtime));
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/formats/plan.h"
#include "kvant/formats/spec.h"
#include "kvant/model/model.h"
#include "kvant/model/source.h"
#include "kvant/model/tokenizer.h"
#include "tools/cli_support.h"
#include "tools/json_output.h"

namespace CLI {
class App;
}

namespace kvant::tools {

struct ModelOptions {
  std::string model;              // a GGUF file; a configuration with random weights
  std::string weights = "file";   // "file", "fp8", "dummy", "dummy:TYPE"
  std::string plan;               // file name, may be empty
  std::string device = "cpu";     // backend
  std::string memory_limit;       // size, may be empty
  std::string prefill_workspace;  // the same
  std::string attn = "16bit";     // or "fp8": what prompts' attention multiplies
  int page_tokens = 64;
  int64_t context = 0;  // 0: not given
  int threads = 0;      // 0: one per processor
  bool deterministic = false;
  bool row_queries = true;       // BackendOptions; not an option of the command line
  bool beyond_training = false;  // longer contexts than trained for: where only speed counts
};

// Adds MODEL, --plan, --page-tokens, -c, -t, --deterministic, --weights, --device, --memory-limit,
// --prefill-workspace, --attn.
void add_model_options(CLI::App& app, ModelOptions& options);

// One cache format as asked for.
struct KvChoice {
  std::string asked;     // as typed
  std::string resolved;  // canonical name
  formats::CacheFormat format;
};
// Adds --kv. With kList it takes a list and may repeat.
enum class KvOption { kOne, kList };
void add_kv_option(CLI::App& app, std::vector<std::string>& kv, KvOption option);
// All formats in the order asked; those of the list `fallback` if none was.
Result<std::vector<KvChoice>> parse_kv(const std::vector<std::string>& kv,
                                       std::string_view fallback = formats::kDefaultFormat);

// A model's file or configuration, before its weights are loaded: enough to plan memory.
Result<std::unique_ptr<model::ModelSource>> open_source(const ModelOptions& options);
Result<std::unique_ptr<backend::Backend>> open_backend(const ModelOptions& options);
// The plan of --plan, checked against the model; nothing without the option. Warns if it was made
// for other weights of the same geometry.
Result<std::optional<formats::QuantPlan>> open_plan(Console& console, const ModelOptions& options,
                                                    const model::ModelSource& source);

// Warns if `format` would read scales that are in the plan but were measured on other values.
void warn_of_left_out_scales(Console& console, const std::string& file,
                             const formats::QuantPlan& plan, const formats::CacheFormat& format);

struct OpenModel {
  std::unique_ptr<backend::Backend> backend;
  std::unique_ptr<model::Model> model;
  std::optional<model::Tokenizer> tokenizer;  // none with random weights
  std::optional<formats::QuantPlan> plan;
  int64_t memory_limit = 0;       // bytes, of --memory-limit; 0: none
  Console* console = nullptr;     // where warnings go
  mutable std::string warned_of;  // the format of the last one, which is not repeated
};
// Loads the weights, with progress.
Result<OpenModel> open_model(Console& console, const ModelOptions& options);
// kUnsupported with random weights.
Result<const model::Tokenizer*> need_tokenizer(const OpenModel& open);

// kResourceExhausted if what the plan of a context of so many tokens takes beside the weights is
// more than `share` of the memory that is free now, or than --memory-limit leaves.
Status check_fits(const OpenModel& open, const model::MemoryPlan& plan, int64_t context,
                  double share);

// Sizes for one sequence: -c if given, else `wanted_context` (0: as much as the model was trained
// for, at most 32,768), reduced until it fits into free memory. kInvalidArgument or
// kResourceExhausted if what was asked for cannot be had.
Result<model::RuntimeOptions> runtime_options(const ModelOptions& options, const OpenModel& open,
                                              const formats::CacheFormat& format,
                                              int64_t wanted_context = 0);

// {"pages": ..., "bits_per_value": ...} of what a cache holds now.
Json cache_json(const cache::CacheBytes& bytes);

}  // namespace kvant::tools
