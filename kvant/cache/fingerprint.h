// What decides the meaning of a page's bytes, as 16 bytes, and the keys that name closed pages
// (codecs.md section 5). Thread-safe (pure functions).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kvant/cache/kv_cache.h"

namespace kvant::cache {

inline constexpr int kCodecVersion = 1;

using PageKey = std::array<uint8_t, 32>;

// The canonical JSON under the fingerprint: keys sorted, no spaces. `config.plan` may be null.
std::string fingerprint_json(const CacheConfig& config);
// First 16 bytes of its SHA-256.
std::array<uint8_t, 16> cache_fingerprint(const CacheConfig& config);

// SHA-256(parent_key | fingerprint | salt | token ids as little-endian u32). The first page's
// parent key is all zeros; `salt` separates tenants and may be empty.
PageKey page_key(const PageKey& parent, std::span<const uint8_t, 16> fingerprint,
                 std::string_view salt, std::span<const uint32_t> token_ids);

// What events call a page: the first 8 bytes of its key as a little-endian number, 1 instead of 0
// (0 means "none" to some of their readers).
uint64_t event_id(const PageKey& key);

}  // namespace kvant::cache
