#include "kvant/serve/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <future>
#include <iterator>
#include <random>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/serve/engine_state.h"

namespace kvant::serve {

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled:
    case FinishReason::kDeadline:
    case FinishReason::kShutdown: return "abort";
    case FinishReason::kError: return "error";
  }
  return "error";
}

// ---- creation ----

namespace {

// More gain little: a step waits for its slowest row. Each holds some vectors of the vocabulary.
constexpr int kMostSamplingThreads = 8;
// How often deadlines are looked at while everything waits for lower tiers.
constexpr std::chrono::milliseconds kDeadlineInterval(20);

EngineObserver& silent_observer() {
  static EngineObserver silent;
  return silent;
}

Error bad_option(std::string text) {
  return Error(ErrorCode::kInvalidArgument, std::move(text));
}

Status check_options(const EngineOptions& options) {
  const model::RuntimeOptions& runtime = options.runtime;
  if (runtime.context_tokens < 2) {
    return bad_option(
        fmt::format("the longest sequence is {} tokens; expected at least 2: one of "
                    "prompt and one of answer",
                    runtime.context_tokens));
  }
  if (runtime.max_step_tokens < runtime.max_sequences) {
    return bad_option(fmt::format(
        "a step has {} tokens and {} sequences; it must have room for a token of each: raise the "
        "former or lower the latter",
        runtime.max_step_tokens, runtime.max_sequences));
  }
  if (runtime.total_tokens != 0 && runtime.total_tokens < runtime.context_tokens) {
    return bad_option(fmt::format(
        "the cache holds {} tokens, the longest sequence has {}; one of full length must fit: give "
        "the cache more memory or shorten the sequences",
        runtime.total_tokens, runtime.context_tokens));
  }
  if (options.watermark < 0 || options.watermark >= 1) {
    return bad_option(fmt::format("watermark is {}; expected 0 to below 1", options.watermark));
  }
  const SpeculationOptions& speculation = options.speculation;
  if (speculation.max_draft_tokens < 0 || speculation.lookup.min_ngram < 1 ||
      speculation.lookup.max_ngram < speculation.lookup.min_ngram) {
    return bad_option(fmt::format(
        "speculation with {} draft tokens and n-grams of {} to {} tokens; expected 0 or more draft "
        "tokens and n-grams of 1 or more, the shortest first",
        speculation.max_draft_tokens, speculation.lookup.min_ngram, speculation.lookup.max_ngram));
  }
  return {};
}

}  // namespace

void Engine::State::open_tiers(std::vector<TierSetup> setups, cache::PageObserver* page_observer) {
  tiers = std::make_unique<PageTiers>(*cache, std::move(setups));
  tree->set_listener(tiers.get());
  tiers->set_known_salts(options.known_salts);
  tiers->set_observer(page_observer);
  tiers->set_wakeup([this] {
    const std::lock_guard lock(mutex);
    tiers_done = true;
    wake.notify_one();
  });
}

Result<std::unique_ptr<Engine>> Engine::create(model::Model& model, const EngineOptions& options,
                                               EngineObserver* observer,
                                               cache::PageObserver* page_observer,
                                               std::vector<TierSetup> tiers) {
  KVANT_TRY(check_options(options));
  std::unique_ptr<Engine> engine(new Engine());
  engine->state_ = std::make_unique<State>();
  State& s = *engine->state_;
  s.options = options;
  s.model = &model;
  s.observer = observer == nullptr ? &silent_observer() : observer;
  if (!options.prefix_caching)
    s.options.runtime.held_sink_pages = s.options.runtime.held_windows = 0;
  KVANT_TRY(model.reserve(s.options.runtime));
  KVANT_ASSIGN(s.cache, model.create_cache(s.options.runtime, options.identity));
  s.options.runtime.plan = nullptr;  // was read; the caller may free it
  if (options.prefix_caching) {
    cache::PrefixTreeOptions tree_options;
    tree_options.policy = options.eviction;
    KVANT_ASSIGN(s.tree, cache::PrefixTree::create(*s.cache, tree_options));
    s.tree->set_observer(page_observer);
    if (!tiers.empty()) s.open_tiers(std::move(tiers), page_observer);
  } else if (!tiers.empty()) {
    return bad_option("pages are kept in lower tiers only with prefix caching; turn it on");
  }
  s.limits.vocab_size = model.config().vocab_size;
  s.ends.resize(static_cast<size_t>(s.limits.vocab_size));
  for (const int32_t id : options.end_ids) {
    if (id < 0 || id >= s.limits.vocab_size) {
      return bad_option(fmt::format("end-of-generation token {}; the vocabulary has {} tokens", id,
                                    s.limits.vocab_size));
    }
    s.ends[static_cast<size_t>(id)] = true;
  }
  s.sampling_pool = std::make_unique<ThreadPool>(
      options.sampling_threads > 0
          ? options.sampling_threads
          : std::min(kMostSamplingThreads, ThreadPool::available_processors()));
  s.sampling_workers.resize(static_cast<size_t>(s.sampling_pool->num_threads()));
  s.publish_stats();
  s.thread = std::thread([&s] {
    try {
      s.loop();
    } catch (const std::exception& exception) {
      s.fail(exception.what());
    }
  });
  return engine;
}

Engine::~Engine() {
  if (state_ == nullptr || !state_->thread.joinable()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->wake.notify_one();
  state_->thread.join();
}

// ---- any thread ----

Status Engine::check(const Request& request) const {
  const State& s = *state_;
  KVANT_CHECK(request.listener != nullptr, "a request has a listener");
  KVANT_TRY(request.sampling.check(s.limits));
  const auto length = static_cast<int64_t>(request.prompt.size());
  if (length < 1) {
    return Error(ErrorCode::kInvalidArgument, "the prompt is empty; give at least one token");
  }
  const int64_t longest = s.options.runtime.context_tokens;
  if (length >= longest) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("the prompt has {} tokens; the longest sequence has {}, the answer "
                             "included: shorten the prompt, or serve with a larger max_model_len",
                             length, longest));
  }
  for (const int32_t id : request.prompt) {
    if (id < 0 || id >= s.limits.vocab_size) {
      return Error(ErrorCode::kInvalidArgument,
                   fmt::format("token id {} in the prompt; the vocabulary has {} tokens", id,
                               s.limits.vocab_size));
    }
  }
  return {};
}

Result<RequestNumber> Engine::submit(Request request) {
  State& s = *state_;
  KVANT_TRY(check(request));
  auto sequence = std::make_unique<Sequence>();
  sequence->submitted = Clock::now();
  sequence->tokens = request.prompt;
  sequence->prompt_tokens = static_cast<int64_t>(request.prompt.size());
  sequence->record.prompt_tokens = sequence->prompt_tokens;
  const uint64_t seed = request.sampling.seed.value_or(std::random_device()());
  sequence->random = choice_random(seed, request.choice);
  if (request.constraint != nullptr) sequence->constraint = request.constraint->create();
  sequence->request = std::move(request);

  const std::lock_guard lock(s.mutex);
  if (s.failure) return *s.failure;
  if (s.draining || s.stopping) {
    return Error(ErrorCode::kCancelled, "the server is shutting down; ask another one");
  }
  if (const int64_t queued = s.in_engine - s.stats.running; queued >= s.options.max_waiting) {
    return Error(
        ErrorCode::kResourceExhausted,
        fmt::format("{} requests are waiting, the most that may; try again later", queued));
  }
  const RequestNumber number = ++s.last_number;
  sequence->number = number;
  ++s.in_engine;
  s.submitted.push_back(std::move(sequence));
  s.wake.notify_one();
  return number;
}

void Engine::cancel(RequestNumber number) {
  const std::lock_guard lock(state_->mutex);
  state_->cancelled.push_back(number);
  state_->wake.notify_one();
}

void Engine::drain(Clock::duration timeout) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  s.draining = true;
  if (s.idle.wait_for(lock, timeout, [&] { return s.in_engine == 0; })) return;
  s.ending_all = true;
  s.wake.notify_one();
  s.idle.wait(lock, [&] { return s.in_engine == 0; });
}

bool Engine::draining() const {
  const std::lock_guard lock(state_->mutex);
  return state_->draining || state_->failure;
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(state_->mutex);
  EngineStats stats = state_->stats;
  stats.waiting = std::max<int64_t>(0, state_->in_engine - stats.running);
  return stats;
}

Status Engine::run_between_steps(
    const std::function<void(cache::KvCache&, cache::PrefixTree*)>& work) {
  State& s = *state_;
  std::future<void> done;
  {
    const std::lock_guard lock(s.mutex);
    if (s.failure) return *s.failure;
    s.between_steps.emplace_back([&] {
      work(*s.cache, s.tree.get());
      s.publish_stats();  // whoever waited may look
    });
    done = s.between_steps.back().get_future();
  }
  s.wake.notify_one();
  try {
    done.get();
  } catch (const std::exception& exception) {  // its own, or the engine ended before its turn
    return Error(ErrorCode::kInternal, exception.what());
  }
  return {};
}

Status Engine::reset_prefix_cache() {
  return run_between_steps([](cache::KvCache& cache, cache::PrefixTree* tree) {
    if (tree == nullptr || tree->clear()) return;
    // What requests use must stay; the rest goes class by class.
    for (int c = 0; c < cache.num_page_classes(); ++c)
      tree->evict(c, cache.page_class(c).num_pages);
  });
}

const EngineOptions& Engine::options() const {
  return state_->options;
}
const model::Model& Engine::model() const {
  return *state_->model;
}
const SamplingLimits& Engine::limits() const {
  return state_->limits;
}

// ---- the loop ----

void Engine::State::loop() {
  while (true) {
    Inbox inbox = wait_for_work();
    const Clock::time_point begin = Clock::now();
    const bool stop = inbox.stopping;
    const bool end_everything = inbox.stopping || inbox.ending_all;
    if (tree != nullptr) tree->set_time(std::chrono::duration<double>(begin - started).count());
    take(std::move(inbox));
    if (end_everything) end_all(FinishReason::kShutdown);
    if (tiers != nullptr) tiers->poll();
    if (!stop) {
      end_expired();
      admit();
      if (!running.empty()) step();
    }
    totals.loop_seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    publish_stats();
    if (stop) break;
  }
  if (tiers == nullptr) return;
  tiers->store_all(*tree);
  tiers->wait_idle();
  tree->set_listener(nullptr);  // it outlives the tiers
}

Engine::State::Inbox Engine::State::wait_for_work() {
  std::unique_lock lock(mutex);
  const auto has_work = [&] {
    return stopping || ending_all || tiers_done || !submitted.empty() || !cancelled.empty() ||
           !between_steps.empty();
  };
  if (running.empty() && waiting.empty()) {
    wake.wait(lock, has_work);
  } else if (all_wait) {
    wake.wait_for(lock, kDeadlineInterval, has_work);
  }
  tiers_done = false;
  Inbox inbox{.submitted = std::move(submitted),
              .cancelled = std::move(cancelled),
              .between_steps = std::move(between_steps),
              .stopping = stopping,
              .ending_all = std::exchange(ending_all, false)};
  submitted.clear();
  cancelled.clear();
  between_steps.clear();
  return inbox;
}

void Engine::State::take(Inbox inbox) {
  for (BetweenSteps& work : inbox.between_steps) work();
  for (SequencePtr& sequence : inbox.submitted) {
    fair_share.arrive(sequence->request.tenant);
    waiting.push_back(std::move(sequence));
  }
  for (const RequestNumber number : inbox.cancelled) {
    for (std::vector<SequencePtr>* list : {&waiting, &running}) {
      const auto found = std::ranges::find_if(
          *list, [&](const SequencePtr& sequence) { return sequence->number == number; });
      if (found == list->end()) continue;
      SequencePtr sequence = std::move(*found);
      list->erase(found);
      finish(std::move(sequence), FinishReason::kCancelled);
    }
  }
}

// A bug: what cache and model are in the middle of is not known, so nothing goes on. Every request
// is told, and later ones are refused.
void Engine::State::fail(const char* what) {
  const Error error(ErrorCode::kInternal,
                    fmt::format("the engine has failed and takes no more requests: {}", what));
  std::vector<SequencePtr> ended;
  const auto take_from = [&ended](std::vector<SequencePtr>& list) {
    std::ranges::move(list, std::back_inserter(ended));
    list.clear();
  };
  take_from(waiting);
  take_from(running);
  {
    const std::lock_guard lock(mutex);
    failure = error;
    take_from(submitted);
    between_steps.clear();  // breaks their promises
  }
  for (const SequencePtr& sequence : ended) {
    if (sequence == nullptr) continue;  // the one that was being ended
    sequence->record.reason = FinishReason::kError;
    sequence->record.error = error;
    tell_finish(*sequence);
  }
  const std::lock_guard lock(mutex);
  in_engine = 0;
  idle.notify_all();
}

void Engine::State::end_expired() {
  const Clock::time_point now = Clock::now();
  for (std::vector<SequencePtr>* list : {&waiting, &running}) {
    for (size_t i = 0; i < list->size();) {
      const std::optional<Clock::time_point> deadline = (*list)[i]->request.deadline;
      if (!deadline || now < *deadline) {
        ++i;
        continue;
      }
      SequencePtr sequence = std::move((*list)[i]);
      list->erase(list->begin() + static_cast<std::ptrdiff_t>(i));
      finish(std::move(sequence), FinishReason::kDeadline);
    }
  }
}

void Engine::State::end_all(FinishReason reason) {
  for (std::vector<SequencePtr>* list : {&waiting, &running}) {
    for (SequencePtr& sequence : *list) finish(std::move(sequence), reason);
    list->clear();
  }
}

void Engine::State::publish_stats() {
  totals.running = static_cast<int64_t>(running.size());
  totals.cache = cache->bytes();
  // Requests wait for want of the class that is fullest; what the tree can give back is free.
  double fullest = -1;
  for (int c = 0; c < cache->num_page_classes(); ++c) {
    const cache::KvCache::PageClass pages = cache->page_class(c);
    if (pages.num_pages == 0) continue;
    const int64_t evictable = tree == nullptr ? 0 : tree->evictable_pages(c);
    const int64_t used = pages.num_pages - pages.free_pages - evictable;
    const double share = static_cast<double>(used) / static_cast<double>(pages.num_pages);
    if (share <= fullest) continue;
    fullest = share;
    totals.pages_total = pages.num_pages;
    totals.pages_used = used;
  }
  if (tree != nullptr) totals.tree = tree->stats();
  if (tiers != nullptr) {
    totals.tiers.clear();
    for (int i = 0; i < tiers->num_tiers(); ++i) {
      totals.tiers.push_back({tiers->tier(i).medium(), tiers->tier(i).stats()});
    }
    totals.prefetch = tiers->prefetch_stats();
  }
  const std::lock_guard lock(mutex);
  stats = totals;
}

}  // namespace kvant::serve
