#include "kvant/model/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "kvant/base/check.h"

namespace kvant::model {
namespace {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

bool stop_asked(const GenerateOptions& options) {
  return options.cancel != nullptr && options.cancel->load(std::memory_order_relaxed);
}

// The first `keep` tokens and the newer half of the others.
std::vector<int32_t> shifted(std::span<const int32_t> tokens, int64_t keep, int64_t context) {
  const int64_t size = static_cast<int64_t>(tokens.size());
  keep = std::clamp<int64_t>(keep, 0, std::max<int64_t>(0, context / 2 - 1));
  const int64_t tail = std::max<int64_t>(1, std::min((size - keep) / 2, (context - keep) / 2));
  std::vector<int32_t> result(tokens.begin(), tokens.begin() + keep);
  result.insert(result.end(), tokens.end() - tail, tokens.end());
  return result;
}

}  // namespace

std::string_view stop_reason_name(StopReason reason) {
  switch (reason) {
    case StopReason::kEndOfGeneration: return "end";
    case StopReason::kMaxTokens: return "length";
    case StopReason::kContextFull: return "context_full";
    case StopReason::kCancelled: return "cancelled";
  }
  return "unknown";
}

double GenerateStats::prefill_tokens_per_second() const {
  return prefill_seconds > 0 ? static_cast<double>(prefill_tokens) / prefill_seconds : 0;
}

double GenerateStats::decode_tokens_per_second() const {
  return decode_seconds > 0 ? static_cast<double>(decode_tokens) / decode_seconds : 0;
}

Result<Session> Session::create(Model& model, cache::KvCache& cache) {
  Session session(model, cache);
  KVANT_ASSIGN(session.id_, cache.add_sequence());
  session.tokens_.reserve(model.context_tokens());
  return session;
}

Session::Session(Session&& other) noexcept
    : model_(other.model_),
      cache_(other.cache_),
      id_(std::exchange(other.id_, std::nullopt)),
      tokens_(std::move(other.tokens_)) {}

Session::~Session() {
  if (id_) cache_->remove_sequence(*id_);
}

Status Session::adopt(std::span<const int32_t> tokens) {
  const int64_t held = cache_->length(*id_);
  if (!tokens_.empty() || held != static_cast<int64_t>(tokens.size())) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("a session adopts the tokens of pages that were put into its empty "
                             "sequence; there are {} tokens, it holds {} and had {}",
                             tokens.size(), held, tokens_.size()));
  }
  tokens_.assign(tokens.begin(), tokens.end());
  return {};
}

// Shortens the sequence to at most `length` tokens; a closed page goes as a whole.
Status Session::rewind(int64_t length) {
  if (length >= static_cast<int64_t>(tokens_.size())) return {};
  KVANT_ASSIGN(const int64_t left, cache_->truncate(*id_, length));
  tokens_.resize(left);
  return {};
}

Status Session::prefill(std::span<const int32_t> prompt, const GenerateOptions& options,
                        const RowsSink& sink, GenerateStats& stats) {
  const Stopwatch watch;
  const int64_t total = static_cast<int64_t>(prompt.size());
  const auto shared = std::ranges::mismatch(prompt, tokens_);
  // At least one token is computed anew: its logits are wanted.
  KVANT_TRY(rewind(std::min<int64_t>(shared.in1 - prompt.begin(), total - 1)));
  const int64_t reused = static_cast<int64_t>(tokens_.size());
  const auto query = row_query(options.sampler, model_->config().vocab_size);
  for (int64_t done = reused; done < total;) {
    if (options.on_prefill) options.on_prefill(done - reused, total - reused);
    const int64_t count = std::min<int64_t>(model_->max_step_tokens(), total - done);
    ForwardSequence step{.id = *id_,
                         .tokens = prompt.subspan(done, count),
                         .num_logit_rows = done + count == total ? 1 : 0,
                         .only_greatest = takes_greatest(options.sampler)};
    if (query && step.num_logit_rows == 1) step.queries = {&*query, 1};
    KVANT_TRY(model_->forward(std::span(&step, 1), *cache_, sink, options.cancel));
    tokens_.insert(tokens_.end(), step.tokens.begin(), step.tokens.end());
    done += count;
  }
  stats.reused_tokens += reused;
  stats.prefill_tokens += total - reused;
  stats.prefill_seconds += watch.seconds();
  return {};
}

Status Session::shift(const GenerateOptions& options, GenerateStats& stats) {
  const std::vector<int32_t> kept = shifted(tokens_, options.keep_tokens, model_->context_tokens());
  KVANT_TRY(rewind(0));
  ++stats.context_shifts;
  GenerateStats of_shift;
  KVANT_TRY(prefill(
      kept, options, [](std::span<const LogitsRow>) { return Status(); }, of_shift));
  stats.prefill_tokens += of_shift.prefill_tokens;
  stats.prefill_seconds += of_shift.prefill_seconds;
  return {};
}

Result<GenerateResult> Session::generate(std::span<const int32_t> prompt,
                                         const GenerateOptions& options,
                                         const TokenCallback& on_token) {
  KVANT_TRY(check_sampler_options(options.sampler));
  if (prompt.empty()) {
    return Error(ErrorCode::kInvalidArgument, "the prompt is empty; give at least one token");
  }
  const int64_t context = model_->context_tokens();
  std::vector<int32_t> shortened;
  GenerateResult result;
  result.stats.prompt_tokens = static_cast<int64_t>(prompt.size());
  if (result.stats.prompt_tokens > context) {
    if (!options.context_shift) {
      return Error(
          ErrorCode::kResourceExhausted,
          fmt::format("the prompt has {} tokens, the context holds {}; shorten it or raise "
                      "the context (-c)",
                      prompt.size(), context));
    }
    shortened = shifted(prompt, options.keep_tokens, context);
    prompt = shortened;
    ++result.stats.context_shifts;
  }

  Sampler sampler(options.sampler, model_->config().vocab_size);
  int32_t next = 0;
  std::vector<int32_t> history(prompt.begin(), prompt.end());  // what repeat penalties look at
  history.reserve(context + 1);
  const bool only_greatest = takes_greatest(options.sampler);
  const auto query = row_query(options.sampler, model_->config().vocab_size);
  const RowsSink choose = [&](std::span<const LogitsRow> rows) -> Status {
    const LogitsRow& row = rows.front();
    if (row.choice.found()) {
      next = sampler.sample(row.candidates);
    } else {
      next = only_greatest ? row.greatest.index : sampler.sample(row.logits, history);
    }
    return {};
  };
  const auto finish = [&](StopReason reason) {
    result.reason = reason;
    result.stats.context_tokens = static_cast<int64_t>(tokens_.size());
    result.stats.cache = cache_->bytes();
    return std::move(result);
  };

  const Status prefilled = prefill(prompt, options, choose, result.stats);
  if (!prefilled) {
    if (prefilled.error().code() == ErrorCode::kCancelled) return finish(StopReason::kCancelled);
    return prefilled.error();
  }
  for (;;) {
    if (stop_asked(options)) return finish(StopReason::kCancelled);
    if (std::ranges::find(options.end_ids, next) != options.end_ids.end()) {
      return finish(StopReason::kEndOfGeneration);
    }
    if (options.max_tokens >= 0 &&
        static_cast<int64_t>(result.token_ids.size()) >= options.max_tokens) {
      return finish(StopReason::kMaxTokens);
    }
    result.token_ids.push_back(next);
    history.push_back(next);
    KVANT_TRY(on_token(next));
    // The last token needs no step of its own.
    if (static_cast<int64_t>(result.token_ids.size()) == options.max_tokens) {
      return finish(StopReason::kMaxTokens);
    }
    if (static_cast<int64_t>(tokens_.size()) >= context) {
      if (!options.context_shift) return finish(StopReason::kContextFull);
      KVANT_TRY(shift(options, result.stats));
    }
    const Stopwatch watch;
    const int32_t token = next;
    ForwardSequence step{.id = *id_,
                         .tokens = std::span(&token, 1),
                         .num_logit_rows = 1,
                         .only_greatest = only_greatest};
    if (query) step.queries = {&*query, 1};
    const Status stepped = model_->forward(std::span(&step, 1), *cache_, choose, options.cancel);
    if (!stepped) {
      if (stepped.error().code() == ErrorCode::kCancelled) return finish(StopReason::kCancelled);
      return stepped.error();
    }
    tokens_.push_back(token);
    ++result.stats.decode_tokens;
    result.stats.decode_seconds += watch.seconds();
  }
}

}  // namespace kvant::model
