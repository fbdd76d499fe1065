// One session's cache in a file: the page objects of a sequence, one after the other, planar, in
// the order of pages and, in a page, of layer groups; nothing else. Engine thread only.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"

namespace kvant::serve {

// Writes the closed pages of a sequence whose tokens are given; those that left a window are left
// out. Beside `path` and renamed. Returns how many tokens they hold; the rest is recomputed.
Result<int64_t> save_session(const std::string& path, const cache::KvCache& cache,
                             cache::SequenceId id, std::span<const int32_t> tokens,
                             std::string_view salt = {});

// Fills an empty sequence from such a file and returns its tokens. kCorruptData and
// kInvalidArgument (another model, format or salt) name the page, kResourceExhausted says how many
// tokens the cache takes; the sequence is empty then.
Result<std::vector<int32_t>> restore_session(const std::string& path, cache::KvCache& cache,
                                             cache::SequenceId id, std::string_view salt = {});

// The objects in a session file's bytes, checked each for itself: kCorruptData says where not.
Result<std::vector<std::span<const std::byte>>> split_session(std::span<const std::byte> bytes);

}  // namespace kvant::serve
