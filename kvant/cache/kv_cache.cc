#include "kvant/cache/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/cache/fingerprint.h"
#include "kvant/cache/kv_cache_state.h"

namespace kvant::cache {

double CacheBytes::bits_per_value() const {
  if (values_now == 0) return 0.0;
  return 8.0 * static_cast<double>(stored_pages_now + bf16_pages_now) /
         static_cast<double>(values_now);
}

// ---- creation ----

namespace {

// Copies one vector of the quantisation plan into the tables and returns where it is now.
const float* copy_vector(const std::vector<float>& source, float*& next) {
  float* target = next;
  std::memcpy(target, source.data(), source.size() * sizeof(float));
  next += source.size();
  return target;
}

std::vector<formats::SideParams> side_params(const formats::SideFormat& side,
                                             const formats::SidePlan* plan,
                                             const LayerGeometry& geometry, float*& next) {
  std::vector<formats::SideParams> params(geometry.num_kv_heads);
  if (plan == nullptr) return params;
  const bool reads_scale =
      formats::format_info(side.base).global_scale != formats::GlobalScale::kNone;
  const float* bias = side.bias ? copy_vector(plan->bias, next) : nullptr;
  const float* smooth = side.smooth ? copy_vector(plan->smooth, next) : nullptr;
  for (int head = 0; head < geometry.num_kv_heads; ++head) {
    const int64_t offset = static_cast<int64_t>(head) * geometry.head_dim;
    if (reads_scale && !plan->global_scale.empty())
      params[head].global_scale = plan->global_scale[plan->global_scale.size() == 1 ? 0 : head];
    if (bias != nullptr) params[head].bias = bias + offset;
    if (smooth != nullptr) params[head].smooth = smooth + offset;
  }
  return params;
}

void fill_params(const CacheConfig& config, const GroupPlan& plan, GroupState& state,
                 float*& next) {
  for (size_t i = 0; i < plan.group.layers.size(); ++i) {
    const formats::LayerPlan* layer =
        config.plan == nullptr ? nullptr : &config.plan->layers[plan.group.layers[i]];
    const auto k =
        side_params(plan.k[i], layer == nullptr ? nullptr : &layer->k, plan.group.geometry, next);
    const auto v =
        side_params(plan.v[i], layer == nullptr ? nullptr : &layer->v, plan.group.geometry, next);
    state.k_params.insert(state.k_params.end(), k.begin(), k.end());
    state.v_params.insert(state.v_params.end(), v.begin(), v.end());
  }
  const size_t heads = plan.group.geometry.num_kv_heads;
  for (size_t i = 0; i < plan.group.layers.size(); ++i) {
    state.layer_params.push_back({std::span(state.k_params).subspan(i * heads, heads),
                                  std::span(state.v_params).subspan(i * heads, heads)});
  }
}

void fill_kinds(const GroupPlan& plan, const PagePool& pool, std::byte* staging, Layout layout,
                GroupState& state) {
  state.kinds[kKindBf16] = {.base = pool.base(plan.bf16_class),
                            .page_bytes = plan.bf16_page_bytes,
                            .layout = layout,
                            .layer_offset = plan.bf16_offset,
                            .units = plan.bf16_units,
                            .k_format = plan.bf16,
                            .v_format = plan.bf16};
  state.kinds[kKindStored] = {.base = plan.plain ? nullptr : pool.base(plan.stored_class),
                              .page_bytes = plan.stored_page_bytes,
                              .layout = layout,
                              .layer_offset = plan.stored_offset,
                              .units = plan.stored_units,
                              .k_format = plan.k,
                              .v_format = plan.v};
  state.kinds[kKindStaging] = {.base = staging,
                               .page_bytes = plan.staging_page_bytes,
                               .layout = layout,
                               .layer_offset = plan.staging_offset,
                               .units = plan.bf16_units,
                               .k_format = plan.bf16,
                               .v_format = plan.bf16};
}

}  // namespace

Result<std::unique_ptr<KvCache>> KvCache::create(const CacheConfig& config,
                                                 MemoryResource& memory) {
  std::unique_ptr<KvCache> cache(new KvCache());
  cache->state_ = std::make_unique<State>();
  State& s = *cache->state_;
  s.config = config;
  s.memory = &memory;
  KVANT_ASSIGN(s.plan, make_cache_plan(config));
  KVANT_ASSIGN(s.tables, Buffer::create(memory, s.plan.bytes.tables, MemoryUse::kTables));
  if (s.plan.staging_bytes > 0) {
    KVANT_ASSIGN(s.staging, Buffer::create(memory, s.plan.staging_bytes, MemoryUse::kPages));
  }
  KVANT_ASSIGN(PagePool pool, PagePool::create(s.plan.classes, memory, s.tables.data()));
  s.pool.push_back(std::move(pool));

  s.sequences.resize(config.max_sequences);
  s.groups.resize(s.plan.groups.size());
  std::byte* next_table = s.tables.data() + s.plan.pool_bytes;
  float* next_param = reinterpret_cast<float*>(next_table + s.plan.entry_bytes);
  const int64_t table_entries = config.max_sequences * s.plan.pages_per_sequence;
  for (size_t g = 0; g < s.groups.size(); ++g) {
    GroupState& group = s.groups[g];
    group.stored = reinterpret_cast<PageEntry*>(next_table);
    group.bf16 = group.stored + table_entries;
    next_table += 2 * table_entries * static_cast<int64_t>(sizeof(PageEntry));
    group.first_page.resize(config.max_sequences);
    fill_params(config, s.plan.groups[g], group, next_param);
    fill_kinds(s.plan.groups[g], s.pool[0], s.staging.data(), config.layout, group);
  }
  s.fingerprint = cache_fingerprint(config);
  s.config.plan = nullptr;  // copied from; the caller may free it
  return cache;
}

KvCache::~KvCache() = default;

// ---- pages ----

Status KvCache::State::check_known(SequenceId id) const {
  if (known(id)) return {};
  return Error(ErrorCode::kInvalidArgument, "no sequence " + std::to_string(id) + " in the cache");
}

Status KvCache::State::check_no_step() const {
  if (!in_step()) return {};
  return Error(ErrorCode::kInvalidArgument,
               "a step is running: commit or abort it before the cache changes");
}

int64_t KvCache::State::num_pages(SequenceId id) const {
  int64_t length = sequences[id].length;
  for (const StepSequence& item : step) {
    if (item.id == id) length += item.num_new_tokens;
  }
  return (length + page_tokens() - 1) / page_tokens();
}

PageEntry KvCache::State::take(int group, uint32_t kind) {
  ++(kind == kKindBf16 ? groups[group].bf16_in_use : groups[group].stored_in_use);
  return PageEntry::make(kind, pool[0].allocate(slab_class(group, kind)));
}

void KvCache::State::share(int group, PageEntry entry) {
  if (entry.valid()) pool[0].retain(slab_class(group, entry.kind), entry.slot);
}

void KvCache::State::drop(int group, PageEntry entry) {
  if (!entry.valid() || entry.kind == kKindStaging) return;
  if (pool[0].release(slab_class(group, entry.kind), entry.slot))
    --(entry.kind == kKindBf16 ? groups[group].bf16_in_use : groups[group].stored_in_use);
}

void KvCache::State::drop_page(int group, SequenceId id, int64_t page) {
  PageEntry& stored_entry = stored(group, id)[page];
  PageEntry& bf16_entry = bf16(group, id)[page];
  if (stored_entry.kind == kKindStored) drop(group, stored_entry);
  drop(group, bf16_entry);
  stored_entry = bf16_entry = PageEntry::none();
}

void KvCache::State::retire_window(int group, SequenceId id) {
  const int64_t length = sequences[id].length;
  const int64_t keep = plan.groups[group].kept_from(length / page_tokens(), page_tokens());
  int64_t& first = groups[group].first_page[id];
  for (; first < keep; ++first) drop_page(group, id, first);
}

// ---- sequences ----

Result<SequenceId> KvCache::add_sequence() {
  State& s = *state_;
  KVANT_TRY(s.check_no_step());
  for (SequenceId id = 0; id < static_cast<SequenceId>(s.sequences.size()); ++id) {
    if (s.sequences[id].used) continue;
    s.sequences[id] = {.used = true, .length = 0};
    for (GroupState& group : s.groups) group.first_page[id] = 0;
    return id;
  }
  return Error(ErrorCode::kResourceExhausted,
               "all " + std::to_string(s.sequences.size()) +
                   " sequences of the cache are in use; remove one or raise max_sequences");
}

Result<SequenceId> KvCache::fork(SequenceId id) {
  State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_ASSIGN(const SequenceId copy, add_sequence());
  s.sequences[copy].length = s.sequences[id].length;
  for (int g = 0; g < num_groups(); ++g) {
    const int64_t first = s.groups[g].first_page[copy] = s.groups[g].first_page[id];
    for (int64_t page = first; page < s.num_pages(id); ++page) {
      const PageEntry stored = s.stored(g, copy)[page] = s.stored(g, id)[page];
      const PageEntry bf16 = s.bf16(g, copy)[page] = s.bf16(g, id)[page];
      if (stored.kind == kKindStored) s.share(g, stored);
      s.share(g, bf16);
    }
  }
  return copy;
}

void KvCache::remove_sequence(SequenceId id) {
  State& s = *state_;
  KVANT_CHECK(s.known(id) && !s.in_step(), "a known sequence is removed between steps");
  for (int g = 0; g < num_groups(); ++g) {
    for (int64_t page = s.groups[g].first_page[id]; page < s.num_pages(id); ++page)
      s.drop_page(g, id, page);
    s.groups[g].first_page[id] = 0;
  }
  s.sequences[id] = {};
}

int64_t KvCache::length(SequenceId id) const {
  KVANT_CHECK(state_->known(id), "length of a known sequence");
  return state_->sequences[id].length;
}

// A sequence can be cut to `length` if the next query then finds every page it may read, in the
// kind in which it would find it had the sequence never been longer.
bool KvCache::State::can_have_length(SequenceId id, int64_t length) const {
  const int64_t full = length / page_tokens();
  const int64_t end = (length + page_tokens() - 1) / page_tokens();
  for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
    const GroupPlan& group = plan.groups[g];
    const int64_t kept = group.kept_from(full, page_tokens());
    if (kept < groups[g].first_page[id] && length > 0) return false;
    // The open page and the recent ones must still be BF16.
    for (int64_t page = std::max(kept, full - group.recent_pages); page < end; ++page) {
      if (!bf16(g, id)[page].valid()) return false;
    }
  }
  return true;
}

Result<int64_t> KvCache::truncate(SequenceId id, int64_t length) {
  State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_TRY(s.check_no_step());
  if (length < 0)
    return Error(ErrorCode::kInvalidArgument,
                 "cannot truncate to " + std::to_string(length) + " tokens");
  const int64_t old_pages = s.num_pages(id);
  int64_t remain = std::min(length, s.sequences[id].length);
  if (remain == s.sequences[id].length) return remain;
  while (remain > 0 && !s.can_have_length(id, remain))
    remain = (remain - 1) / s.page_tokens() * s.page_tokens();
  const int64_t new_pages = (remain + s.page_tokens() - 1) / s.page_tokens();
  for (int g = 0; g < num_groups(); ++g) {
    int64_t& first = s.groups[g].first_page[id];
    for (int64_t page = std::max(first, new_pages); page < old_pages; ++page)
      s.drop_page(g, id, page);
    first = std::min(first, new_pages);
  }
  s.sequences[id].length = remain;
  return remain;
}

// ---- facts ----

int KvCache::num_groups() const {
  return static_cast<int>(state_->groups.size());
}
const LayerGroup& KvCache::group(int index) const {
  return state_->plan.groups[index].group;
}
KvCache::LayerPlace KvCache::place(int layer) const {
  return state_->plan.places[layer];
}
const CacheConfig& KvCache::config() const {
  return state_->config;
}
std::span<const uint8_t, 16> KvCache::fingerprint() const {
  return state_->fingerprint;
}

const GroupView& KvCache::view(int group) const {
  KVANT_CHECK(state_->in_step(), "views exist between begin_step and commit or abort");
  return state_->groups[group].view;
}

int KvCache::num_page_classes() const {
  return state_->pool[0].num_classes();
}
KvCache::PageClass KvCache::page_class(int index) const {
  return {.page_bytes = state_->plan.classes[index].page_bytes,
          .num_pages = state_->pool[0].num_slots(index),
          .free_pages = state_->pool[0].free_slots(index)};
}
int KvCache::closed_page_class(int group, int64_t page) const {
  return state_->slab_class(group, state_->closed_kind(group, page));
}

CacheBytes KvCache::bytes() const {
  const State& s = *state_;
  CacheBytes bytes = s.plan.bytes;
  bytes.held_pages_now = static_cast<int64_t>(s.held_pages.size() - s.held_free.size());
  bytes.held_bytes_now = s.held_bytes;
  for (const SequenceState& sequence : s.sequences) bytes.tokens_now += sequence.length;
  for (size_t g = 0; g < s.groups.size(); ++g) {
    const GroupPlan& plan = s.plan.groups[g];
    const GroupState& group = s.groups[g];
    bytes.stored_pages_now += group.stored_in_use * plan.stored_page_bytes;
    bytes.bf16_pages_now += group.bf16_in_use * plan.bf16_page_bytes;
    const int64_t values_per_token = static_cast<int64_t>(plan.group.layers.size()) * 2 *
                                     plan.group.geometry.num_kv_heads *
                                     plan.group.geometry.head_dim;
    for (size_t id = 0; id < s.sequences.size(); ++id) {
      if (!s.sequences[id].used) continue;
      const int64_t held = s.sequences[id].length - group.first_page[id] * s.page_tokens();
      bytes.values_now += held * values_per_token;
    }
  }
  return bytes;
}

}  // namespace kvant::cache
