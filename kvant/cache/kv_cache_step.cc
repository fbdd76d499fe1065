// Steps of KvCache: reserve, publish, give back (ADR 0001).
#include <algorithm>
#include <string>

#include "kvant/base/check.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/kv_cache_state.h"

namespace kvant::cache {

StepPages step_pages(const GroupPlan& group, int page_tokens, int64_t length, int64_t new_tokens) {
  const int64_t after = length + new_tokens;
  StepPages pages;
  pages.first = length / page_tokens;
  pages.begin = (length + page_tokens - 1) / page_tokens;
  pages.end = (after + page_tokens - 1) / page_tokens;
  if (group.plain) return pages;
  // At rest, full pages more than R before the page of the next token are encoded.
  const int64_t never = group.sink ? 1 : 0;
  pages.close_begin = std::max(never, length / page_tokens - group.recent_pages);
  pages.close_end = std::max(pages.close_begin, after / page_tokens - group.recent_pages);
  return pages;
}

// ---- what may fail ----

Status KvCache::State::check_step(std::span<const StepSequence> items) const {
  KVANT_TRY(check_no_step());
  if (items.empty()) return Error(ErrorCode::kInvalidArgument, "a step needs a sequence");
  int64_t new_tokens = 0;
  std::vector<bool> seen(sequences.size(), false);
  for (const StepSequence& item : items) {
    KVANT_TRY(check_known(item.id));
    const std::string name = "sequence " + std::to_string(item.id);
    if (seen[item.id]) return Error(ErrorCode::kInvalidArgument, name + " is in the step twice");
    seen[item.id] = true;
    if (item.num_new_tokens < 1)
      return Error(ErrorCode::kInvalidArgument, name + " has no new tokens in the step");
    new_tokens += item.num_new_tokens;
    const int64_t length = sequences[item.id].length;
    if (length + item.num_new_tokens > plan.max_sequence_tokens) {
      return Error(ErrorCode::kResourceExhausted,
                   name + ": the context is full: " + std::to_string(length) + " tokens held, " +
                       std::to_string(item.num_new_tokens) + " new, room for " +
                       std::to_string(plan.max_sequence_tokens) + "; raise the context");
    }
    for (size_t g = 0; g < groups.size(); ++g) {
      const int64_t kept = plan.groups[g].kept_from(length / page_tokens(), page_tokens());
      if (groups[g].first_page[item.id] > kept)
        return Error(ErrorCode::kInvalidArgument, name +
                                                      ": pages inside the window of layer group " +
                                                      std::to_string(g) + " were not imported");
    }
  }
  if (new_tokens > config.max_step_tokens) {
    return Error(ErrorCode::kInvalidArgument,
                 std::to_string(new_tokens) + " new tokens in one step, at most " +
                     std::to_string(config.max_step_tokens) + " are possible; split the step");
  }
  return {};
}

std::vector<int64_t> KvCache::State::needed_pages(std::span<const StepSequence> items) const {
  std::vector<int64_t> needed(plan.classes.size(), 0);
  std::vector<uint32_t> shared;  // open pages to copy before they are written, one per writer
  for (size_t g = 0; g < groups.size(); ++g) {
    const GroupPlan& group = plan.groups[g];
    shared.clear();
    for (const StepSequence& item : items) {
      const int64_t length = sequences[item.id].length;
      const StepPages pages = step_pages(group, page_tokens(), length, item.num_new_tokens);
      const int64_t closes = pages.close_end - pages.close_begin;
      const int64_t staged =
          std::max<int64_t>(0, pages.close_end - std::max(pages.begin, pages.close_begin));
      needed[group.bf16_class] += pages.end - pages.begin - staged;
      if (closes > 0) needed[group.stored_class] += closes;
      if (length % page_tokens() == 0) continue;
      const PageEntry open = bf16(static_cast<int>(g), item.id)[pages.first];
      if (pool[0].references(group.bf16_class, open.slot) > 1) shared.push_back(open.slot);
    }
    // The last holder of a shared page writes in place.
    std::sort(shared.begin(), shared.end());
    for (size_t i = 0; i < shared.size();) {
      const size_t end =
          std::upper_bound(shared.begin() + i, shared.end(), shared[i]) - shared.begin();
      const int64_t holders = pool[0].references(group.bf16_class, shared[i]);
      needed[group.bf16_class] += std::min<int64_t>(end - i, holders - 1);
      i = end;
    }
  }
  return needed;
}

Status KvCache::State::check_free_pages(std::span<const int64_t> needed) const {
  for (size_t c = 0; c < needed.size(); ++c) {
    const int slab = static_cast<int>(c);
    if (needed[c] <= pool[0].free_slots(slab)) continue;
    return Error(ErrorCode::kResourceExhausted,
                 "the cache is full: the step needs " + std::to_string(needed[c]) + " pages of " +
                     std::to_string(plan.classes[c].page_bytes) + " bytes, " +
                     std::to_string(pool[0].free_slots(slab)) + " of " +
                     std::to_string(pool[0].num_slots(slab)) +
                     " are free; end a sequence, or raise the context");
  }
  return {};
}

// ---- what must not fail ----

void KvCache::State::unshare_open_page(int group, SequenceId id) {
  const int64_t page = sequences[id].length / page_tokens();
  if (sequences[id].length % page_tokens() == 0) return;
  PageEntry& entry = bf16(group, id)[page];
  const int slab = slab_class(group, kKindBf16);
  if (pool[0].references(slab, entry.slot) == 1) return;
  // Stays after an abort: the content is the same.
  const PageEntry copy = take(group, kKindBf16);
  memory->copy(pool[0].page(slab, copy.slot), pool[0].page(slab, entry.slot),
               plan.groups[group].bf16_page_bytes);
  drop(group, entry);
  entry = copy;
  if (stays_bf16(group, page)) stored(group, id)[page] = copy;
}

void KvCache::State::open_pages(int group, const StepSequence& item, uint32_t& next_staging) {
  const StepPages pages =
      step_pages(plan.groups[group], page_tokens(), sequences[item.id].length, item.num_new_tokens);
  PageEntry* stored_entries = stored(group, item.id);
  PageEntry* bf16_entries = bf16(group, item.id);
  unshare_open_page(group, item.id);
  for (int64_t page = pages.begin; page < pages.end; ++page) {
    const bool staged = pages.staged(page);
    bf16_entries[page] =
        staged ? PageEntry::make(kKindStaging, next_staging++) : take(group, kKindBf16);
    stored_entries[page] = stays_bf16(group, page) ? bf16_entries[page] : PageEntry::none();
  }
  for (int64_t page = pages.close_begin; page < pages.close_end; ++page) {
    stored_entries[page] = take(group, kKindStored);
    groups[group].closes.push_back({bf16_entries[page], stored_entries[page]});
  }
}

void KvCache::State::build_view(int group) {
  GroupState& state = groups[group];
  const GroupPlan& planned = plan.groups[group];
  state.sequences.clear();
  state.closes.clear();
  uint32_t next_staging = 0;
  int32_t row = 0;
  for (const StepSequence& item : step) {
    open_pages(group, item, next_staging);
    const int64_t length = sequences[item.id].length;
    const int64_t first_bf16 =
        std::max(state.first_page[item.id], length / page_tokens() - planned.recent_pages);
    state.sequences.push_back({.first_row = row,
                               .num_new_tokens = item.num_new_tokens,
                               .first_position = length,
                               .recent_pages = static_cast<int32_t>(planned.recent_pages),
                               .first_page = state.first_page[item.id],
                               .stored = stored(group, item.id),
                               .bf16_first_page = first_bf16,
                               .bf16 = bf16(group, item.id) + first_bf16});
    row += item.num_new_tokens;
  }
  KVANT_CHECK(next_staging <= planned.staging_slots, "staging holds every page that fills");
  state.view = {.page_tokens = page_tokens(),
                .num_kv_heads = planned.group.geometry.num_kv_heads,
                .head_dim = planned.group.geometry.head_dim,
                .window = planned.group.geometry.window,
                .strict = config.format.strict,
                .kinds = state.kinds,
                .sequences = state.sequences,
                .closes = state.closes,
                .layers = state.layer_params};
}

Result<std::vector<int64_t>> KvCache::needed_pages(std::span<const StepSequence> items) const {
  KVANT_TRY(state_->check_step(items));
  return state_->needed_pages(items);
}

Status KvCache::begin_step(std::span<const StepSequence> items) {
  State& s = *state_;
  KVANT_TRY(s.check_step(items));
  KVANT_TRY(s.check_free_pages(s.needed_pages(items)));
  s.step.assign(items.begin(), items.end());
  for (int g = 0; g < num_groups(); ++g) s.build_view(g);
  return {};
}

void KvCache::commit_step() {
  State& s = *state_;
  KVANT_CHECK(s.in_step(), "commit ends a step");
  for (const StepSequence& item : s.step) {
    const int64_t length = s.sequences[item.id].length;
    for (int g = 0; g < num_groups(); ++g) {
      const StepPages pages =
          step_pages(s.plan.groups[g], s.page_tokens(), length, item.num_new_tokens);
      for (int64_t page = pages.close_begin; page < pages.close_end; ++page) {
        s.drop(g, s.bf16(g, item.id)[page]);
        s.bf16(g, item.id)[page] = PageEntry::none();
      }
    }
    s.sequences[item.id].length += item.num_new_tokens;
    for (int g = 0; g < num_groups(); ++g) s.retire_window(g, item.id);
  }
  s.step.clear();
}

void KvCache::abort_step() {
  State& s = *state_;
  KVANT_CHECK(s.in_step(), "abort ends a step");
  for (const StepSequence& item : s.step) {
    const int64_t length = s.sequences[item.id].length;
    for (int g = 0; g < num_groups(); ++g) {
      const StepPages pages =
          step_pages(s.plan.groups[g], s.page_tokens(), length, item.num_new_tokens);
      for (int64_t page = pages.close_begin; page < pages.close_end; ++page) {
        s.drop(g, s.stored(g, item.id)[page]);
        s.stored(g, item.id)[page] = PageEntry::none();
      }
      for (int64_t page = pages.begin; page < pages.end; ++page) s.drop_page(g, item.id, page);
    }
  }
  s.step.clear();
}

}  // namespace kvant::cache
