// Hostile page objects: parsing, and importing them into a cache whose pages they claim to be.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "kvant/cache/kv_cache.h"
#include "kvant/cache/page_object.h"

namespace {

using namespace kvant;

cache::CacheConfig make_config() {
  cache::CacheConfig config;
  config.layers = {{.num_kv_heads = 1, .head_dim = 16}};
  config.format = *formats::parse_cache_format("k=int4:channel,v=nvfp4");
  config.page_tokens = 16;
  config.max_tokens = 64;
  return config;
}

// Fuzzers do not find checksums: sets header and payload of `object` to what its own fields ask
// for.
std::vector<std::byte> with_valid_checksums(std::span<const std::byte> bytes,
                                            std::span<const uint8_t, 16> fingerprint) {
  cache::PageObjectHeader header;
  const auto at = [&](size_t i) {
    return i < bytes.size() ? std::to_integer<uint32_t>(bytes[i]) : 0u;
  };
  std::copy(fingerprint.begin(), fingerprint.end(), header.fingerprint.begin());
  if (at(0) == 255) header.fingerprint[0] ^= 1;
  header.page_tokens = header.num_tokens = 16u << (at(1) % 4);
  header.layer_group = at(2) % 4;
  header.first_kv_head = at(3) % 2;
  header.num_kv_heads = 1 + at(4) % 2;
  header.layout = static_cast<cache::Layout>(at(5) % 3);
  header.first_position = static_cast<uint64_t>(at(6) % 4) * header.page_tokens;
  header.token_ids.resize(header.num_tokens);
  const std::span<const std::byte> rest = bytes.subspan(std::min<size_t>(bytes.size(), 8));
  std::vector<std::byte> payload(rest.begin(), rest.end());
  // Mostly of the size that the cache expects.
  const auto units = formats::unit_sections(make_config().format.k, make_config().format.v, 16, 16);
  if (at(7) != 255) payload.resize(units.bytes);
  return cache::build_page_object(header, payload);
}

void import(std::span<const std::byte> object) {
  static HostMemory memory;
  static const std::unique_ptr<cache::KvCache> kv = *cache::KvCache::create(make_config(), memory);
  const cache::SequenceId id = *kv->add_sequence();
  const Status imported = kv->import_page(id, std::span(&object, 1));
  if (kv->length(id) != (imported ? 16 : 0)) std::abort();
  if (imported) {
    // What was accepted comes out as it went in.
    const auto parsed = cache::parse_page_object(object);
    cache::KvCache::PageIdentity identity{};
    identity.token_ids = parsed->header.token_ids;
    if (!kv->export_page(id, 0, 0, identity)) std::abort();
  }
  kv->remove_sequence(id);
  if (!kv->check_integrity()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const Result<cache::PageObject> parsed = cache::parse_page_object(bytes);
  if (parsed && parsed->header.token_ids.size() != parsed->header.page_tokens) std::abort();
  import(bytes);
  static const auto fingerprint = [] {
    HostMemory memory;
    const auto kv = *cache::KvCache::create(make_config(), memory);
    std::array<uint8_t, 16> copy;
    std::copy(kv->fingerprint().begin(), kv->fingerprint().end(), copy.begin());
    return copy;
  }();
  import(with_valid_checksums(bytes, fingerprint));
  return 0;
}
