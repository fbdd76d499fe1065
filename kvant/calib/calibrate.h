// Calibration: a quantisation plan (scales, biases, factors) from text that runs through a model.
//
//   CalibrationConfig config{.format = *parse_cache_format("k=nvfp4+bias+smooth,v=nvfp4")};
//   auto plan = calibrate(*model, config, [&](const RunSequence& run) -> Status {
//     for (const auto& chunk : chunks) KVANT_TRY(run(chunk));
//     return {};
//   });
//   plan->save("model.kvplan");
//
// The model runs with a BF16 cache and is observed. What counts are the tokens that the format
// would encode: those of full pages, without the first one where it stays BF16 (+sink). The plan is
// a function of model, tokens and configuration; threads and step sizes change no bit of it.
// Single-thread, like the model.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "kvant/base/result.h"
#include "kvant/formats/plan.h"
#include "kvant/formats/spec.h"
#include "kvant/model/model.h"

namespace kvant::calib {

struct CalibrationConfig {
  formats::CacheFormat format;  // what the plan is for: its options say which tensors it holds
  int page_tokens = 64;
  int64_t context_tokens = 4096;  // the longest sequence that the loop will run
  // +smooth: largest |k|^alpha / largest |q|^(1 - alpha), in [0, 1].
  double smooth_alpha = 0.5;
  std::string corpus_sha256;                  // of the text, for the plan's metadata
  const std::atomic<bool>* cancel = nullptr;  // may be null; looked at between layers
};

// Runs one sequence from its first token through the model.
using RunSequence = std::function<Status(std::span<const int32_t> tokens)>;
// Runs the calibration text: any number of sequences, the same ones each time it is called. An
// error ends the calibration and is returned.
using ForwardLoop = std::function<Status(const RunSequence& run)>;

// How often calibrate() calls the loop: means and factors take one pass, scales of what is encoded
// with these another. 0: the format reads nothing from a plan.
int calibration_passes(const formats::CacheFormat& format);

// The memory that running the model for calibration takes is that of these options.
model::RuntimeOptions calibration_runtime(const CalibrationConfig& config);

// Replaces the model's reservation. kInvalidArgument for a format that reads nothing from a plan,
// an alpha outside [0, 1], or sequences too short to fill a page that is encoded; errors of the
// model and of the loop.
Result<formats::QuantPlan> calibrate(model::Model& model, const CalibrationConfig& config,
                                     const ForwardLoop& loop);

}  // namespace kvant::calib
