// Speed of appending a token and of closing a page on the CPU backend, per format, on one thread.
//
//   build/bench/kvant_append_bench --megabytes=512 --benchmark_filter='avx512'
//
// "append" is one token of 8 KV heads in one layer, "close" the same with the page that it fills
// (64 tokens), "copy" a memcpy of the BF16 bytes that closing reads. Layers rotate over
// `--megabytes` of BF16 pages; 0 stays in one layer, in the caches. Bytes count the BF16 values of
// the tokens appended (append) or of the page (close, copy), so times of close and copy compare.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/backend/cpu/cpu_backend.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/formats/spec.h"

namespace kvant::backend {
namespace {

constexpr int kTokens = 64;
constexpr int kHeads = 8;

int64_t megabytes = 512;

template <typename T>
T require(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().message().c_str());
    std::exit(1);
  }
  return std::move(*result);
}
void require(const Status& status) {
  if (status) return;
  std::fprintf(stderr, "%s\n", status.error().message().c_str());
  std::exit(1);
}

int64_t bf16_page_bytes(int head_dim) {  // of one layer
  return int64_t{kTokens} * kHeads * head_dim * 2 * 2;
}
int num_layers(int head_dim) {
  return static_cast<int>(std::max<int64_t>(1, (megabytes << 20) / bf16_page_bytes(head_dim)));
}

constexpr int kPages = 2;  // the first may stay BF16 (+sink)

// A cache whose open page lacks a token or two, with the next token's step begun.
class OpenPage {
 public:
  // With `fills` the step's token is the page's last one.
  OpenPage(const std::string& kv, int head_dim, CpuLevel level, bool fills) {
    cpu::CpuOptions cpu_options;
    cpu_options.num_threads = 1;
    cpu_options.level = level;
    backend_ = std::make_unique<cpu::CpuBackend>(cpu_options);
    WorkspaceNeeds needs;
    needs.max_rows = kTokens;
    needs.max_context = kPages * kTokens;
    needs.num_query_heads = needs.num_kv_heads = kHeads;
    needs.head_dim = head_dim;
    needs.page_tokens = kTokens;
    needs.max_sequences = 1;
    require(backend_->reserve_workspace(needs));

    cache::CacheConfig config;
    config.format = require(formats::parse_cache_format(kv));
    config.layers.assign(static_cast<size_t>(num_layers(head_dim)), {kHeads, head_dim, 0});
    config.page_tokens = kTokens;
    config.layout = backend_->info().page_layout;
    config.max_tokens = kPages * kTokens;
    config.max_step_tokens = kTokens;
    cache_ = require(cache::KvCache::create(config, backend_->memory()));

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    k_.resize(static_cast<size_t>(kTokens * kHeads * head_dim));
    v_.resize(k_.size());
    for (float& value : k_) value = normal(random);
    for (float& value : v_) value = normal(random);
    const cache::SequenceId id = require(cache_->add_sequence());
    for (int page = 0; page < kPages; ++page) {
      step({id, page + 1 < kPages ? kTokens : kTokens - (fills ? 1 : 2)});
      cache_->commit_step();
    }
    step({id, 1});  // stays open: appending again writes the same bytes
  }

  void append(int layer) {
    require(backend_->append({&cache_->view(0), layer, k_.data(), v_.data()}));
  }

 private:
  void step(cache::StepSequence sequence) {
    require(cache_->begin_step({&sequence, 1}));
    for (size_t layer = 0; layer < cache_->config().layers.size(); ++layer) {
      append(static_cast<int>(layer));
    }
  }

  std::unique_ptr<cpu::CpuBackend> backend_;
  std::unique_ptr<cache::KvCache> cache_;
  std::vector<float> k_, v_;
};

void append(benchmark::State& state, const std::string& kv, int head_dim, CpuLevel level,
            bool fills) {
  OpenPage page(kv, head_dim, level, fills);
  int layer = 0;
  for (auto _ : state) {
    page.append(layer);
    layer = layer + 1 == num_layers(head_dim) ? 0 : layer + 1;
  }
  state.SetBytesProcessed(state.iterations() * bf16_page_bytes(head_dim) / (fills ? 1 : kTokens));
}

void copy(benchmark::State& state, int head_dim) {
  const int64_t bytes = bf16_page_bytes(head_dim);
  HostMemory memory;
  const Buffer source =
      require(Buffer::create(memory, bytes * num_layers(head_dim), MemoryUse::kPages));
  const Buffer target = require(Buffer::create(memory, source.bytes(), MemoryUse::kPages));
  std::memset(source.data(), 1, static_cast<size_t>(source.bytes()));
  std::memset(target.data(), 1, static_cast<size_t>(source.bytes()));
  int layer = 0;
  for (auto _ : state) {
    std::memcpy(target.data() + layer * bytes, source.data() + layer * bytes,
                static_cast<size_t>(bytes));
    benchmark::ClobberMemory();
    layer = layer + 1 == num_layers(head_dim) ? 0 : layer + 1;
  }
  state.SetBytesProcessed(state.iterations() * bytes);
}

void add(const std::string& kv, int head_dim, CpuLevel level) {
  std::string suffix(1, '/');
  suffix.append(cpu_level_name(level)).append("/").append(kv).append("/");
  suffix.append(std::to_string(head_dim));
  for (const bool fills : {false, true}) {
    const auto run = [kv, head_dim, level, fills](benchmark::State& state) {
      append(state, kv, head_dim, level, fills);
    };
    benchmark::RegisterBenchmark(((fills ? "close" : "append") + suffix).c_str(), run)
        ->Unit(benchmark::kMicrosecond);
  }
}

}  // namespace
}  // namespace kvant::backend

int main(int argc, char** argv) {
  using namespace kvant;
  benchmark::Initialize(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    constexpr std::string_view kOption = "--megabytes=";
    if (std::string_view(argv[i]).starts_with(kOption)) {
      backend::megabytes = std::atoll(argv[i] + kOption.size());
    }
  }
  for (const int head_dim : {64, 128}) {
    benchmark::RegisterBenchmark(
        ("copy/" + std::to_string(head_dim)).c_str(),
        [head_dim](benchmark::State& state) { backend::copy(state, head_dim); })
        ->Unit(benchmark::kMicrosecond);
    for (const CpuLevel level : {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
      if (level > detect_cpu_level()) continue;
      for (const char* kv : {"8bit", "6bit", "4bit", "3bit", "int8", "fp8", "fp8:token", "mxfp8",
                             "int4", "nvfp4", "nvfp4+46", "mxfp4", "int8+rot"}) {
        backend::add(kv, head_dim, level);
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
