#include "kvant/model/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

using testing::Engine;
using testing::must;
using testing::random_tokens;
using testing::small_runtime;
using testing::tiny_model;

constexpr int kVocab = 64;

// Every architecture with a plain and a quantised cache.
class AnyModel : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  std::string arch() const { return std::get<0>(GetParam()); }
  std::string kv() const { return std::get<1>(GetParam()); }
  Engine engine(const std::string& backend = "cpu", int num_threads = 1) const {
    return Engine(tiny_model(arch()), backend, num_threads);
  }
};

std::string case_name(const ::testing::TestParamInfo<AnyModel::ParamType>& info) {
  std::string name = std::get<0>(info.param) + "_" + std::get<1>(info.param);
  std::erase_if(name,
                [](char c) { return c != '_' && !std::isalnum(static_cast<unsigned char>(c)); });
  return name;
}

INSTANTIATE_TEST_SUITE_P(Architectures, AnyModel,
                         ::testing::Combine(::testing::ValuesIn(testing::tiny_architectures()),
                                            ::testing::Values("bf16", "4bit")),
                         case_name);

TEST_P(AnyModel, CpuAgreesWithTheReferenceBackend) {
  Engine cpu = engine("cpu", 2);
  Engine reference = engine("reference");
  const RuntimeOptions runtime = small_runtime(kv());
  const auto cpu_cache = cpu.cache(runtime);
  const auto reference_cache = reference.cache(runtime);
  const std::vector<int32_t> tokens = random_tokens(70, kVocab, 1);
  const auto got = cpu.logits(*cpu_cache, must(cpu_cache->add_sequence()), tokens, 70);
  const auto want =
      reference.logits(*reference_cache, must(reference_cache->add_sequence()), tokens, 70);
  double mean = 0;
  for (size_t i = 0; i < tokens.size(); ++i) mean += testing::relative_error(got[i], want[i]);
  mean /= static_cast<double>(tokens.size());
  // Rounding of activations; a wrong operator costs far more.
  EXPECT_LT(mean, 0.01);
}

TEST_P(AnyModel, ChunksDoNotChangeABit) {
  Engine whole = engine();
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<int32_t> tokens = random_tokens(77, kVocab, 2);
  const auto cache = whole.cache(runtime);
  const auto want = whole.logits(*cache, must(cache->add_sequence()), tokens, tokens.size());
  for (const size_t chunk : {1, 7, 16, 50}) {
    const auto chunked = whole.cache(runtime);
    EXPECT_EQ(whole.logits(*chunked, must(chunked->add_sequence()), tokens, chunk), want) << chunk;
    must(chunked->check_integrity());
  }
}

// Which of the rows' logits is the greatest, with and without the logits beside it.
TEST_P(AnyModel, TheGreatestIsThatOfTheLogits) {
  for (const char* backend : {"cpu", "reference"}) {
    Engine one = engine(backend, 2);
    const std::vector<int32_t> first = random_tokens(30, kVocab, 21);
    const std::vector<int32_t> second = random_tokens(19, kVocab, 22);
    const auto run = [&](bool first_only, bool second_only) {
      const auto cache = one.cache(small_runtime(kv()));  // 8 rows at once
      const std::vector<ForwardSequence> step = {
          {must(cache->add_sequence()), first, 11, first_only},
          {must(cache->add_sequence()), second, 9, second_only}};
      std::vector<int32_t> greatest;
      const RowsSink keep = [&](std::span<const LogitsRow> rows) -> Status {
        EXPECT_LE(rows.size(), 8);
        for (const LogitsRow& row : rows) {
          EXPECT_EQ(row.index, static_cast<int64_t>(greatest.size()));
          EXPECT_EQ(row.logits.empty(), row.index < 11 ? first_only : second_only);
          if (!row.logits.empty()) {
            const auto best = std::ranges::max_element(row.logits);
            EXPECT_EQ(row.greatest.index, best - row.logits.begin());
            EXPECT_EQ(row.greatest.value, *best);
          }
          greatest.push_back(row.greatest.index);
        }
        return {};
      };
      must(one.model().forward(step, *cache, keep));
      EXPECT_EQ(greatest.size(), 20);
      return greatest;
    };
    const auto want = run(false, false);
    EXPECT_EQ(run(true, false), want);
    EXPECT_EQ(run(false, true), want);
    EXPECT_EQ(run(true, true), want);
  }
}

TEST_P(AnyModel, LayersMayHaveFormatsOfTheirOwn) {
  Engine one = engine();
  const std::vector<int32_t> tokens = random_tokens(90, kVocab, 4);
  RuntimeOptions runtime = small_runtime("k=int4:channel,v=nvfp4");
  const formats::CacheFormat quantised = runtime.format;
  const formats::CacheFormat plain = must(formats::parse_cache_format("bf16"));
  const size_t layers = static_cast<size_t>(one.model().config().num_layers);
  const auto logits = [&](std::vector<formats::CacheFormat> formats) {
    runtime.layer_formats = std::move(formats);
    const auto cache = one.cache(runtime);
    return one.logits(*cache, must(cache->add_sequence()), tokens, tokens.size());
  };
  const auto all = logits({});
  EXPECT_EQ(logits(std::vector(layers, quantised)), all);
  const auto none = logits(std::vector(layers, plain));
  for (size_t layer = 0; layer < layers; ++layer) {
    std::vector only(layers, plain);
    only[layer] = quantised;
    const auto some = logits(only);
    EXPECT_NE(some, none) << layer;
    EXPECT_NE(some, all) << layer;
  }
  runtime.layer_formats.pop_back();
  const auto missing = one.model().create_cache(runtime);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code(), ErrorCode::kInvalidArgument);
}

TEST_P(AnyModel, ThreadsDoNotChangeABit) {
  Engine one = engine("cpu", 1);
  Engine three = engine("cpu", 3);
  const std::vector<int32_t> tokens = random_tokens(40, kVocab, 3);
  const auto cache = one.cache(small_runtime(kv()));
  const auto other = three.cache(small_runtime(kv()));
  EXPECT_EQ(one.logits(*cache, must(cache->add_sequence()), tokens, 40),
            three.logits(*other, must(other->add_sequence()), tokens, 40));
}

TEST_P(AnyModel, NeighboursDoNotChangeABit) {
  Engine engine = this->engine();
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<std::vector<int32_t>> prompts = {
      random_tokens(37, kVocab, 4), random_tokens(1, kVocab, 5), random_tokens(52, kVocab, 6)};
  const auto batch_cache = engine.cache(runtime);
  std::vector<ForwardSequence> first;
  std::vector<ForwardSequence> second;
  for (const std::vector<int32_t>& prompt : prompts) {
    first.push_back({must(batch_cache->add_sequence()), prompt, 1});
    second.push_back({first.back().id, std::span(prompt).first(1), 1});
  }
  const auto prefilled = engine.step(*batch_cache, first);
  const auto decoded = engine.step(*batch_cache, second);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto cache = engine.cache(runtime);
    const cache::SequenceId id = must(cache->add_sequence());
    EXPECT_EQ(engine.step(*cache, {{id, prompts[i], 1}}).front(), prefilled[i]) << i;
    EXPECT_EQ(engine.step(*cache, {{id, std::span(prompts[i]).first(1), 1}}).front(), decoded[i])
        << i;
  }
}

TEST_P(AnyModel, RandomContextsAreFullCaches) {
  Engine engine = this->engine("cpu", 2);
  RuntimeOptions runtime = small_runtime(kv());
  runtime.max_step_tokens = 48;  // pages fill within steps and across them
  const auto plan = must(plan_memory(engine.model().source(), engine.backend(), runtime));
  std::vector<std::vector<std::vector<float>>> logits;
  for (const uint64_t seed : {1, 1, 2}) {
    const auto cache = engine.cache(runtime);
    const std::vector<cache::SequenceId> ids = {must(cache->add_sequence()),
                                                must(cache->add_sequence())};
    std::vector<int64_t> steps;
    must(engine.model().append_random(
        ids, *cache, {.num_tokens = 100, .seed = seed, .on_step = [&](int64_t tokens) {
                        steps.push_back(tokens);
                      }}));
    EXPECT_EQ(steps, (std::vector<int64_t>{48, 96, 100, 148, 196, 200}));
    EXPECT_EQ(engine.backend().memory().stats().total_now, plan.total());
    // As many pages as text of that length takes.
    const cache::CacheBytes filled = cache->bytes();
    EXPECT_EQ(filled.tokens_now, 200);
    must(cache->check_integrity());
    const std::vector<int32_t> token = {7};
    logits.push_back(engine.step(*cache, {{ids[0], token, 1}, {ids[1], token, 1}}));  // finite
    EXPECT_NE(logits.back()[0], logits.back()[1]);

    const auto read = engine.cache(runtime);
    for (int i = 0; i < 2; ++i) {
      const cache::SequenceId id = must(read->add_sequence());
      engine.logits(*read, id, random_tokens(100, kVocab, 3), 48);
    }
    EXPECT_EQ(read->bytes().stored_pages_now, filled.stored_pages_now);
    EXPECT_EQ(read->bytes().bf16_pages_now, filled.bf16_pages_now);
  }
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_NE(logits[0], logits[2]);
}

TEST(RandomContexts, EndWithTheContextOrAtAnyStep) {
  Engine engine(tiny_model("llama"), "cpu");
  RuntimeOptions runtime = small_runtime("4bit");
  runtime.max_step_tokens = 64;
  const auto cache = engine.cache(runtime);
  const cache::SequenceId id = must(cache->add_sequence());
  const auto fill = [&](const RandomFill& options) {
    return engine.model().append_random(std::span(&id, 1), *cache, options);
  };
  const Status too_many = fill({.num_tokens = runtime.context_tokens + 1});
  ASSERT_FALSE(too_many);
  EXPECT_EQ(too_many.error().code(), ErrorCode::kResourceExhausted);
  EXPECT_EQ(cache->length(id), 0);
  std::atomic<bool> cancel = false;
  const Status cancelled = fill({.num_tokens = 200,
                                 .on_step = [&](int64_t tokens) { cancel = tokens == 128; },
                                 .cancel = &cancel});
  ASSERT_FALSE(cancelled);
  EXPECT_EQ(cancelled.error().code(), ErrorCode::kCancelled);
  EXPECT_EQ(cache->length(id), 128);
  must(fill({.num_tokens = runtime.context_tokens - 128}));
  EXPECT_EQ(cache->length(id), runtime.context_tokens);
}

TEST_P(AnyModel, WantedRowsAreThoseOfAllRows) {
  Engine engine = this->engine();
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<int32_t> tokens = random_tokens(30, kVocab, 7);
  const auto cache = engine.cache(runtime);
  const auto all = engine.step(*cache, {{must(cache->add_sequence()), tokens, 30}});
  const auto some = engine.step(*cache, {{must(cache->add_sequence()), tokens, 11}});
  ASSERT_EQ(some.size(), 11u);
  for (size_t i = 0; i < 11; ++i) EXPECT_EQ(some[i], all[19 + i]);
  EXPECT_TRUE(engine.step(*cache, {{must(cache->add_sequence()), tokens, 0}}).empty());
}

TEST_P(AnyModel, AForkContinuesLikeItsOrigin) {
  Engine engine = this->engine();
  const auto cache = engine.cache(small_runtime(kv()));
  const std::vector<int32_t> prompt = random_tokens(40, kVocab, 8);
  const std::vector<int32_t> left = random_tokens(30, kVocab, 9);
  const std::vector<int32_t> right = random_tokens(30, kVocab, 10);
  const cache::SequenceId origin = must(cache->add_sequence());
  engine.step(*cache, {{origin, prompt, 0}});
  const cache::SequenceId fork = must(cache->fork(origin));
  const auto of_origin = engine.logits(*cache, origin, left, 1);
  const auto of_fork = engine.logits(*cache, fork, right, 30);
  must(cache->check_integrity());

  const auto fresh = engine.cache(small_runtime(kv()));
  const cache::SequenceId a = must(fresh->add_sequence());
  const cache::SequenceId b = must(fresh->add_sequence());
  engine.step(*fresh, {{a, prompt, 0}, {b, prompt, 0}});
  EXPECT_EQ(engine.logits(*fresh, a, left, 30), of_origin);
  EXPECT_EQ(engine.logits(*fresh, b, right, 30), of_fork);
}

TEST_P(AnyModel, WhatIsTruncatedIsComputedAgain) {
  Engine engine = this->engine();
  const auto cache = engine.cache(small_runtime(kv()));
  const std::vector<int32_t> tokens = random_tokens(60, kVocab, 11);
  const cache::SequenceId id = must(cache->add_sequence());
  const auto want = engine.logits(*cache, id, tokens, 60);
  for (const int64_t length : {55, 49, 30, 3, 0}) {
    const int64_t left = must(cache->truncate(id, length));
    ASSERT_LE(left, length);
    const auto again = engine.logits(*cache, id, std::span(tokens).subspan(left), 60);
    for (size_t i = 0; i < again.size(); ++i) EXPECT_EQ(again[i], want[left + i]) << length;
    must(cache->check_integrity());
  }
}

TEST_P(AnyModel, TheAllocatorSeesWhatWasPlanned) {
  const std::vector<std::byte> file = tiny_model(arch());
  const auto backend = must(backend::create_backend({.name = "cpu", .num_threads = 2}));
  const RuntimeOptions runtime = small_runtime(kv());
  auto source = must(ModelSource::parse(file, "test"));
  const MemoryPlan plan = must(plan_memory(*source, *backend, runtime));
  const auto model = must(Model::load(std::move(source), *backend, {}));
  must(model->reserve(runtime));
  const auto cache = must(model->create_cache(runtime));
  const MemoryStats stats = backend->memory().stats();
  EXPECT_EQ(stats.total_now, plan.total());
  EXPECT_EQ(stats.total_peak, plan.peak());
  EXPECT_EQ(stats.bytes_now[static_cast<size_t>(MemoryUse::kWeights)],
            plan.weights.matrices + plan.weights.parameters);
  EXPECT_EQ(stats.bytes_now[static_cast<size_t>(MemoryUse::kPages)], plan.cache.pages_reserved());
}

TEST(Model, BadBatchesAreErrorsAndChangeNothing) {
  Engine engine(tiny_model("llama"), "cpu");
  RuntimeOptions runtime = small_runtime("4bit");
  runtime.max_step_tokens = 32;
  runtime.context_tokens = 48;
  const auto cache = engine.cache(runtime);
  const cache::SequenceId id = must(cache->add_sequence());
  const LogitsSink ignore = [](int64_t, std::span<const float>) { return Status(); };
  const auto code = [&](const std::vector<ForwardSequence>& batch) {
    const Status status = engine.model().forward(batch, *cache, ignore);
    EXPECT_EQ(cache->length(id) % 20, 0);
    must(cache->check_integrity());
    return status ? ErrorCode::kInternal : status.error().code();
  };
  const std::vector<int32_t> tokens = random_tokens(40, kVocab, 12);
  const std::vector<int32_t> bad = {1, kVocab};
  const std::vector<int32_t> negative = {-1};
  EXPECT_EQ(code({}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, {}, 0}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, bad, 0}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, negative, 0}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{id, tokens, 0}}), ErrorCode::kInvalidArgument);  // more than a step holds
  const std::span<const int32_t> twenty = std::span(tokens).first(20);
  EXPECT_EQ(code({{id, twenty, 21}}), ErrorCode::kInvalidArgument);
  engine.step(*cache, {{id, twenty, 0}});
  engine.step(*cache, {{id, twenty, 0}});
  EXPECT_EQ(code({{id, twenty, 0}}), ErrorCode::kResourceExhausted);  // 60 of 48
  EXPECT_EQ(cache->length(id), 40);
}

TEST(Model, CancellationLeavesTheCacheAsItWas) {
  Engine engine(tiny_model("llama"), "cpu");
  const auto cache = engine.cache(small_runtime("4bit"));
  const cache::SequenceId id = must(cache->add_sequence());
  const std::vector<int32_t> tokens = random_tokens(40, kVocab, 13);
  const std::atomic<bool> cancel = true;
  const ForwardSequence sequence{id, tokens, 1};
  const Status status = engine.model().forward(
      std::span(&sequence, 1), *cache, [](int64_t, std::span<const float>) { return Status(); },
      &cancel);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), ErrorCode::kCancelled);
  EXPECT_EQ(cache->length(id), 0);
  must(cache->check_integrity());
}

TEST(Model, ValuesThatAreNotFiniteFailTheStep) {
  // A bias of infinity makes every value of the last layer infinite.
  std::vector<std::byte> file = tiny_model("qwen2");
  const Gguf gguf = must(Gguf::parse(file, "test"));
  const std::span<const std::byte> bias = must(gguf.tensor("blk.2.attn_v.bias")).bytes;
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(file.data() + (bias.data() - file.data()), &infinity, sizeof(infinity));
  Engine engine(std::move(file), "cpu");
  const auto cache = engine.cache(small_runtime("4bit"));
  const cache::SequenceId id = must(cache->add_sequence());
  const std::vector<int32_t> tokens = random_tokens(40, kVocab, 14);
  const ForwardSequence sequence{id, tokens, 0};
  const Status status = engine.model().forward(
      std::span(&sequence, 1), *cache, [](int64_t, std::span<const float>) { return Status(); });
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), ErrorCode::kNumericError);
  EXPECT_EQ(cache->length(id), 0);
  EXPECT_EQ(cache->bytes().stored_pages_now, 0);
  must(cache->check_integrity());
}

TEST(Model, LogitsThatAreNotFiniteFailTheStep) {
  std::vector<std::byte> file = tiny_model("llama");
  const Gguf gguf = must(Gguf::parse(file, "test"));
  const std::span<const std::byte> norm = must(gguf.tensor("output_norm.weight")).bytes;
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(file.data() + (norm.data() - file.data()), &infinity, sizeof(infinity));
  Engine engine(std::move(file), "cpu");
  const std::vector<int32_t> tokens = random_tokens(40, kVocab, 14);
  for (const bool only_greatest : {false, true}) {
    const auto cache = engine.cache(small_runtime("4bit"));
    const cache::SequenceId id = must(cache->add_sequence());
    const ForwardSequence sequence{id, tokens, 2, only_greatest};
    const Status status = engine.model().forward(
        std::span(&sequence, 1), *cache, [](std::span<const LogitsRow>) { return Status(); });
    ASSERT_FALSE(status);
    EXPECT_EQ(status.error().code(), ErrorCode::kNumericError);
    EXPECT_EQ(cache->length(id), 0);
  }
}

TEST(Model, LoadingNamesTheTensorThatIsWrong) {
  const auto backend = must(backend::create_backend({.name = "cpu", .num_threads = 1}));
  const auto message = [&](const std::string& replace, const std::string& with) {
    std::vector<std::byte> file = tiny_model("llama");
    const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    const size_t at = text.find(replace);
    EXPECT_NE(at, std::string_view::npos);
    std::memcpy(file.data() + at, with.data(), with.size());
    auto source = ModelSource::parse(file, "test");
    if (!source) return source.error().message();
    auto model = Model::load(std::move(*source), *backend, {});
    return model ? std::string() : model.error().message();
  };
  EXPECT_NE(message("blk.1.ffn_up.weight", "blk.1.ffn_ab.weight").find("blk.1.ffn_up.weight"),
            std::string::npos);
}

TEST(Model, RandomWeightsHaveTheSpreadThatKeepsActivationsFinite) {
  constexpr int64_t kRows = 64;
  constexpr int64_t kCols = 512;
  for (const char* name : {"Q4_0", "Q4_K", "Q8_0", "BF16", "F8_E4M3"}) {
    const formats::WeightType type = must(parse_dummy_type(name));
    const int64_t row_bytes = formats::weight_bytes(type, kCols);
    std::vector<std::byte> bytes(kRows * row_bytes);
    make_random_weights(type, kRows, kCols, 7, bytes.data());
    std::vector<float> values(kRows * kCols);
    for (int64_t row = 0; row < kRows; ++row) {
      formats::dequantize_row(type, bytes.data() + row * row_bytes, kCols,
                              values.data() + row * kCols);
    }
    double sum = 0;
    double squares = 0;
    for (const float value : values) {
      sum += static_cast<double>(value);
      squares += static_cast<double>(value) * static_cast<double>(value);
    }
    const double sigma = 1.0 / std::sqrt(static_cast<double>(kCols));
    EXPECT_NEAR(std::sqrt(squares / (kRows * kCols)), sigma, 0.03 * sigma) << name;
    // The middle of the 16 levels of Q4_0 is not zero.
    EXPECT_NEAR(sum / (kRows * kCols), 0.0, 0.12 * sigma) << name;
  }
}

TEST(Model, RandomWeightsRunAtAnyGeometry) {
  const char* config = R"({"model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 64,
      "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
      "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
      "head_dim": 32, "vocab_size": 64, "max_position_embeddings": 256})";
  for (const char* type : {"Q4_0", "Q8_0", "BF16", "F8_E4M3"}) {
    const auto backend = must(backend::create_backend({.name = "cpu", .num_threads = 1}));
    auto source =
        must(ModelSource::dummy(must(parse_config_json(config)), must(parse_dummy_type(type))));
    const RuntimeOptions runtime = small_runtime("4bit");
    const MemoryPlan plan = must(plan_memory(*source, *backend, runtime));
    const auto model = must(Model::load(std::move(source), *backend, {}));
    must(model->reserve(runtime));
    const auto cache = must(model->create_cache(runtime));
    EXPECT_EQ(backend->memory().stats().total_now, plan.total()) << type;
    EXPECT_EQ(backend->memory().stats().total_peak, plan.peak()) << type;
    const std::vector<int32_t> tokens = random_tokens(40, kVocab, 15);
    const ForwardSequence sequence{must(cache->add_sequence()), tokens, 1};
    double largest = 0;
    must(model->forward(std::span(&sequence, 1), *cache,
                        [&](int64_t, std::span<const float> logits) {
                          for (const float logit : logits)
                            largest = std::max<double>(largest, logit);
                          return Status();
                        }));
    EXPECT_GT(largest, 0.5);
    EXPECT_LT(largest, 50);
  }
}

TEST_P(AnyModel, ACacheIsAsLargeAsItsBudgetAllows) {
  Engine engine = this->engine("cpu", 1);
  const ModelSource& source = engine.model().source();
  const RuntimeOptions runtime = small_runtime(kv());
  const int64_t budget = 16 << 20;
  const RuntimeOptions fitted = must(fit_cache_memory(source, engine.backend(), runtime, budget));
  EXPECT_GT(fitted.total_tokens, runtime.context_tokens * runtime.max_sequences);
  const MemoryPlan plan = must(plan_memory(source, engine.backend(), fitted));
  EXPECT_LE(plan.cache.total_reserved(), budget);
  EXPECT_GT(plan.cache.total_reserved(), budget - (256 << 10));
  const int64_t before = engine.backend().memory().stats().total_now;
  const auto cache = must(engine.model().create_cache(fitted));
  EXPECT_EQ(engine.backend().memory().stats().total_now - before, plan.cache.total_reserved());
  EXPECT_FALSE(fit_cache_memory(source, engine.backend(), runtime, 1000).has_value());
}

}  // namespace
}  // namespace kvant::model
