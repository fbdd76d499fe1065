// Who runs: admission, preemption, and how requests end.
#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/serve/engine_state.h"

namespace kvant::serve {

namespace {

// Waiting requests that are looked at in one step, so that a long queue costs no time.
constexpr size_t kMaxLookedAt = 64;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

// ---- admission ----

// Tokens that may come from the prefix cache: whole pages, never the last known token, whose logits
// are wanted; none where the logits of the whole prompt are.
int64_t Engine::State::cacheable_tokens(const Sequence& sequence) const {
  if (tree == nullptr || sequence.scores_prompt()) return 0;
  return sequence.known() - 1;
}

// True if a request that runs has the next page of this one, behind the cached ones, still to
// compute: then it is cheaper to wait for it.
bool Engine::State::shares_running_prefix(const Sequence& sequence, int64_t cached_tokens) const {
  const int64_t next_page = cached_tokens + options.runtime.page_tokens;
  if (next_page > cacheable_tokens(sequence)) return false;
  return std::ranges::any_of(running, [&](const SequencePtr& other) {
    if (other->known() < next_page || other->computed >= next_page) return false;
    if (other->request.cache_salt != sequence.request.cache_salt) return false;
    return std::equal(sequence.tokens.begin(), sequence.tokens.begin() + next_page,
                      other->tokens.begin());
  });
}

WaitingView Engine::State::waiting_view(size_t index, Clock::time_point now) {
  const Sequence& sequence = *waiting[index];
  WaitingView view;
  view.priority = sequence.request.priority;
  view.tenant_share = fair_share.served(sequence.request.tenant);
  view.waited_seconds = seconds_between(sequence.submitted, now);
  if (const int64_t most = cacheable_tokens(sequence); most > 0) {
    const int64_t pages = tree->match(sequence.tokens, sequence.request.cache_salt, most).num_pages;
    view.cached_tokens = options.runtime.page_tokens * pages;
    view.deferred =
        shares_running_prefix(sequence, view.cached_tokens) || waits_for_load(index, pages, now);
  }
  view.missing_tokens = sequence.known() - view.cached_tokens;
  return view;
}

// Free pages, or ones that the tree can give back, for all that is known of the requests that run
// and of this one, and for its next page: what is admitted should not be preempted at once.
bool Engine::State::has_room(const Sequence& sequence, int64_t cached_tokens) const {
  std::vector<int64_t> needed(static_cast<size_t>(cache->num_page_classes()), 0);
  const auto count = [&](int64_t from_tokens, int64_t to_tokens) {
    const int64_t begin =
        (from_tokens + options.runtime.page_tokens - 1) / options.runtime.page_tokens;
    const int64_t end = to_tokens / options.runtime.page_tokens + 1;
    for (int group = 0; group < cache->num_groups(); ++group) {
      const int64_t first = std::max(begin, cache->first_needed_page(group, end));
      for (int64_t page = first; page < end; ++page) {
        ++needed[static_cast<size_t>(cache->closed_page_class(group, page))];
      }
    }
  };
  for (const SequencePtr& other : running) count(other->computed, other->known());
  count(cached_tokens, sequence.known());
  for (int c = 0; c < cache->num_page_classes(); ++c) {
    const cache::KvCache::PageClass pages = cache->page_class(c);
    const int64_t evictable = tree == nullptr ? 0 : tree->evictable_pages(c);
    const auto spare =
        static_cast<int64_t>(options.watermark * static_cast<double>(pages.num_pages));
    if (needed[static_cast<size_t>(c)] + spare > pages.free_pages + evictable) return false;
  }
  return true;
}

void Engine::State::admit() {
  while (!waiting.empty() && static_cast<int>(running.size()) < options.runtime.max_sequences) {
    const Clock::time_point now = Clock::now();
    std::vector<WaitingView> views;
    for (size_t i = 0; i < std::min(waiting.size(), kMaxLookedAt); ++i) {
      views.push_back(waiting_view(i, now));
    }
    const std::optional<size_t> chosen = choose_waiting(views, options.max_overtaking_seconds);
    if (!chosen) break;
    // Alone it always fits: a sequence of full length does.
    if (!running.empty() && !has_room(*waiting[*chosen], views[*chosen].cached_tokens)) break;
    SequencePtr sequence = std::move(waiting[*chosen]);
    waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(*chosen));
    if (Status begun = start(*sequence); !begun) {
      finish(std::move(sequence), FinishReason::kError, std::move(begun).error());
      continue;
    }
    running.push_back(std::move(sequence));
  }
  all_wait = running.empty() && !waiting.empty();
}

// Gives it a sequence of the cache that begins with what the tree has of its tokens.
Status Engine::State::start(Sequence& sequence) {
  KVANT_ASSIGN(sequence.id, cache->add_sequence());
  sequence.admission = ++admissions;
  sequence.computed = 0;
  if (const int64_t most = cacheable_tokens(sequence); most > 0) {
    sequence.lease = tree->acquire(tree->match(sequence.tokens, sequence.request.cache_salt, most));
    install_loaded(sequence, most);
    KVANT_TRY(tree->attach(sequence.lease, *sequence.id));
    sequence.computed = cache->length(*sequence.id);
  }
  // The first token has no predecessor that would give it a probability.
  if (sequence.scores_prompt()) sequence.prompt_record.logprobs.assign(1, {});
  if (sequence.record.queue_seconds >= 0) return {};  // was preempted
  sequence.record.queue_seconds = seconds_between(sequence.submitted, Clock::now());
  sequence.record.cached_tokens = sequence.computed;
  if (tree != nullptr) {
    tree->count_query(sequence.prompt_tokens, sequence.computed);
    observer->on_lookup(sequence.prompt_tokens, sequence.computed);
  }
  fair_share.charge(sequence.request.tenant, sequence.prompt_tokens - sequence.computed);
  return {};
}

// ---- room ----

// Evicts pages of the tree until the step fits; false if it cannot.
bool Engine::State::make_room(std::span<const cache::StepSequence> step) {
  const Result<std::vector<int64_t>> needed = cache->needed_pages(step);
  if (!needed) return true;  // no matter of pages: the step itself will say it
  if (tree != nullptr) return tree->make_room(*needed);
  for (int c = 0; c < cache->num_page_classes(); ++c) {
    if ((*needed)[static_cast<size_t>(c)] > cache->page_class(c).free_pages) return false;
  }
  return true;
}

// Its full pages stay in the tree for as long as there is room, so that resuming is often a hit.
void Engine::State::preempt(size_t index) {
  SequencePtr sequence = std::move(running[index]);
  running.erase(running.begin() + static_cast<std::ptrdiff_t>(index));
  release(*sequence);
  cancel_loading(*sequence);  // its pages may go down from here
  ++sequence->record.num_preemptions;
  ++totals.preemptions;
  observer->on_preemption();
  const auto later = std::ranges::find_if(
      waiting, [&](const SequencePtr& other) { return other->number > sequence->number; });
  waiting.insert(later, std::move(sequence));
}

void Engine::State::release(Sequence& sequence) {
  if (!sequence.id) return;
  cache->remove_sequence(*sequence.id);
  sequence.id.reset();
  sequence.lease = {};
  sequence.computed = 0;
}

// ---- the end ----

void Engine::State::finish(SequencePtr sequence, FinishReason reason, std::optional<Error> error) {
  release(*sequence);
  cancel_loading(*sequence);
  fair_share.leave(sequence->request.tenant);
  FinishRecord& record = sequence->record;
  record.reason = reason;
  record.error = std::move(error);
  record.total_seconds = seconds_between(sequence->submitted, Clock::now());
  observer->on_finish(record, sequence->request.sampling);
  tell_finish(*sequence);
  const std::lock_guard lock(mutex);
  if (--in_engine == 0) idle.notify_all();
}

void Engine::State::tell_finish(Sequence& sequence) {
  try {
    sequence.request.listener->on_finish(sequence.record);
  } catch (const std::exception&) {
    // It was told; what it makes of that is its own affair, and others are waiting.
  }
}

}  // namespace kvant::serve
