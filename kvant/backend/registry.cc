#include <array>
#include <memory>
#include <string>
#include <string_view>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/cpu_backend.h"
#ifdef KVANT_CUDA
#include "kvant/backend/cuda/cuda_backend.h"
#endif
#include "kvant/backend/reference/reference_backend.h"
#include "kvant/base/cpu_level.h"

namespace kvant::backend {
namespace {

struct BackendEntry {
  std::string_view name;
  Result<std::unique_ptr<Backend>> (*create)(const BackendOptions& options);
};

Result<std::unique_ptr<Backend>> create_cpu(const BackendOptions& options) {
  cpu::CpuOptions cpu_options;
  cpu_options.num_threads = options.num_threads;
  cpu_options.memory_limit = options.memory_limit;
  KVANT_ASSIGN(cpu_options.level, choose_cpu_level());
  return std::unique_ptr<Backend>(std::make_unique<cpu::CpuBackend>(cpu_options));
}

Result<std::unique_ptr<Backend>> create_reference(const BackendOptions& options) {
  return std::unique_ptr<Backend>(
      std::make_unique<reference::ReferenceBackend>(options.num_threads, options.memory_limit));
}

// Adding a backend: one row.
constexpr std::array kBackends = {
    BackendEntry{"cpu", create_cpu},
    BackendEntry{"reference", create_reference},
#ifdef KVANT_CUDA
    BackendEntry{"cuda", cuda::CudaBackend::create},
#endif
};

}  // namespace

Result<std::unique_ptr<Backend>> create_backend(const BackendOptions& options) {
  if (options.num_threads < 0) {
    return Error(ErrorCode::kInvalidArgument,
                 "number of threads: expected 0 (one per processor) or more, found " +
                     std::to_string(options.num_threads));
  }
  if (options.memory_limit < 0) {
    return Error(ErrorCode::kInvalidArgument, "memory limit: expected 0 (none) or more, found " +
                                                  std::to_string(options.memory_limit));
  }
  if (options.prefill_workspace < 0) {
    return Error(ErrorCode::kInvalidArgument,
                 "prefill workspace: expected 0 (the default) or more, found " +
                     std::to_string(options.prefill_workspace));
  }
  if (options.prompt_attention == PromptAttention::kFp8 && options.name != "cuda") {
    return Error(ErrorCode::kUnsupported,
                 "--attn fp8 needs --device cuda; the backend '" + options.name +
                     "' has attention in 16 bit or more only: use --attn 16bit");
  }
  if (options.prompt_attention == PromptAttention::kFp8 && options.deterministic) {
    return Error(
        ErrorCode::kUnsupported,
        "--attn fp8 and --deterministic exclude each other: deterministic steps read pages "
        "as they are; use --attn 16bit");
  }
  std::string names;
  for (const BackendEntry& entry : kBackends) {
    if (entry.name == options.name) return entry.create(options);
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
  }
  if (options.name == "cuda") {
    return Error(ErrorCode::kUnsupported,
                 "this build has no CUDA backend; build one with `scripts/build cuda` (needs CUDA "
                 "12.8 or later), or use one of: " +
                     names);
  }
  return Error(ErrorCode::kUnsupported,
               "backend '" + options.name + "' is not in this build; it has: " + names);
}

}  // namespace kvant::backend
