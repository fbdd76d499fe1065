// Pages from lower tiers: asked for while a request waits, put into the tree when it starts.
#include <algorithm>
#include <chrono>
#include <utility>

#include "kvant/serve/engine_state.h"

namespace kvant::serve {

// True if the request should wait for pages that are on their way, or for another's.
bool Engine::State::waits_for_load(size_t index, int64_t matched_pages, Clock::time_point now) {
  Sequence& sequence = *waiting[index];
  if (tiers == nullptr || index >= static_cast<size_t>(options.runtime.max_sequences)) {
    return tiers != nullptr;
  }
  Sequence::Loading& loading = sequence.loading;
  if (loading.id) {
    if (tiers->ready(*loading.id)) return false;
    if (now - loading.since < std::chrono::duration<double>(options.max_load_seconds)) return true;
    tiers->give_up(*std::exchange(loading.id, std::nullopt));  // a miss
    return false;
  }
  if (loading.asked_from == matched_pages) return false;  // no tier had them
  const int64_t page_tokens = options.runtime.page_tokens;
  const int64_t end = cacheable_tokens(sequence) / page_tokens;
  if (matched_pages >= end) return false;
  if (shares_loading_prefix(index, (matched_pages + 1) * page_tokens)) return true;
  const auto missing = std::span(sequence.tokens)
                           .subspan(static_cast<size_t>(matched_pages * page_tokens),
                                    static_cast<size_t>((end - matched_pages) * page_tokens));
  loading.asked_from = matched_pages;
  loading.since = now;
  loading.id = tiers->prefetch(
      {.first_page = matched_pages,
       .parent_key = tree->key(
           tree->match(sequence.tokens, sequence.request.cache_salt, matched_pages * page_tokens)),
       .tokens = {missing.begin(), missing.end()},
       .salt = sequence.request.cache_salt});
  return !tiers->ready(*loading.id);
}

// True if an earlier request is loading the page that ends at `next_page`.
bool Engine::State::shares_loading_prefix(size_t index, int64_t next_page) const {
  const Sequence& sequence = *waiting[index];
  const auto same_page = [&](const SequencePtr& other) {
    return other->loading.id && other->known() >= next_page &&
           other->request.cache_salt == sequence.request.cache_salt &&
           std::equal(sequence.tokens.begin(), sequence.tokens.begin() + next_page,
                      other->tokens.begin());
  };
  return std::any_of(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(index),
                     same_page);
}

// Extends the sequence's lease over what has come.
void Engine::State::install_loaded(Sequence& sequence, int64_t max_tokens) {
  if (tiers == nullptr || !sequence.loading.id) return;
  tiers->install(*sequence.loading.id, *tree, sequence.lease);
  sequence.loading = {};
  // Window groups may lack pages at the length that has come about.
  cache::PrefixLease usable =
      tree->acquire(tree->match(sequence.tokens, sequence.request.cache_salt, max_tokens));
  sequence.lease = std::move(usable);
}

void Engine::State::cancel_loading(Sequence& sequence) {
  if (tiers != nullptr && sequence.loading.id) tiers->cancel(*sequence.loading.id);
  sequence.loading = {};
}

void Engine::State::observe_cost(const StepRecord& record, double context_pairs) {
  if (record.prefill_tokens <= record.decode_tokens) return;  // tells little of prompts
  prefill_cost.observe(static_cast<double>(record.prefill_tokens), context_pairs,
                       record.model_seconds);
  cache::EvictionCosts costs;
  costs.token_seconds = prefill_cost.token_seconds();
  costs.token_context_seconds = prefill_cost.token_context_seconds();
  if (tree != nullptr) tree->set_costs(costs);
  if (tiers != nullptr && options.load_by_cost) tiers->set_costs(costs);
}

}  // namespace kvant::serve
