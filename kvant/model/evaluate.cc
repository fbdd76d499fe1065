#include "kvant/model/evaluate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "kvant/base/check.h"

namespace kvant::model {

namespace {

// Bytes of one buffer of logits rows. 64 rows of the largest vocabularies (262,144) keep a matrix
// product busy; more would only cost memory.
constexpr int64_t kLogitsBufferBytes = int64_t{64} << 20;
constexpr int64_t kMaxRows = 256;

// Scored rows [first, first + count) of one chunk.
struct Rows {
  int64_t chunk = 0;
  int64_t first = 0;
  int64_t count = 0;
  std::span<const int32_t> targets;  // [count] the tokens that came
};

class Evaluation {
 public:
  explicit Evaluation(const EvalRequest& request)
      : request_(request),
        scored_(scored_per_chunk(request.ctx)),
        max_rows_(std::clamp(kLogitsBufferBytes / (request.vocab * 4), int64_t{1}, kMaxRows)),
        chunk_(static_cast<size_t>(request.ctx)),
        base_(static_cast<size_t>(max_rows_ * request.vocab)),
        softmax_(static_cast<size_t>(max_rows_)),
        base_softmax_(static_cast<size_t>(max_rows_)),
        scores_(request.sources.size()) {
    if (request.sources.size() > 1 || request.base != nullptr) logits_.resize(base_.size());
    progress_.tokens_total = static_cast<int64_t>(request.tokens.size() * request.sources.size());
  }

  Result<EvalResult> run() {
    const int64_t chunks = static_cast<int64_t>(request_.tokens.size()) / request_.ctx;
    if (!request_.done.empty()) take_done(chunks);
    for (int64_t chunk = progress_.chunks_done; chunk < chunks; ++chunk) {
      KVANT_TRY(run_chunk(chunk));
      progress_.chunks_done = chunk + 1;
      if (request_.on_chunk) KVANT_TRY(report_chunk(chunk));
    }
    EvalResult result;
    result.scores = std::move(scores_);
    for (const TokenScores& scores : result.scores) {
      result.summaries.push_back(summarize(scores, scored_));
    }
    return result;
  }

 private:
  void take_done(int64_t chunks) {
    scores_.assign(request_.done.begin(), request_.done.end());
    for (const TokenScores& scores : scores_) {
      KVANT_CHECK(scores.nll.size() == scores_[0].nll.size(), "scores of the same chunks");
    }
    const std::vector<double>& nll = scores_[0].nll;
    progress_.chunks_done = static_cast<int64_t>(nll.size()) / scored_;
    KVANT_CHECK(static_cast<int64_t>(nll.size()) % scored_ == 0 && progress_.chunks_done <= chunks,
                "scores of whole chunks of this text");
    first_nll_ = std::accumulate(nll.begin(), nll.end(), 0.0);
    progress_.tokens_done =
        progress_.chunks_done * request_.ctx * static_cast<int64_t>(scores_.size());
    if (!nll.empty()) progress_.first_ppl = std::exp(first_nll_ / static_cast<double>(nll.size()));
  }

  Status report_chunk(int64_t chunk) const {
    std::vector<TokenScores> of_chunk;
    for (const TokenScores& scores : scores_) {
      of_chunk.push_back(part(scores, chunk * scored_, scored_));
    }
    return request_.on_chunk(chunk, of_chunk);
  }

  Status run_chunk(int64_t chunk) {
    const auto text =
        request_.tokens.subspan(static_cast<size_t>(chunk * request_.ctx), chunk_.size());
    std::copy(text.begin(), text.end(), chunk_.begin());
    if (request_.bos >= 0) chunk_[0] = request_.bos;
    const std::span<const int32_t> tokens(chunk_);
    const auto half = static_cast<size_t>(request_.ctx / 2);
    for (LogitsSource* source : request_.sources) {
      KVANT_TRY(source->restart());
      KVANT_TRY(source->extend(tokens.first(half), 0, 0, {}));
      KVANT_TRY(advance(half));
    }
    for (int64_t first = 0; first < scored_; first += max_rows_) {
      const int64_t count = std::min(max_rows_, scored_ - first);
      // The last token is fed too, for the cache's length, but nothing after it is scored.
      const int64_t fed = first + count == scored_ ? count + 1 : count;
      const size_t start = half + static_cast<size_t>(first);
      KVANT_TRY(
          run_rows(tokens.subspan(start, static_cast<size_t>(fed)),
                   {chunk, first, count, text.subspan(start + 1, static_cast<size_t>(count))}));
    }
    return {};
  }

  // Feeds `piece` to every source and scores what each predicts.
  Status run_rows(std::span<const int32_t> piece, const Rows& rows) {
    if (request_.base != nullptr) KVANT_TRY(read_base(rows));
    for (size_t i = 0; i < request_.sources.size(); ++i) {
      const bool is_base = i == 0 && request_.base == nullptr;
      const auto values = static_cast<size_t>(rows.count * request_.vocab);
      const std::span<float> logits = std::span(is_base ? base_ : logits_).first(values);
      KVANT_TRY(request_.sources[i]->extend(piece, 0, rows.count, logits));
      parallel_rows(rows.count,
                    [&](int64_t row) { softmax_[row] = row_softmax(row_of(logits, row)); });
      if (is_base) base_softmax_ = softmax_;
      KVANT_TRY(check_finite(rows.count));
      score(rows, logits, is_base, scores_[i]);
      if (i == 0) {
        if (request_.save != nullptr) KVANT_TRY(save(logits, rows.count));
        update_first_ppl(rows.count);
      }
      KVANT_TRY(advance(piece.size()));
    }
    return {};
  }

  Status check_finite(int64_t count) const {
    for (int64_t row = 0; row < count; ++row) {
      if (!std::isfinite(softmax_[row].log_sum_exp)) {
        return Error(ErrorCode::kNumericError,
                     "the model's logits are not finite: its weights may be damaged");
      }
    }
    return {};
  }

  // The file's rows into base_, as log-probabilities (their log_sum_exp is 0).
  Status read_base(const Rows& rows) {
    for (int64_t row = 0; row < rows.count; ++row) {
      const std::span<float> log_probs = row_of(base_, row);
      KVANT_TRY(request_.base->read_row(rows.chunk, rows.first + row, log_probs));
      const auto top = std::max_element(log_probs.begin(), log_probs.end());
      base_softmax_[row] = {0.0, static_cast<int32_t>(top - log_probs.begin()), *top};
    }
    return {};
  }

  void score(const Rows& rows, std::span<const float> logits, bool is_base, TokenScores& scores) {
    const float floor =
        request_.base != nullptr ? kLogitsFileFloor : -std::numeric_limits<float>::infinity();
    const size_t start = scores.nll.size();
    scores.nll.resize(start + rows.count);
    scores.delta_nll.resize(start + rows.count);
    scores.kl.resize(start + rows.count);
    scores.same_top.resize(start + rows.count);
    parallel_rows(rows.count, [&](int64_t row) {
      const RowSoftmax& own = softmax_[row];
      const RowSoftmax& base = base_softmax_[row];
      const std::span<const float> values = row_of(logits, row);
      const float target = values[rows.targets[row]];
      scores.nll[start + row] = own.log_sum_exp - static_cast<double>(target);
      scores.delta_nll[start + row] = delta_nll(row, rows.targets[row], target);
      scores.same_top[start + row] = own.top == base.top ? 1 : 0;
      scores.kl[start + row] = is_base
                                   ? 0.0f
                                   : static_cast<float>(row_kl(row_of(base_, row), base.log_sum_exp,
                                                               values, own.log_sum_exp, floor));
    });
  }

  // Own minus the base's, of the token that came. A file does not tell tokens apart that are less
  // likely than the top one by the floor: both sides are cut there, else such tokens would always
  // count against the source.
  double delta_nll(int64_t row, int32_t target, float logit) const {
    const RowSoftmax& own = softmax_[row];
    const RowSoftmax& base = base_softmax_[row];
    if (request_.base != nullptr) logit = std::max(logit, own.top_logit + kLogitsFileFloor);
    const double own_nll = own.log_sum_exp - static_cast<double>(logit);
    const size_t index = static_cast<size_t>(row * request_.vocab + target);
    return own_nll - (base.log_sum_exp - static_cast<double>(base_[index]));
  }

  Status save(std::span<const float> logits, int64_t count) {
    const auto row_codes =
        static_cast<size_t>(request_.base != nullptr ? request_.base->header().row_codes()
                                                     : 4 + request_.vocab + request_.vocab % 2);
    packed_.resize(row_codes * static_cast<size_t>(count));
    parallel_rows(count, [&](int64_t row) {
      pack_logits_row(row_of(logits, row), softmax_[row].log_sum_exp,
                      std::span(packed_).subspan(row_codes * static_cast<size_t>(row), row_codes));
    });
    return request_.save->append(packed_);
  }

  void update_first_ppl(int64_t count) {
    const std::vector<double>& nll = scores_[0].nll;
    first_nll_ = std::accumulate(nll.end() - count, nll.end(), first_nll_);
    progress_.first_ppl = std::exp(first_nll_ / static_cast<double>(nll.size()));
  }

  Status advance(size_t tokens) {
    progress_.tokens_done += static_cast<int64_t>(tokens);
    return request_.on_progress ? request_.on_progress(progress_) : Status();
  }

  template <typename T>
  std::span<T> row_of(std::span<T> rows, int64_t row) const {
    return rows.subspan(static_cast<size_t>(row * request_.vocab),
                        static_cast<size_t>(request_.vocab));
  }
  std::span<float> row_of(std::vector<float>& rows, int64_t row) const {
    return row_of(std::span(rows), row);
  }

  template <typename F>
  void parallel_rows(int64_t count, F&& f) {
    request_.pool->parallel_for(count, [&](int64_t row, int) { f(row); });
  }

  const EvalRequest& request_;
  const int64_t scored_;        // positions a chunk
  const int64_t max_rows_;      // of one step
  std::vector<int32_t> chunk_;  // [ctx] as fed
  std::vector<float> base_;     // [max_rows][vocab] of the base: logits, or a file's log p
  std::vector<float> logits_;   // [max_rows][vocab] of the source at work, unless it is the base
  std::vector<RowSoftmax> softmax_;  // [max_rows] of the source at work
  std::vector<RowSoftmax> base_softmax_;
  std::vector<uint16_t> packed_;
  std::vector<TokenScores> scores_;  // [sources]
  double first_nll_ = 0;             // sum over scores_[0]
  EvalProgress progress_;
};

}  // namespace

Result<EvalResult> evaluate(const EvalRequest& request) {
  KVANT_CHECK(
      request.ctx >= 4 && !request.sources.empty() && request.pool != nullptr && request.vocab > 1,
      "a complete request");
  KVANT_CHECK(
      !request.tokens.empty() && request.tokens.size() % static_cast<size_t>(request.ctx) == 0,
      "whole chunks");
  KVANT_CHECK(request.done.empty() ||
                  (request.done.size() == request.sources.size() && request.save == nullptr),
              "scores of every source, and nothing that needs the predictions behind them");
  for (const int32_t token : request.tokens) {
    if (token < 0 || token >= request.vocab) {
      return Error(
          ErrorCode::kInvalidArgument,
          fmt::format("token id {} is outside the model's vocabulary of {}", token, request.vocab));
    }
  }
  if (request.base != nullptr && request.base->header().vocab != request.vocab) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("'{}' has a vocabulary of {}, the model one of {}: it was made with "
                             "another model",
                             request.base->name(), request.base->header().vocab, request.vocab));
  }
  return Evaluation(request).run();
}

Result<std::span<const int32_t>> whole_chunks(std::span<const int32_t> tokens, int64_t ctx,
                                              int64_t max_chunks) {
  KVANT_CHECK(ctx >= 1 && max_chunks >= 0, "a chunk length and a limit");
  int64_t chunks = static_cast<int64_t>(tokens.size()) / ctx;
  if (chunks == 0) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("the text has {} tokens, fewer than one chunk of {}: give a longer "
                             "text or a smaller --ctx",
                             tokens.size(), ctx));
  }
  if (max_chunks > 0) chunks = std::min(chunks, max_chunks);
  return tokens.first(static_cast<size_t>(chunks * ctx));
}

}  // namespace kvant::model
