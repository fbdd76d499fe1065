// Features of serving: for every format, greedy answers are the same whether the prompt came from
// the prefix cache or a tier, what ran beside it, whether it was preempted and what was drafted.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/cache/testing/cache_harness.h"
#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/testing/collector.h"
#include "kvant/serve/tiers/disk_store.h"
#include "kvant/serve/tiers/host_store.h"
#include "kvant/serve/tiers/redis_store.h"
#include "kvant/serve/tiers/testing/redis_servers.h"
#include "tests/conformance/conformance.h"

namespace kvant::conformance {
namespace {

using model::testing::must;
using serve::testing::Collector;

constexpr int kPage = 16;
constexpr int kVocab = 64;

// A small model with full-attention and window layers, behind an engine.
class Served {
 public:
  struct Sizes {
    int64_t total_tokens = 1024;
    int64_t held_pages = 8;  // sink pages and windows
    int max_draft_tokens = 0;
    int max_sequences = 6;
  };
  Served(const std::string& spec, const Sizes& sizes, std::vector<serve::TierSetup> tiers = {})
      : model_(model::testing::tiny_model("gemma3"), "cpu") {
    const model::ModelConfig& config = model_.model().config();
    std::vector<cache::LayerGeometry> layers;
    for (int i = 0; i < config.num_layers; ++i) {
      layers.push_back({config.num_kv_heads, config.head_dim, config.layer_window[i]});
    }
    plan_ = cache::testing::make_test_plan(layers);
    plan_.geometry_id = config.geometry_id();
    plan_.kv = spec;
    serve::EngineOptions options;
    options.runtime = model::testing::small_runtime(spec);
    options.runtime.plan = &plan_;
    options.runtime.context_tokens = 128;
    options.runtime.max_sequences = sizes.max_sequences;
    options.runtime.max_step_tokens = 40;
    options.runtime.total_tokens = sizes.total_tokens;
    options.runtime.held_sink_pages = options.runtime.held_windows = sizes.held_pages;
    // Pages of the last N tokens never enter the tree (codecs.md section 3).
    options.prefix_caching = shares_pages_ = options.runtime.format.recent_tokens == 0;
    options.speculation.max_draft_tokens = sizes.max_draft_tokens;
    options.speculation.lookup.min_ngram = 1;
    options.load_by_cost = false;
    engine_ =
        must(serve::Engine::create(model_.model(), options, nullptr, nullptr, std::move(tiers)));
  }

  std::shared_ptr<Collector> submit(std::vector<int32_t> prompt, int max_tokens) {
    serve::Request request;
    request.prompt = std::move(prompt);
    request.sampling.temperature = 0;
    request.sampling.max_tokens = max_tokens;
    const auto collector = std::make_shared<Collector>();
    request.listener = collector;
    must(engine_->submit(std::move(request)));
    return collector;
  }
  bool shares_pages() const { return shares_pages_; }
  serve::Engine& engine() { return *engine_; }

 private:
  model::testing::Engine model_;
  formats::QuantPlan plan_;
  bool shares_pages_ = true;
  std::unique_ptr<serve::Engine> engine_;
};

std::vector<int32_t> prompt(size_t length, uint32_t seed) {
  return model::testing::random_tokens(length, kVocab, seed);
}

void serve_from_prefix_cache(const std::string& spec) {
  Served served(spec, {});
  const auto cold = served.submit(prompt(75, 1), 24);
  cold->wait();
  const auto warm = served.submit(prompt(75, 1), 24);
  EXPECT_EQ(warm->wait().cached_tokens, served.shares_pages() ? 4 * kPage : 0);
  EXPECT_EQ(warm->ids(), cold->ids());
}

void serve_batch_with_preemption(const std::string& spec) {
  Served served(spec, {.total_tokens = 128, .held_pages = 1});
  Served alone(spec, {});
  std::vector<std::shared_ptr<Collector>> answers;
  // At once, so that what happens does not depend on threads.
  must(served.engine().run_between_steps([&](cache::KvCache&, cache::PrefixTree*) {
    for (uint32_t i = 0; i < 6; ++i) answers.push_back(served.submit(prompt(9 + 7 * i, i), 50));
  }));
  for (uint32_t i = 0; i < 6; ++i) {
    EXPECT_EQ(answers[i]->wait().reason, serve::FinishReason::kLength);
    if (i % 3 != 0) continue;
    const auto expected = alone.submit(prompt(9 + 7 * i, i), 50);
    expected->wait();
    EXPECT_EQ(answers[i]->ids(), expected->ids()) << "request " << i;
  }
  EXPECT_GT(served.engine().stats().preemptions, 0);
}

void serve_batch_of_16(const std::string& spec) {
  constexpr uint32_t kRequests = 16;
  Served together(spec, {.total_tokens = 2048, .held_pages = 20, .max_sequences = kRequests});
  Served alone(spec, {});
  std::vector<std::shared_ptr<Collector>> answers;
  must(together.engine().run_between_steps([&](cache::KvCache&, cache::PrefixTree*) {
    for (uint32_t i = 0; i < kRequests; ++i)
      answers.push_back(together.submit(prompt(9 + 3 * i, i), 20));
  }));
  for (uint32_t i = 0; i < kRequests; ++i) {
    const auto expected = alone.submit(prompt(9 + 3 * i, i), 20);
    expected->wait();
    EXPECT_EQ(answers[i]->wait().reason, serve::FinishReason::kLength);
    EXPECT_EQ(answers[i]->ids(), expected->ids()) << "request " << i;
  }
  EXPECT_EQ(together.engine().stats().preemptions, 0);
}

void serve_drafts(const std::string& spec) {
  Served plain(spec, {});
  Served drafting(spec, {.max_draft_tokens = 5});
  const auto expected = plain.submit(prompt(20, 3), 60);
  const auto drafted = drafting.submit(prompt(20, 3), 60);
  expected->wait();
  EXPECT_GT(drafted->wait().drafted_tokens, 0);
  EXPECT_EQ(drafted->ids(), expected->ids());
}

// Down to a tier and back: the same pages, the same answer.
void serve_from_tier(const std::string& spec, std::unique_ptr<serve::PageStore> store) {
  if (formats::parse_cache_format(spec)->recent_tokens > 0) return;  // no pages outlive a sequence
  std::vector<serve::TierSetup> tiers;
  tiers.push_back({std::move(store), {.policy = serve::WritePolicy::kWriteThrough}});
  Served served(spec, {}, std::move(tiers));
  const auto cold = served.submit(prompt(75, 1), 24);
  cold->wait();
  must(served.engine().reset_prefix_cache());
  const auto warm = served.submit(prompt(75, 1), 24);
  EXPECT_EQ(warm->wait().cached_tokens, 4 * kPage);
  EXPECT_EQ(warm->ids(), cold->ids());
  EXPECT_GT(served.engine().stats().prefetch.prefetches, 0);
}

void serve_from_host(const std::string& spec) {
  serve_from_tier(spec, std::make_unique<serve::HostStore>(int64_t{16} << 20));
}

void serve_from_disk(const std::string& spec) {
  const std::string folder =
      ::testing::TempDir() + "kvant-conformance-pages-" + std::to_string(::getpid());
  serve_from_tier(spec, must(serve::DiskStore::open(folder, int64_t{64} << 20)));
  std::filesystem::remove_all(folder);
}

constexpr Feature kServeFeatures[] = {
    {"serve_from_prefix_cache", serve_from_prefix_cache},
    {"serve_batch_with_preemption", serve_batch_with_preemption},
    {"serve_batch_of_16", serve_batch_of_16},
    {"serve_drafts", serve_drafts},
    {"serve_from_host", serve_from_host},
    {"serve_from_disk", serve_from_disk},
};

// One test, as its server is one for all formats, and may not be installed.
TEST(ServeFromRemote, EveryFormat) {
  if (!serve::testing::RedisServers::installed()) GTEST_SKIP() << "redis-server is not installed";
  const serve::testing::RedisServers redis(1, false);
  ASSERT_EQ(redis.error(), "");
  for (const std::string& spec : all_subjects()) {
    SCOPED_TRACE(spec);
    serve_from_tier(spec, must(serve::RedisStore::create(redis.url(), 3600)));
  }
}

}  // namespace

std::span<const Feature> serve_features() {
  return kServeFeatures;
}

}  // namespace kvant::conformance
