// What identifies a model's weights: a hash of the file's tensors, remembered between runs.
// Thread-safe (reads the file system only).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "kvant/base/result.h"
#include "kvant/model/config.h"
#include "kvant/model/source.h"

namespace kvant::model {

using Sha256 = std::array<uint8_t, 32>;

Sha256 sha256(std::string_view bytes);
std::string to_hex(const Sha256& digest);

// SHA-256 over names, types, shapes and bytes of all tensors, in order of their names
// (codecs.md section 5). Takes about a second per gigabyte, so the result is kept in `cache_dir`
// under the file's size, modification time and inode; an unusable cache directory only costs time.
// Of weights that are re-quantised while they are loaded: a hash of that and how. Of random
// weights: of their configuration and type.
Result<Sha256> weights_id(const ModelSource& source, const std::string& cache_dir);

// $XDG_CACHE_HOME/kvant, else $HOME/.cache/kvant, else empty: nothing is kept.
std::string default_cache_dir();

// Everything but the weights that decides what a page's bytes mean: geometry and RoPE. Canonical
// JSON.
std::string identity_json(const ModelConfig& config);

}  // namespace kvant::model
