#include "tests/fuzz/page_object_caches.h"

#include <cstdint>
#include <cstdlib>
#include <utility>

#include "kvant/cache/scalar_append.h"

namespace kvant::fuzz {
namespace {

struct Kind {
  const char* name;
  const char* format;
  int page_tokens;
  int layers;
  cache::LayerGeometry geometry;
  cache::Layout layout;
};

constexpr Kind kKinds[] = {
    {"int4", "k=int4:channel,v=nvfp4", 16, 1, {1, 16, 0}, cache::Layout::kCpu},
    {"4bit", "4bit", 32, 1, {2, 64, 0}, cache::Layout::kCpu},
    {"8bit", "8bit", 64, 2, {1, 32, 0}, cache::Layout::kSm90},
    {"fp8", "k=fp8+mean,v=fp8e5m2+rot", 16, 2, {2, 16, 48}, cache::Layout::kPlanar},
    {"mxfp4", "mxfp4", 128, 1, {1, 64, 0}, cache::Layout::kSm90},
};

// Two pages of one layer, [token][kv_head][head_dim].
std::vector<float> values(size_t count, uint32_t seed) {
  std::vector<float> floats(count);
  for (float& x : floats) {
    seed = seed * 1664525 + 1013904223;
    x = static_cast<float>(seed >> 16) / 16384.0f - 2.0f;
  }
  return floats;
}

Result<cache::SequenceId> append_two_pages(cache::KvCache& kv, const Kind& kind) {
  KVANT_ASSIGN(const cache::SequenceId id, kv.add_sequence());
  const cache::StepSequence step = {id, 2 * kind.page_tokens};
  KVANT_TRY(kv.begin_step(std::span(&step, 1)));
  const size_t count = static_cast<size_t>(step.num_new_tokens) * kind.geometry.num_kv_heads *
                       kind.geometry.head_dim;
  for (int layer = 0; layer < kind.layers; ++layer) {
    const auto k = values(count, 2 * layer), v = values(count, 2 * layer + 1);
    KVANT_TRY(cache::scalar_append(kv.view(0), layer, k.data(), v.data()));
  }
  kv.commit_step();
  return id;
}

Result<ImportCache> make_import_cache(const Kind& kind, MemoryResource& memory) {
  cache::CacheConfig config;
  config.layers.assign(kind.layers, kind.geometry);
  KVANT_ASSIGN(config.format, formats::parse_cache_format(kind.format));
  config.page_tokens = kind.page_tokens;
  config.layout = kind.layout;
  config.max_tokens = 4 * kind.page_tokens;
  config.max_sequences = 2;
  ImportCache made = {.name = kind.name};
  KVANT_ASSIGN(made.kv, cache::KvCache::create(config, memory));
  KVANT_ASSIGN(made.two_pages, append_two_pages(*made.kv, kind));
  return made;
}

}  // namespace

std::vector<ImportCache> make_import_caches(MemoryResource& memory) {
  std::vector<ImportCache> caches;
  for (const Kind& kind : kKinds) {
    auto made = make_import_cache(kind, memory);
    if (!made) std::abort();  // a fuzzer without its caches finds nothing
    caches.push_back(std::move(*made));
  }
  return caches;
}

}  // namespace kvant::fuzz
