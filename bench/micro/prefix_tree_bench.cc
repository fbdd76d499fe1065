// Speed of the prefix tree: finding, sharing, adding and evicting pages of 64 tokens.
//
//   build/bench/kvant_prefix_tree_bench
//
// The argument is the number of pages of a prompt. Every iteration of "match" looks up a whole
// prompt in a tree of 20,000 pages, "attach" also leases it and shares it with a sequence, "insert"
// adds a prompt's pages to the tree and evicts as many. Bytes of pages are never touched.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "kvant/cache/kv_cache.h"
#include "kvant/cache/prefix_tree.h"
#include "kvant/formats/spec.h"

namespace kvant::cache {
namespace {

constexpr int kPageTokens = 64;
constexpr int64_t kTreePages = 20000;

template <typename T>
T must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().message().c_str());
    std::exit(1);
  }
  return std::move(*result);
}
void must(const Status& status) {
  if (!status) {
    std::fprintf(stderr, "%s\n", status.error().message().c_str());
    std::exit(1);
  }
}

class Bench {
 public:
  explicit Bench(int64_t prompt_pages) : prompt_pages_(prompt_pages) {
    CacheConfig config;
    config.layers = {{.num_kv_heads = 1, .head_dim = 64}};
    config.format = must(formats::parse_cache_format("4bit"));
    config.page_tokens = kPageTokens;
    config.max_sequence_tokens = prompt_pages * kPageTokens;
    config.max_tokens = (kTreePages + 2 * prompt_pages) * kPageTokens;
    config.max_sequences = 2;
    config.max_step_tokens = static_cast<int>(config.max_sequence_tokens);
    config.held_sink_pages = kTreePages;
    cache_ = must(KvCache::create(config, memory_));
    tree_ = must(PrefixTree::create(*cache_));
    for (next_ = 0; next_ < kTreePages / prompt_pages; ++next_) insert(prompt(next_));
  }

  // Prompts share nothing but their first page with a tenth of the others.
  std::vector<int32_t> prompt(int64_t number) const {
    std::vector<int32_t> tokens(prompt_pages_ * kPageTokens);
    for (size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = static_cast<int32_t>(i < kPageTokens ? number % 10 : number * 7 + i);
    return tokens;
  }

  void insert(const std::vector<int32_t>& tokens) {
    const int64_t limit = static_cast<int64_t>(tokens.size());
    PrefixLease lease = tree_->acquire(tree_->match(tokens, "", limit - 1));
    const SequenceId id = must(cache_->add_sequence());
    must(tree_->attach(lease, id));
    const StepSequence item{id, static_cast<int32_t>(limit - cache_->length(id))};
    if (!tree_->make_room(must(cache_->needed_pages(std::span(&item, 1))))) std::exit(1);
    must(cache_->begin_step(std::span(&item, 1)));
    cache_->commit_step();
    must(tree_->insert(lease, id, tokens, ""));
    cache_->remove_sequence(id);
  }

  HostMemory memory_;
  const int64_t prompt_pages_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<PrefixTree> tree_;
  int64_t next_ = 0;
};

void match(benchmark::State& state) {
  Bench bench(state.range(0));
  const auto tokens = bench.prompt(3);
  for (auto _ : state)
    benchmark::DoNotOptimize(
        bench.tree_->match(tokens, "", static_cast<int64_t>(tokens.size())).num_pages);
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void attach(benchmark::State& state) {
  Bench bench(state.range(0));
  const auto tokens = bench.prompt(3);
  for (auto _ : state) {
    const PrefixLease lease =
        bench.tree_->acquire(bench.tree_->match(tokens, "", static_cast<int64_t>(tokens.size())));
    const SequenceId id = must(bench.cache_->add_sequence());
    must(bench.tree_->attach(lease, id));
    bench.cache_->remove_sequence(id);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void insert(benchmark::State& state) {
  Bench bench(state.range(0));
  for (auto _ : state) bench.insert(bench.prompt(bench.next_++));
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

BENCHMARK(match)->Arg(16)->Arg(64)->Arg(512)->Unit(benchmark::kMicrosecond);
BENCHMARK(attach)->Arg(16)->Arg(64)->Arg(512)->Unit(benchmark::kMicrosecond);
BENCHMARK(insert)->Arg(16)->Arg(64)->Arg(512)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace kvant::cache

BENCHMARK_MAIN();
