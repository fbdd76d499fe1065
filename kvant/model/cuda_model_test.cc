// Whole models on a CUDA device against the CPU backend: prompts, chunks, single tokens and
// batches, every architecture. Skipped where there is no device.

#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "kvant/model/model.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

using testing::Engine;
using testing::must;
using testing::random_tokens;
using testing::relative_error;
using testing::small_runtime;

constexpr int kVocab = 64;
// Of mean relative errors of logits; a wrong operator costs far more.
constexpr double kTolerance = 0.02;  // with --deterministic, or steps of few rows

std::vector<std::byte> model_bytes(const std::string& architecture) {
  testing::TinyShape shape;
  shape.head_dim = 64;  // the smallest that the device's attention has
  return testing::tiny_model(architecture, shape);
}

class OnCuda : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  void SetUp() override {
    const auto backend = backend::create_backend({.name = "cuda"});
    if (!backend) GTEST_SKIP() << backend.error().message();
    const std::string& description = (*backend)->info().description;
    has_hopper_kernels_ = description.find("generic kernels") == std::string::npos;
  }
  std::string arch() const { return std::get<0>(GetParam()); }
  std::string kv() const { return std::get<1>(GetParam()); }
  bool is_4bit() const { return kv() != "bf16" && kv() != "8bit"; }
  // Sums in another order on the device: in 4 bits that turns some codes of later layers, each by a
  // whole step.
  double rounding() const { return is_4bit() ? 0.01 : 1e-3; }
  // Activations of prompts rounded to BF16 (2^-9), with the same consequence.
  double bf16_rounding() const { return is_4bit() ? 0.08 : 0.03; }

  bool has_hopper_kernels_ = true;
};

std::string case_name(const ::testing::TestParamInfo<OnCuda::ParamType>& info) {
  std::string name = std::get<0>(info.param) + "_" + std::get<1>(info.param);
  std::erase_if(name,
                [](char c) { return c != '_' && !std::isalnum(static_cast<unsigned char>(c)); });
  return name;
}

INSTANTIATE_TEST_SUITE_P(Architectures, OnCuda,
                         ::testing::Combine(::testing::ValuesIn(testing::tiny_architectures()),
                                            ::testing::Values("bf16", "8bit", "4bit", "nvfp4",
                                                              "k=int4:channel+prerope,v=nvfp4")),
                         case_name);

double mean_error(const std::vector<std::vector<float>>& got,
                  const std::vector<std::vector<float>>& want) {
  EXPECT_EQ(got.size(), want.size());
  double mean = 0;
  for (size_t i = 0; i < want.size(); ++i) mean += relative_error(got[i], want[i]);
  return mean / static_cast<double>(want.size());
}

TEST_P(OnCuda, LogitsAreTheCpus) {
  Engine cpu(model_bytes(arch()), "cpu");
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<int32_t> tokens = random_tokens(90, kVocab, 1);
  for (const bool deterministic : {false, true}) {
    Engine cuda(model_bytes(arch()),
                backend::BackendOptions{.name = "cuda", .deterministic = deterministic});
    for (const size_t chunk : {90, 33, 1}) {
      const auto cpu_cache = cpu.cache(runtime);
      const auto cuda_cache = cuda.cache(runtime);
      const auto want = cpu.logits(*cpu_cache, must(cpu_cache->add_sequence()), tokens, chunk);
      const auto got = cuda.logits(*cuda_cache, must(cuda_cache->add_sequence()), tokens, chunk);
      EXPECT_LT(mean_error(got, want), deterministic ? kTolerance : bf16_rounding())
          << "chunks of " << chunk << (deterministic ? ", deterministic" : "");
    }
  }
}

// Weights re-quantised to F8_E4M3 while loading are the same on both.
TEST_P(OnCuda, LogitsOfRequantisedWeightsAreTheCpus) {
  constexpr WeightStorage kStorage = WeightStorage::kF8E4m3;
  Engine cpu(model_bytes(arch()), backend::BackendOptions{.name = "cpu"}, kStorage);
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<int32_t> tokens = random_tokens(90, kVocab, 1);
  for (const bool deterministic : {false, true}) {
    Engine cuda(model_bytes(arch()),
                backend::BackendOptions{.name = "cuda", .deterministic = deterministic}, kStorage);
    for (const size_t chunk : {90, 1}) {
      const auto cpu_cache = cpu.cache(runtime);
      const auto cuda_cache = cuda.cache(runtime);
      const auto want = cpu.logits(*cpu_cache, must(cpu_cache->add_sequence()), tokens, chunk);
      const auto got = cuda.logits(*cuda_cache, must(cuda_cache->add_sequence()), tokens, chunk);
      EXPECT_LT(mean_error(got, want), deterministic ? kTolerance : bf16_rounding())
          << "chunks of " << chunk << (deterministic ? ", deterministic" : "");
    }
  }
}

// With --deterministic: the bits of a row do not depend on chunks, on other sequences of the step,
// on their number, nor on whose pages they share.
TEST_P(OnCuda, DeterministicRowsHaveTheSameBits) {
  Engine engine(model_bytes(arch()),
                backend::BackendOptions{.name = "cuda", .deterministic = true});
  RuntimeOptions runtime = small_runtime(kv());
  runtime.context_tokens = 1400;
  runtime.max_step_tokens = 1400;
  runtime.max_logit_rows = 1400;
  runtime.max_sequences = 6;
  const std::vector<int32_t> tokens = random_tokens(1300, kVocab, 1);
  const std::vector<int32_t> others = random_tokens(1300, kVocab, 2);
  const auto whole_cache = engine.cache(runtime);
  const auto whole = engine.logits(*whole_cache, must(whole_cache->add_sequence()), tokens, 1300);
  const auto chunk_cache = engine.cache(runtime);
  EXPECT_EQ(engine.logits(*chunk_cache, must(chunk_cache->add_sequence()), tokens, 301), whole);

  // A batch of other lengths and chunks; at the end single tokens, the last ones of a fork.
  const auto cache = engine.cache(runtime);
  const std::vector<cache::SequenceId> ids = {must(cache->add_sequence()),
                                              must(cache->add_sequence())};
  const std::span<const int32_t> text(tokens);
  std::vector<std::vector<float>> rows;
  const auto keep_rows = [&](size_t count, const std::vector<std::vector<float>>& step) {
    rows.insert(rows.end(), step.begin(), step.begin() + static_cast<std::ptrdiff_t>(count));
  };
  keep_rows(600, engine.step(*cache, {{ids[0], text.first(600), 600},
                                      {ids[1], std::span(others).first(40), 40}}));
  keep_rows(695, engine.step(*cache, {{ids[0], text.subspan(600, 695), 695},
                                      {ids[1], std::span(others).subspan(40, 3), 3}}));
  const cache::SequenceId fork = must(cache->fork(ids[0]));
  for (size_t at = 1295; at < 1300; ++at) {
    const auto step = engine.step(*cache, {{ids[1], std::span(others).subspan(at, 1), 1},
                                           {fork, text.subspan(at, 1), 1},
                                           {ids[0], text.subspan(at, 1), 1}});
    rows.push_back(step[2]);
    EXPECT_EQ(step[1], step[2]);
  }
  ASSERT_EQ(rows.size(), whole.size());
  for (size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(rows[i], whole[i]) << "token " << i;
}

// A workspace that holds the pages of one KV head only: prompts are read head by head, and the plan
// is smaller by what is saved.
TEST_P(OnCuda, SmallPrefillWorkspacesGiveTheSameLogits) {
  backend::BackendOptions options{.name = "cuda"};
  Engine large(model_bytes(arch()), options);
  options.prefill_workspace = 96 << 10;
  Engine small(model_bytes(arch()), options);
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<int32_t> tokens = random_tokens(250, kVocab, 1);
  const auto large_cache = large.cache(runtime);
  const auto small_cache = small.cache(runtime);
  EXPECT_LT(small.backend().memory().stats().total_now, large.backend().memory().stats().total_now);
  const auto want = large.logits(*large_cache, must(large_cache->add_sequence()), tokens, 250);
  const auto got = small.logits(*small_cache, must(small_cache->add_sequence()), tokens, 250);
  EXPECT_LT(mean_error(got, want), bf16_rounding());
}

// Prompts with E4M3 operands: near the logits with 16 bit, and another result.
TEST_P(OnCuda, AttentionInFp8IsNearThatIn16Bit) {
  backend::BackendOptions options{.name = "cuda"};
  Engine exact(model_bytes(arch()), options);
  options.prompt_attention = backend::PromptAttention::kFp8;
  Engine fp8(model_bytes(arch()), options);
  const RuntimeOptions runtime = small_runtime(kv());
  const auto exact_cache = exact.cache(runtime);
  const Status reserved = fp8.model().reserve(runtime);
  if (!reserved) {
    EXPECT_NE(reserved.error().message().find("--attn 16bit"), std::string::npos);
    return;  // a head_dim that has no such kernel
  }
  const std::vector<int32_t> tokens = random_tokens(250, kVocab, 1);
  const auto fp8_cache = must(fp8.model().create_cache(runtime));
  const auto want = exact.logits(*exact_cache, must(exact_cache->add_sequence()), tokens, 250);
  const auto got = fp8.logits(*fp8_cache, must(fp8_cache->add_sequence()), tokens, 250);
  const double error = mean_error(got, want);
  EXPECT_GT(error, 1e-5);
  EXPECT_LT(error, 0.1);
}

TEST_P(OnCuda, WorkspacesBelowAStepAreRefused) {
  Engine engine(model_bytes(arch()),
                backend::BackendOptions{.name = "cuda", .prefill_workspace = 4096});
  const Status reserved = engine.model().reserve(small_runtime(kv()));
  ASSERT_FALSE(reserved);
  EXPECT_NE(reserved.error().message().find("--prefill-workspace"), std::string::npos);
}

TEST_P(OnCuda, RaggedBatchesGiveTheCpusLogits) {
  const std::vector<std::vector<int32_t>> prompts = {
      random_tokens(37, kVocab, 4), random_tokens(1, kVocab, 5), random_tokens(52, kVocab, 6)};
  const auto run = [&](const std::string& backend) {
    Engine engine(model_bytes(arch()), backend::BackendOptions{.name = backend});
    const auto cache = engine.cache(small_runtime(kv()));
    std::vector<ForwardSequence> step;
    for (const auto& prompt : prompts) {
      step.push_back({must(cache->add_sequence()), prompt, static_cast<int>(prompt.size())});
    }
    auto rows = engine.step(*cache, step);
    const std::vector<int32_t> next = random_tokens(3, kVocab, 7);
    for (size_t i = 0; i < step.size(); ++i) {
      step[i].tokens = std::span(next).subspan(i, 1);
      step[i].num_logit_rows = 1;
    }
    for (int i = 0; i < 20; ++i) {
      for (auto& row : engine.step(*cache, step)) rows.push_back(std::move(row));
    }
    return rows;
  };
  EXPECT_LT(mean_error(run("cuda"), run("cpu")), bf16_rounding());
}

// Parts of steps that the device keeps give the bits that their operators give, in batches of one
// size and of others; and the greatest logits are those of the logits.
TEST_P(OnCuda, KeptPartsGiveTheSameBits) {
  RuntimeOptions runtime = small_runtime(kv());
  runtime.max_sequences = 48;
  runtime.max_logit_rows = 48;
  runtime.total_tokens = 48 * 64;
  const auto run = [&](backend::Repetition repetition, bool only_greatest) {
    Engine engine(model_bytes(arch()),
                  backend::BackendOptions{.name = "cuda", .repetition = repetition});
    const auto cache = engine.cache(runtime);
    std::vector<ForwardSequence> all;
    const std::vector<int32_t> prompt = random_tokens(5, kVocab, 31);
    for (size_t i = 0; i < 48; ++i) all.push_back({must(cache->add_sequence()), prompt, 0});
    for (size_t i = 0; i < 48; i += 16) {
      engine.step(*cache, {all.begin() + static_cast<std::ptrdiff_t>(i),
                           all.begin() + static_cast<std::ptrdiff_t>(i + 16)});
    }
    std::vector<std::vector<float>> rows;
    std::vector<int32_t> greatest;
    const std::vector<int32_t> tokens = random_tokens(48, kVocab, 32);
    for (const size_t batch : {48, 48, 48, 48, 48, 3, 3, 3, 3, 3, 40, 48, 3, 1, 40, 40, 40, 40}) {
      std::vector<ForwardSequence> step(all.begin(),
                                        all.begin() + static_cast<std::ptrdiff_t>(batch));
      for (size_t i = 0; i < batch; ++i) {
        step[i] = {all[i].id, std::span(tokens).subspan(i, 1), 1, only_greatest};
      }
      must(engine.model().forward(step, *cache, [&](std::span<const LogitsRow> turn) -> Status {
        for (const LogitsRow& row : turn) {
          greatest.push_back(row.greatest.index);
          if (only_greatest) continue;
          rows.emplace_back(row.logits.begin(), row.logits.end());
          const auto best = std::ranges::max_element(row.logits);
          EXPECT_EQ(row.greatest.index, best - row.logits.begin());
        }
        return {};
      }));
    }
    must(cache->check_integrity());
    return std::pair(rows, greatest);
  };
  const auto plain = run(backend::Repetition::kNever, false);
  EXPECT_EQ(run(backend::Repetition::kWherePossible, false), plain);
  EXPECT_EQ(run(backend::Repetition::kWherePays, false), plain);
  EXPECT_EQ(run(backend::Repetition::kWherePossible, true).second, plain.second);
}

// Logits of a batch that goes on from one prompt in different ways, read in one step at the end.
std::vector<std::vector<float>> continue_prompt(Engine& engine, const RuntimeOptions& runtime,
                                                bool fork) {
  constexpr size_t kSequences = 4;
  const auto cache = engine.cache(runtime);
  const std::vector<int32_t> prompt = random_tokens(300, kVocab, 11);
  std::vector<cache::SequenceId> ids;
  for (size_t i = 0; i < kSequences; ++i) {
    if (fork && i > 0) {
      ids.push_back(must(cache->fork(ids[0])));
    } else {
      ids.push_back(must(cache->add_sequence()));
      engine.step(*cache, {{ids[i], prompt, 0}});
    }
  }
  // Past the end of a page: each sequence also has a closed page of its own.
  const std::vector<int32_t> tokens = random_tokens(90 * kSequences, kVocab, 12);
  std::vector<std::vector<float>> rows;
  for (size_t at = 0; at < tokens.size(); at += kSequences) {
    std::vector<ForwardSequence> step;
    for (size_t i = 0; i < kSequences; ++i)
      step.push_back({ids[i], std::span(tokens).subspan(at + i, 1), 1});
    rows = engine.step(*cache, step);
  }
  must(cache->check_integrity());
  return rows;
}

// Pages that forks of a sequence have in common are read once for all of them.
TEST_P(OnCuda, SharedPagesGiveTheLogitsOfPagesApart) {
  RuntimeOptions runtime = small_runtime(kv());
  runtime.page_tokens = 64;  // what the shared kernel reads
  runtime.context_tokens = 512;
  runtime.max_step_tokens = 512;
  const auto run = [&](backend::PageSharing sharing, bool fork) {
    Engine engine(model_bytes(arch()),
                  backend::BackendOptions{.name = "cuda", .page_sharing = sharing});
    return continue_prompt(engine, runtime, fork);
  };
  const auto shared = run(backend::PageSharing::kWherePossible, true);
  const auto each = run(backend::PageSharing::kNever, true);
  const auto apart = run(backend::PageSharing::kNever, false);
  EXPECT_EQ(each, apart);
  // Another kernel, so other bits; `8bit`, keys before RoPE and GPUs other than Hopper have none.
  EXPECT_EQ(shared != each,
            has_hopper_kernels_ && kv() != "8bit" && kv().find("+prerope") == std::string::npos);
  EXPECT_LT(mean_error(shared, each), rounding());
  Engine cpu(model_bytes(arch()), "cpu");
  EXPECT_LT(mean_error(shared, continue_prompt(cpu, runtime, true)), bf16_rounding());
}

// Logits after the pages of a prompt went from a cache of one backend to a cache of another.
std::vector<std::vector<float>> continue_elsewhere(Engine& from, Engine& to,
                                                   const RuntimeOptions& runtime,
                                                   std::span<const int32_t> tokens) {
  const auto source = from.cache(runtime);
  const auto target = to.cache(runtime);
  const cache::SequenceId id = must(source->add_sequence());
  const cache::SequenceId copy = must(target->add_sequence());
  constexpr size_t kRest = 16;
  const size_t prompt = tokens.size() - kRest;
  from.step(*source, {{id, tokens.first(prompt), 0}});
  const std::vector<uint32_t> names(static_cast<size_t>(runtime.page_tokens));
  for (int64_t page = 0; page < static_cast<int64_t>(prompt) / runtime.page_tokens; ++page) {
    std::vector<std::vector<std::byte>> objects;
    for (int group = 0; group < source->num_groups(); ++group) {
      objects.push_back(must(source->export_page(id, group, page, {{}, {}, names})));
    }
    const std::vector<std::span<const std::byte>> views(objects.begin(), objects.end());
    must(target->import_page(copy, views));
  }
  return to.step(*target, {{copy, tokens.last(kRest), kRest}});
}

TEST_P(OnCuda, PagesAreReadOnTheOtherSide) {
  // Pages that a window has left are not exchanged, and BF16 caches close none.
  if (arch() == "gemma3" || kv() == "bf16") return;
  Engine cpu(model_bytes(arch()), "cpu");
  Engine cuda(model_bytes(arch()), "cuda");
  const RuntimeOptions runtime = small_runtime(kv());
  const std::vector<int32_t> tokens = random_tokens(96, kVocab, 9);
  const auto want = continue_elsewhere(cpu, cpu, runtime, tokens);
  EXPECT_LT(mean_error(continue_elsewhere(cpu, cuda, runtime, tokens), want), 2 * kTolerance);
  EXPECT_LT(mean_error(continue_elsewhere(cuda, cpu, runtime, tokens), want), 2 * kTolerance);
}

// The same random rows on both sides, in steps of whole and of partial pages.
TEST_P(OnCuda, RandomContextsGiveTheCpusLogits) {
  RuntimeOptions runtime = small_runtime(kv());
  runtime.max_step_tokens = 40;
  const auto run = [&](const std::string& backend) {
    Engine engine(model_bytes(arch()), backend);
    const auto cache = engine.cache(runtime);
    const std::vector<cache::SequenceId> ids = {must(cache->add_sequence()),
                                                must(cache->add_sequence())};
    must(engine.model().append_random(ids, *cache, {.num_tokens = 150}));
    const std::vector<int32_t> token = {7};
    return engine.step(*cache, {{ids[0], token, 1}, {ids[1], token, 1}});
  };
  EXPECT_LT(mean_error(run("cuda"), run("cpu")), kTolerance);
}

TEST_P(OnCuda, MemoryIsWhatWasPlanned) {
  Engine cuda(model_bytes(arch()), "cuda");
  const RuntimeOptions runtime = small_runtime(kv());
  const auto plan = must(plan_memory(cuda.model().source(), cuda.backend(), runtime));
  const auto cache = cuda.cache(runtime);
  EXPECT_EQ(cuda.backend().memory().stats().total_now, plan.total());
  EXPECT_EQ(cuda.backend().memory().stats().total_peak, plan.peak());
}

}  // namespace
}  // namespace kvant::model
