// One step: whose tokens, the model, what came out.
#include <algorithm>
#include <chrono>
#include <exception>
#include <string>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/serve/engine_state.h"

namespace kvant::serve {

namespace {

constexpr size_t kManyCandidates = 100;  // more take longer to choose from than a thread to wake

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

void Engine::State::step() {
  const Clock::time_point begin = Clock::now();
  const double model_before = totals.model_seconds;
  std::vector<Sequence*> batch = choose_batch();
  if (batch.empty()) return;
  StepRecord record;
  double context_pairs = 0;
  for (const Sequence* sequence : batch) {
    const auto rows = static_cast<double>(sequence->step.new_tokens);
    context_pairs += rows * (static_cast<double>(sequence->computed) + rows / 2);
    (sequence->step.new_tokens > 1 ? record.prefill_tokens : record.decode_tokens) +=
        sequence->step.new_tokens + static_cast<int64_t>(sequence->step.draft.size());
  }
  if (Status done = run(batch); done) {
    for (Sequence* sequence : batch) settle(*sequence);
  } else {
    run_alone(batch, std::move(done).error());
  }
  ++totals.steps;
  record.running = static_cast<int64_t>(running.size());
  record.waiting = static_cast<int64_t>(waiting.size());
  record.seconds = seconds_since(begin);
  record.model_seconds = totals.model_seconds - model_before;
  observe_cost(record, context_pairs);
  observer->on_step(record);
}

// ---- who takes part ----

// Shares the step's tokens out and makes room for their pages, at the cost of whom it must.
std::vector<Sequence*> Engine::State::choose_batch() {
  while (!running.empty()) {
    std::vector<Sequence*> batch = choose_rows();
    std::vector<cache::StepSequence> items;
    for (const Sequence* sequence : batch) {
      const size_t tokens =
          static_cast<size_t>(sequence->step.new_tokens) + sequence->step.draft.size();
      items.push_back({*sequence->id, static_cast<int32_t>(tokens)});
    }
    if (make_room(items)) return batch;
    if (running.size() == 1) {
      SequencePtr last = std::move(running.front());
      running.clear();
      finish(std::move(last), FinishReason::kError,
             Error(ErrorCode::kResourceExhausted,
                   "the cache is too small for this request alone; give it more memory"));
      return {};
    }
    std::vector<VictimView> views;
    for (const SequencePtr& sequence : running) {
      views.push_back({sequence->request.priority, sequence->admission});
    }
    preempt(choose_victim(views));
  }
  return {};
}

std::vector<Sequence*> Engine::State::choose_rows() {
  std::vector<RunningView> views;
  for (const SequencePtr& sequence : running) {
    propose_draft(*sequence);
    views.push_back({sequence->missing(), static_cast<int64_t>(sequence->step.draft.size())});
  }
  const std::vector<int64_t> shares = share_budget(views, options.runtime.max_step_tokens);
  std::vector<Sequence*> batch;
  for (size_t i = 0; i < running.size(); ++i) {
    if (shares[i] == 0) continue;
    Sequence& sequence = *running[i];
    sequence.step.new_tokens = std::min(shares[i], sequence.missing());
    sequence.step.draft.resize(static_cast<size_t>(shares[i] - sequence.step.new_tokens));
    batch.push_back(&sequence);
  }
  return batch;
}

// A page is closed when it is full, and closed pages are never taken back: drafts leave its last
// place free (codecs.md section 1).
void Engine::State::propose_draft(Sequence& sequence) {
  sequence.step = {};
  if (options.speculation.max_draft_tokens == 0 || sequence.missing() != 1) return;
  if (sequence.constraint != nullptr) return;
  const int64_t last_place =
      options.runtime.page_tokens - 1 - sequence.computed % options.runtime.page_tokens;
  const int64_t most = std::min<int64_t>({options.speculation.max_draft_tokens, last_place - 1,
                                          max_known(sequence) - sequence.known() - 1});
  sequence.step.draft = draft_by_lookup(sequence.tokens, most, options.speculation.lookup);
}

// So many tokens, the prompt's included, it may come to.
int64_t Engine::State::max_known(const Sequence& sequence) const {
  const std::optional<int>& max_tokens = sequence.request.sampling.max_tokens;
  if (!max_tokens) return options.runtime.context_tokens;
  return std::min<int64_t>(options.runtime.context_tokens, sequence.prompt_tokens + *max_tokens);
}

// ---- the model ----

Status Engine::State::run(std::span<Sequence* const> batch) {
  std::vector<model::ForwardSequence> items;
  std::vector<WantedRow> rows;
  for (Sequence* sequence : batch) {
    Sequence::Step& step = sequence->step;
    step.known = sequence->known();
    step.random = sequence->random;
    step.prompt_logprobs = sequence->prompt_record.logprobs.size();
    // Sampling appends while the model reads.
    sequence->tokens.reserve(static_cast<size_t>(step.known) + step.draft.size() + 1);
    const auto known =
        std::span(sequence->tokens)
            .subspan(static_cast<size_t>(sequence->computed), static_cast<size_t>(step.new_tokens));
    step.input.assign(known.begin(), known.end());
    step.input.insert(step.input.end(), step.draft.begin(), step.draft.end());
    const int64_t end = sequence->computed + static_cast<int64_t>(step.input.size());
    // Logits are wanted behind the last known token and each draft, or behind all.
    int64_t first = std::min(end, step.known - 1);
    if (sequence->scores_prompt()) first = sequence->computed;
    if (sequence->request.sampling.max_tokens == 0 && !sequence->scores_prompt()) first = end;
    for (int64_t position = first; position < end; ++position) rows.push_back({sequence, position});
    step.queries.clear();
    if (model->backend().info().has_queries) {
      step.queries = sequence->row_queries(end - first, limits.vocab_size);
    }
    items.push_back({.id = *sequence->id,
                     .tokens = step.input,
                     .num_logit_rows = static_cast<int>(end - first),
                     .only_greatest = sequence->takes_greatest(),
                     .queries = step.queries});
  }
  const Clock::time_point begin = Clock::now();
  double sampling_seconds = 0;
  Status done;
  try {
    done = model->forward(items, *cache, [&](std::span<const model::LogitsRow> turn) {
      const Clock::time_point sampling = Clock::now();
      Status sampled = sample_turn(turn, rows);
      sampling_seconds += seconds_since(sampling);
      return sampled;
    });
  } catch (const std::exception& exception) {
    done = Error(ErrorCode::kInternal, std::string("a step failed: ") + exception.what());
  }
  totals.model_seconds += seconds_since(begin) - sampling_seconds;
  if (!done) {
    for (Sequence* sequence : batch) sequence->undo_step();
  }
  return done;
}

// Which request an error belongs to is found by giving each a step of its own.
void Engine::State::run_alone(std::span<Sequence* const> batch, const Error& error) {
  for (Sequence* sequence : batch) {
    std::optional<Error> own = error;
    if (batch.size() > 1) {
      sequence->step.draft.clear();
      Status done = run(std::span(&sequence, 1));
      if (done) {
        settle(*sequence);
        continue;
      }
      own = std::move(done).error();
    }
    finish(take_running(*sequence), FinishReason::kError, std::move(own));
  }
}

// ---- what comes out ----

// Sequences side by side, the rows of one in order.
Status Engine::State::sample_turn(std::span<const model::LogitsRow> turn,
                                  std::span<const WantedRow> rows) {
  struct Part {
    Sequence* sequence;
    size_t begin;  // in `turn`
    size_t end;
    Status done;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < turn.size(); ++i) {
    Sequence* const sequence = rows[static_cast<size_t>(turn[i].index)].sequence;
    if (parts.empty() || parts.back().sequence != sequence) parts.push_back({sequence, i, i, {}});
    parts.back().end = i + 1;
  }
  const auto sample_part = [&](Part& part, SamplingWorker& worker) {
    for (size_t i = part.begin; i < part.end && part.done; ++i) {
      const int64_t position = rows[static_cast<size_t>(turn[i].index)].position;
      part.done = sample(*part.sequence, position, turn[i], worker);
    }
  };
  // What the device has chosen, or nearly, is not worth waking a thread for.
  const auto has_work = [](const model::LogitsRow& row) {
    return !row.logits.empty() || row.candidates.size() > kManyCandidates;
  };
  if (std::ranges::any_of(turn, has_work)) {
    sampling_pool->parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t part, int worker) {
      sample_part(parts[static_cast<size_t>(part)], sampling_workers[static_cast<size_t>(worker)]);
    });
  } else {
    for (Part& part : parts) sample_part(part, sampling_workers.front());
  }
  for (Part& part : parts) KVANT_TRY(std::move(part.done));
  return {};
}

Status Engine::State::sample(Sequence& sequence, int64_t position, const model::LogitsRow& row,
                             SamplingWorker& worker) {
  if (position + 1 < sequence.prompt_tokens) {
    sequence.prompt_record.logprobs.push_back(
        sampler_of(worker).score(row.logits, sequence.tokens[static_cast<size_t>(position) + 1],
                                 *sequence.request.sampling.prompt_logprobs));
    return {};
  }
  if (sequence.request.sampling.max_tokens == 0) return {};
  // Behind a draft that the model did not choose there is nothing to choose.
  if (position != sequence.known() - 1) return {};
  const auto draft_index = static_cast<size_t>(position - sequence.step.known);
  if (position >= sequence.step.known &&
      sequence.step.draft[draft_index] != sequence.tokens.back()) {
    return {};
  }
  SampledToken token;
  if (row.choice.found()) {
    token.id = sampler_of(worker).choose(row.choice, row.candidates, sequence.request.sampling,
                                         sequence.random);
  } else if (row.logits.empty()) {
    token.id = row.greatest.index;
  } else {
    KVANT_ASSIGN(token, choose(sequence, row.logits, worker));
  }
  sequence.tokens.push_back(token.id);
  sequence.step.sampled.push_back(std::move(token));
  return {};
}

Result<SampledToken> Engine::State::choose(Sequence& sequence, std::span<const float> logits,
                                           SamplingWorker& worker) {
  std::span<const uint32_t> allowed;
  if (sequence.constraint != nullptr) {
    worker.bitmask.resize((static_cast<size_t>(limits.vocab_size) + 31) / 32);
    sequence.constraint->allowed(worker.bitmask);
    allowed = worker.bitmask;
  }
  return sampler_of(worker).sample(
      {.logits = logits,
       .params = &sequence.request.sampling,
       .tokens = sequence.tokens,
       .num_prompt_tokens = static_cast<size_t>(sequence.prompt_tokens),
       .bitmask = allowed,
       .random = &sequence.random});
}

RowSampler& Engine::State::sampler_of(SamplingWorker& worker) const {
  if (worker.sampler == nullptr) {
    worker.sampler = std::make_unique<RowSampler>(limits.vocab_size, options.end_ids);
  }
  return *worker.sampler;
}

// After a step that succeeded. May end the request, which is gone then.
void Engine::State::settle(Sequence& sequence) {
  Sequence::Step& step = sequence.step;
  const auto num_drafts = static_cast<int64_t>(step.draft.size());
  sequence.computed += step.new_tokens;
  if (num_drafts > 0) {
    const auto accepted = static_cast<int64_t>(step.sampled.size()) - 1;
    sequence.record.drafted_tokens += num_drafts;
    sequence.record.accepted_tokens += accepted;
    sequence.computed += accepted;
    if (accepted < num_drafts) {
      const Result<int64_t> left = cache->truncate(*sequence.id, sequence.computed);
      KVANT_CHECK(left && *left == sequence.computed, "drafts stay within the open page");
    }
  }
  std::optional<Ending> ending;
  if (Status published = publish_pages(sequence); !published) {
    ending = Ending{FinishReason::kError, std::move(published).error()};
  } else if (sequence.computed >= sequence.prompt_tokens) {
    ending = hand_over(sequence);
  }
  if (!ending) return;
  finish(take_running(sequence), ending->reason, std::move(ending->error));
}

Status Engine::State::publish_pages(Sequence& sequence) {
  if (tree == nullptr ||
      sequence.computed / options.runtime.page_tokens <= sequence.lease.num_pages()) {
    return {};
  }
  return tree->insert(sequence.lease, *sequence.id, sequence.tokens, sequence.request.cache_salt);
}

// Tells the listener what is new; how the request ends, if it does. A listener that throws ends its
// own request only.
std::optional<Engine::State::Ending> Engine::State::hand_over(Sequence& sequence) {
  try {
    return tell_tokens(sequence);
  } catch (const std::exception& exception) {
    return Ending{FinishReason::kError,
                  Error(ErrorCode::kInternal,
                        std::string("the answer could not be handed over: ") + exception.what())};
  }
}

std::optional<Engine::State::Ending> Engine::State::tell_tokens(Sequence& sequence) {
  RequestListener& listener = *sequence.request.listener;
  if (!sequence.prompt_told) {
    sequence.prompt_told = true;
    sequence.prompt_record.prompt_tokens = sequence.prompt_tokens;
    sequence.prompt_record.cached_tokens = sequence.record.cached_tokens;
    totals.prompt_tokens += sequence.prompt_tokens;
    listener.on_prompt(sequence.prompt_record);
    sequence.prompt_record.logprobs = {};
    if (sequence.request.sampling.max_tokens == 0) return Ending{FinishReason::kLength, {}};
  }
  fair_share.charge(sequence.request.tenant, static_cast<int64_t>(sequence.step.sampled.size()));
  for (const SampledToken& token : sequence.step.sampled) {
    note_time(sequence);
    ++sequence.record.output_tokens;
    ++totals.generation_tokens;
    if (sequence.constraint != nullptr && !sequence.constraint->accept(token.id)) {
      return Ending{FinishReason::kError,
                    Error(ErrorCode::kInternal, "a token was chosen that the constraint forbids")};
    }
    const bool is_end = ends_answer(sequence, token.id);
    const bool wanted = listener.on_token(token, is_end);
    if (is_end) sequence.record.stop_token = token.id;
    if (is_end || !wanted) return Ending{FinishReason::kStop, {}};
    if (sequence.prompt_tokens + sequence.record.output_tokens >= max_known(sequence)) {
      return Ending{FinishReason::kLength, {}};
    }
  }
  return {};
}

void Engine::State::note_time(Sequence& sequence) {
  const Clock::time_point now = Clock::now();
  if (!sequence.last_token) {
    sequence.record.first_token_seconds =
        std::chrono::duration<double>(now - sequence.submitted).count();
    observer->on_first_token(sequence.record.first_token_seconds);
  } else {
    observer->on_inter_token(std::chrono::duration<double>(now - *sequence.last_token).count());
  }
  sequence.last_token = now;
}

bool Engine::State::ends_answer(const Sequence& sequence, int32_t id) const {
  const SamplingParams& sampling = sequence.request.sampling;
  // Behind a whole sentence of a grammar nothing else can follow, whatever the request ignores.
  const bool obeys = !sampling.ignore_eos || sequence.constraint != nullptr;
  if (obeys && ends[static_cast<size_t>(id)]) return true;
  return std::ranges::find(sampling.stop_token_ids, id) != sampling.stop_token_ids.end();
}

Engine::State::SequencePtr Engine::State::take_running(const Sequence& sequence) {
  const auto found = std::ranges::find_if(
      running, [&](const SequencePtr& other) { return other.get() == &sequence; });
  KVANT_CHECK(found != running.end(), "a sequence of the step is running");
  SequencePtr taken = std::move(*found);
  running.erase(found);
  return taken;
}

}  // namespace kvant::serve
