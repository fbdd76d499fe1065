// Tiny models of every architecture against logits of an independent float64 implementation
// (make_models.py, beside this file).
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "kvant/backend/backend.h"
#include "kvant/model/model.h"
#include "kvant/model/testing/engine.h"

namespace kvant::model {
namespace {

using testing::must;

class GoldenModel : public ::testing::TestWithParam<const char*> {
 protected:
  // Largest relative error of the golden positions' logits, with a cache format and a step size.
  static double error(const std::string& backend_name, const char* kv, size_t chunk) {
    const std::string stem = std::string(KVANT_GOLDEN_MODELS) + "/" + GetParam();
    std::ifstream file(stem + ".json");
    const nlohmann::json golden = nlohmann::json::parse(file);
    const auto prompt = golden.at("prompt").get<std::vector<int32_t>>();
    const auto positions = golden.at("positions").get<std::vector<size_t>>();
    const auto want = golden.at("logits").get<std::vector<std::vector<float>>>();

    const auto backend = must(backend::create_backend({.name = backend_name, .num_threads = 2}));
    const auto model = must(Model::load(must(ModelSource::open(stem + ".gguf")), *backend, {}));
    const RuntimeOptions runtime = testing::small_runtime(kv);
    must(model->reserve(runtime));
    const auto cache = must(model->create_cache(runtime));
    const cache::SequenceId id = must(cache->add_sequence());
    std::vector<std::vector<float>> got;
    for (size_t done = 0; done < prompt.size(); done += chunk) {
      const auto part = std::span(prompt).subspan(done, std::min(chunk, prompt.size() - done));
      const ForwardSequence sequence{id, part, static_cast<int>(part.size())};
      must(model->forward(std::span(&sequence, 1), *cache,
                          [&](int64_t, std::span<const float> logits) {
                            got.emplace_back(logits.begin(), logits.end());
                            return Status();
                          }));
    }
    double worst = 0;
    for (size_t i = 0; i < positions.size(); ++i) {
      worst = std::max(worst, testing::relative_error(got[positions[i]], want[i]));
    }
    return worst;
  }
};

INSTANTIATE_TEST_SUITE_P(Architectures, GoldenModel,
                         ::testing::Values("llama", "qwen2", "qwen3", "gemma3", "qwen3moe"),
                         [](const auto& test) { return std::string(test.param); });

TEST_P(GoldenModel, ReferenceBackend) {
  // What remains is the BF16 rounding of keys and values in the cache.
  EXPECT_LT(error("reference", "bf16", 40), 0.015);
  EXPECT_LT(error("reference", "bf16", 9), 0.015);
}

TEST_P(GoldenModel, CpuBackend) {
  // Dense operators round activations, by less than that.
  EXPECT_LT(error("cpu", "bf16", 40), 0.015);
  EXPECT_LT(error("cpu", "bf16", 1), 0.015);
}

}  // namespace
}  // namespace kvant::model
