// Tokens that are chosen with a CUDA device: those that the host chooses from the logits, alone and
// in a batch. Skipped where there is no device.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <vector>

#include "kvant/model/generate.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/sampling.h"
#include "kvant/serve/testing/collector.h"

namespace kvant::serve {
namespace {

using model::testing::must;
using model::testing::random_tokens;
using testing::Collector;
using Ids = std::vector<int32_t>;

constexpr int kVocab = 64;

class CudaSampling : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto backend = backend::create_backend({.name = "cuda"});
    if (!backend) GTEST_SKIP() << backend.error().message();
  }
};

std::vector<SamplingParams> many_params() {
  std::vector<SamplingParams> all;
  for (const float temperature : {1e-4f, 0.3f, 0.8f, 1.0f, 5.0f}) {
    for (const int top_k : {0, 1, 40, 300}) {
      for (const float top_p : {1.0f, 0.95f, 0.3f}) {
        for (const float min_p : {0.0f, 0.05f}) {
          SamplingParams params;
          params.temperature = temperature;
          params.top_k = top_k;
          params.top_p = top_p;
          params.min_p = min_p;
          all.push_back(params);
        }
      }
    }
  }
  return all;
}

// Rows of logits of many kinds: peaked as those of models, flat, with equals, with one that counts.
std::vector<float> many_rows(int num_rows, int width) {
  std::mt19937 random(21);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> rows;
  for (int row = 0; row < num_rows; ++row) {
    const float spread = row % 4 == 1 ? 0.02f : 2.0f + 0.2f * static_cast<float>(row % 8);
    for (int i = 0; i < width; ++i) {
      float value = spread * normal(random);
      if (row % 4 == 2) value = std::round(value * 8) / 8;
      if (row % 4 == 3 && i == width / 2) value += 25;
      rows.push_back(value);
    }
  }
  return rows;
}

TEST_F(CudaSampling, TokensOfQueriesAreThoseOfTheLogits) {
  constexpr int kRows = 16;
  const auto device = must(backend::create_backend({.name = "cuda"}));
  int64_t copied = 0;
  int64_t asked = 0;
  for (const int width : {1000, 49152, 128256}) {
    const std::vector<float> logits = many_rows(kRows, width);
    const auto values = static_cast<int64_t>(logits.size());
    const auto buffer = [&](int64_t bytes, MemoryUse use) {
      return must(Buffer::create(device->memory(), bytes, use));
    };
    Buffer rows = buffer(4 * values, MemoryUse::kOther);
    must(device->upload_f32(logits.data(), values, rows.data()));
    Buffer queries = buffer(kRows * int64_t{sizeof(backend::RowQuery)}, MemoryUse::kTables);
    Buffer maxima = buffer(kRows * int64_t{sizeof(backend::RowMaximum)}, MemoryUse::kTables);
    Buffer choices = buffer(kRows * int64_t{sizeof(backend::RowChoice)}, MemoryUse::kTables);
    Buffer candidates =
        buffer(int64_t{kRows} * backend::kMostCandidates * int64_t{sizeof(backend::RowMaximum)},
               MemoryUse::kTables);
    Buffer copies = buffer(4 * values, MemoryUse::kTables);
    RowSampler sampler(width, {});
    uint64_t seed = 0;
    for (const SamplingParams& params : many_params()) {
      for (int i = 0; i < kRows; ++i) {
        model::SplitMix64 random = choice_random(seed + static_cast<uint64_t>(i), 0);
        queries.as<backend::RowQuery>()[i] = row_query(params, false, 0, width, random).value();
      }
      must(device->answer_queries(
          rows.data(), kRows, width, queries.as<backend::RowQuery>(),
          {maxima.as<backend::RowMaximum>(), choices.as<backend::RowChoice>(),
           candidates.as<backend::RowMaximum>(), copies.as<float>()}));
      must(device->synchronize());
      for (int i = 0; i < kRows; ++i) {
        model::SplitMix64 of_logits = choice_random(seed + static_cast<uint64_t>(i), 0);
        model::SplitMix64 of_choice = of_logits;
        const std::span row = std::span(logits).subspan(
            static_cast<size_t>(i) * static_cast<size_t>(width), static_cast<size_t>(width));
        const SampledToken want = must(sampler.sample({.logits = row,
                                                       .params = &params,
                                                       .tokens = {},
                                                       .num_prompt_tokens = 0,
                                                       .bitmask = {},
                                                       .random = &of_logits}));
        const backend::RowChoice& choice = choices.as<backend::RowChoice>()[i];
        ++asked;
        if (!choice.found()) {
          ++copied;
          continue;
        }
        const std::span found(
            candidates.as<backend::RowMaximum>() + int64_t{i} * backend::kMostCandidates,
            static_cast<size_t>(choice.num_candidates));
        EXPECT_EQ(sampler.choose(choice, found, params, of_choice), want.id)
            << "width " << width << ", row " << i << ", temperature " << params.temperature
            << ", top_k " << params.top_k << ", top_p " << params.top_p << ", min_p "
            << params.min_p;
        EXPECT_EQ(of_choice.next(), of_logits.next());
      }
      seed += kRows;
    }
  }
  // Flat rows with top_p or min_p alone.
  EXPECT_LT(copied, asked / 5);
  std::printf("%lld of %lld rows copied\n", static_cast<long long>(copied),
              static_cast<long long>(asked));
}

// ---- requests ----

std::vector<std::byte> model_bytes() {
  model::testing::TinyShape shape;
  shape.head_dim = 64;
  return model::testing::tiny_model("llama", shape);
}

std::vector<SamplingParams> request_params() {
  std::vector<SamplingParams> all(5);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].seed = 40 + i;
    all[i].max_tokens = 60;
    all[i].ignore_eos = true;
  }
  all[1].temperature = 0.8f;
  all[1].top_k = 20;
  all[2].top_p = 0.8f;
  all[3].min_p = 0.1f;
  all[3].top_p = 0.9f;
  all[4].temperature = 0;
  return all;
}

struct Choices {
  bool from_logits = false;
  bool together = true;
  int max_draft_tokens = 0;
};

std::vector<Ids> answers(const Choices& choices) {
  model::testing::Engine model(
      model_bytes(),
      backend::BackendOptions{
          .name = "cuda", .deterministic = true, .row_queries = !choices.from_logits});
  EngineOptions options;
  options.runtime = model::testing::small_runtime("8bit");
  options.runtime.max_sequences = 16;
  options.runtime.max_step_tokens = 64;
  options.runtime.total_tokens = 4096;
  options.runtime.held_sink_pages = 32;
  options.runtime.held_windows = 32;
  options.speculation.max_draft_tokens = choices.max_draft_tokens;
  options.speculation.lookup.min_ngram = 1;
  const auto engine = must(Engine::create(model.model(), options));
  std::vector<std::shared_ptr<Collector>> all;
  const auto submit = [&](uint32_t i, const SamplingParams& params) {
    Request request;
    request.prompt = random_tokens(5 + 9 * i, kVocab, 300 + i);
    request.sampling = params;
    all.push_back(std::make_shared<Collector>());
    request.listener = all.back();
    must(engine->submit(std::move(request)));
  };
  const std::vector<SamplingParams> params = request_params();
  for (uint32_t i = 0; i < 2 * params.size(); ++i) {
    submit(i, params[i % params.size()]);
    if (!choices.together) all.back()->wait();
  }
  std::vector<Ids> ids;
  for (const auto& answer : all) {
    EXPECT_EQ(answer->wait().reason, FinishReason::kLength);
    ids.push_back(answer->ids());
  }
  return ids;
}

TEST_F(CudaSampling, RequestsGetTheSameTokensWhateverHappensAroundThem) {
  const std::vector<Ids> expected = answers({.from_logits = true, .together = false});
  EXPECT_NE(expected[0], expected[5]);
  EXPECT_EQ(answers({.together = false}), expected) << "alone";
  EXPECT_EQ(answers({}), expected) << "together";
  EXPECT_EQ(answers({.from_logits = true}), expected) << "together, from the logits";
  EXPECT_EQ(answers({.max_draft_tokens = 6}), expected) << "with drafts";
}

TEST_F(CudaSampling, SessionsGetTheTokensOfTheLogits) {
  const auto answer = [](bool from_logits) {
    model::testing::Engine engine(
        model_bytes(), backend::BackendOptions{.name = "cuda", .row_queries = !from_logits});
    const auto cache = engine.cache(model::testing::small_runtime("8bit"));
    model::Session session = must(model::Session::create(engine.model(), *cache));
    model::GenerateOptions options;
    options.sampler.seed = 9;
    options.max_tokens = 80;
    return must(session.generate(random_tokens(30, kVocab, 8), options,
                                 [](int32_t) { return Status(); }))
        .token_ids;
  };
  EXPECT_EQ(answer(false), answer(true));
}

}  // namespace
}  // namespace kvant::serve
