// The memory plan against what happens: the allocator's high-water mark, and resident memory.
//
// In its own program, because resident memory is that of the whole process.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/formats/spec.h"
#include "kvant/model/model.h"
#include "tests/support/program.h"

namespace kvant::testing {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// Sum of one field ("Anonymous", "Rss") in bytes: of the whole process, or of the mappings of
// `file`.
int64_t resident_bytes(const std::string& field, const std::string& file = "") {
  std::ifstream in(file.empty() ? "/proc/self/smaps_rollup" : "/proc/self/smaps");
  int64_t sum = 0;
  bool inside = file.empty();
  for (std::string line; std::getline(in, line);) {
    const size_t colon = line.find(':');
    const bool is_field = colon != std::string::npos && line.find(' ') > colon;
    if (!is_field) {
      if (!file.empty()) inside = line.ends_with(file);
    } else if (inside && line.substr(0, colon) == field) {
      sum += std::stoll(line.substr(colon + 1)) * 1024;
    }
  }
  return sum;
}

// Ids that touch rows all over the embedding table, which is read where it lies in the file.
std::vector<int32_t> tokens_all_over(int64_t count, int vocab) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    tokens[static_cast<size_t>(i)] = static_cast<int32_t>((i * 7919) % vocab);
  return tokens;
}

class MemoryPlanTest : public ::testing::TestWithParam<const char*> {};

TEST_P(MemoryPlanTest, IsWhatAFullContextTakes) {
  const std::string path = model_path("smollm2");
  if (path.empty()) GTEST_SKIP() << "fetch the model: scripts/fetch_model.sh smollm2";
  const int64_t anonymous_before = resident_bytes("Anonymous");

  auto backend = backend::create_backend({});
  ASSERT_TRUE(backend) << backend.error().message();
  auto source = model::ModelSource::open(path);
  ASSERT_TRUE(source) << source.error().message();
  model::RuntimeOptions runtime;
  runtime.format = *formats::parse_cache_format(GetParam());
  runtime.context_tokens = 1024;
  runtime.max_step_tokens = 256;
  const auto plan = model::plan_memory(**source, **backend, runtime);
  ASSERT_TRUE(plan) << plan.error().message();

  auto model = model::Model::load(std::move(*source), **backend, {});
  ASSERT_TRUE(model) << model.error().message();
  ASSERT_TRUE((*model)->reserve(runtime));
  auto cache = (*model)->create_cache(runtime);
  ASSERT_TRUE(cache) << cache.error().message();
  const auto id = (*cache)->add_sequence();
  ASSERT_TRUE(id);
  const std::vector<int32_t> tokens =
      tokens_all_over(runtime.context_tokens, (*model)->config().vocab_size);
  const auto ignore = [](int64_t, std::span<const float>) { return Status(); };
  for (size_t begin = 0; begin < tokens.size(); begin += 256) {
    const model::ForwardSequence part = {*id, std::span(tokens).subspan(begin, 256), 1};
    const Status done = (*model)->forward(std::span(&part, 1), **cache, ignore);
    ASSERT_TRUE(done) << done.error().message();
  }

  const MemoryStats stats = (*backend)->memory().stats();
  EXPECT_EQ(stats.total_now, plan->total());
  EXPECT_EQ(stats.total_peak, plan->peak());

  const int64_t anonymous = resident_bytes("Anonymous") - anonymous_before;
  const int64_t mapped = resident_bytes("Rss", std::filesystem::canonical(path).string());
  const int64_t tolerance = plan->total() * 3 / 100 + 16 * kMiB;

  EXPECT_LE(anonymous, plan->total() + tolerance);
  EXPECT_GE(anonymous, plan->total() - tolerance);
  EXPECT_GT(mapped, 0);
  EXPECT_LE(anonymous + mapped, plan->total() + plan->weights.in_place + tolerance);
  RecordProperty("planned_bytes", std::to_string(plan->total()));
  RecordProperty("anonymous_bytes", std::to_string(anonymous));
  RecordProperty("mapped_bytes", std::to_string(mapped));
}

INSTANTIATE_TEST_SUITE_P(Formats, MemoryPlanTest,
                         ::testing::Values("bf16", "8bit", "4bit", "nvfp4"));

}  // namespace
}  // namespace kvant::testing
