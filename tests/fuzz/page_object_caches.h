// The caches that the fuzz target page_object imports into, and whose pages are its seeds.
#pragma once

#include <memory>
#include <vector>

#include "kvant/base/memory.h"
#include "kvant/cache/kv_cache.h"

namespace kvant::fuzz {

struct ImportCache {
  const char* name = "";
  std::unique_ptr<cache::KvCache> kv;  // one layer group, without +recentN
  cache::SequenceId two_pages = 0;     // a sequence of two full pages, always the same values
};

// Formats with block scales, means, a sink page, a window; all page sizes and layouts. `memory`
// outlives the caches.
std::vector<ImportCache> make_import_caches(MemoryResource& memory);

}  // namespace kvant::fuzz
