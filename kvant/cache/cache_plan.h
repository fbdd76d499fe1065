// From a CacheConfig to everything that create() will allocate: groups, page kinds, slab classes,
// tables.
//
// plan_cache_bytes and KvCache::create both start here, so that the plan is exact by construction.
// Internal to kvant/cache.
#pragma once

#include <cstdint>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/page_pool.h"

namespace kvant::cache {

struct GroupPlan {
  LayerGroup group;
  std::vector<formats::SideFormat> k, v;  // stored formats, [layers of the group]
  std::vector<formats::SideFormat> bf16;  // plain BF16, [layers of the group]
  std::vector<formats::UnitSections> stored_units, bf16_units;
  std::vector<int64_t> stored_offset, bf16_offset, staging_offset;
  int64_t stored_page_bytes = 0, bf16_page_bytes = 0, staging_page_bytes = 0;
  bool plain = false;        // full pages stay BF16: nothing is ever encoded
  bool sink = false;         // page 0 stays BF16
  int64_t recent_pages = 0;  // R of view.h
  int64_t stored_slots = 0, bf16_slots = 0, staging_slots = 0;
  int stored_class = -1, bf16_class = -1;  // slab classes; stored_class is -1 if plain

  // First page that a query in page `full_pages` or later may read.
  int64_t kept_from(int64_t full_pages, int page_tokens) const {
    if (group.geometry.window == 0) return 0;
    const int64_t token = full_pages * page_tokens - group.geometry.window + 1;
    return token <= 0 ? 0 : token / page_tokens;
  }
};

struct CachePlan {
  std::vector<GroupPlan> groups;
  std::vector<KvCache::LayerPlace> places;  // [layers]
  std::vector<PagePool::ClassSpec> classes;
  int64_t max_sequence_tokens = 0;
  int64_t pages_per_sequence = 0;  // entries of one page table
  int64_t staging_bytes = 0;
  int64_t pool_bytes = 0;   // of the tables: counts and lists of the pool
  int64_t entry_bytes = 0;  // of the tables: page tables
  int64_t param_bytes = 0;  // of the tables: vectors copied from the quantisation plan
  CacheBytes bytes;         // *_reserved, staging and tables
};

Result<CachePlan> make_cache_plan(const CacheConfig& config);

// Format of one layer of the model.
const formats::CacheFormat& layer_format(const CacheConfig& config, int layer);

// Bytes of bias and smooth vectors that this layer's formats read from the plan.
int64_t layer_param_floats(const CacheConfig& config, int layer);

}  // namespace kvant::cache
