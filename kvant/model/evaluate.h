// The perplexity protocol of llama.cpp, for several cache formats side by side.
//
// A text is cut into chunks of `ctx` tokens (the remainder is dropped). Each chunk starts with an
// empty cache; where the model wants it, its first token is replaced by BOS. Position i predicts
// token i + 1; predictions of positions ctx/2 .. ctx - 2, that is of tokens ctx/2 + 1 .. ctx - 1,
// are scored. Formats advance together by a bounded number of rows, so memory holds a few rows of
// logits of two of them and never those of a chunk. Single-thread; rows are scored on the pool.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/base/thread_pool.h"
#include "kvant/model/eval_stats.h"
#include "kvant/model/logits_file.h"

namespace kvant::model {

// One cache format under test: a sequence that can start over and be extended.
class LogitsSource {
 public:
  virtual ~LogitsSource() = default;
  virtual Status restart() = 0;
  // Extends the sequence. Row i of `logits` [num_logits][vocab] is the prediction after token
  // first_logits + i of `tokens`.
  virtual Status extend(std::span<const int32_t> tokens, int64_t first_logits, int64_t num_logits,
                        std::span<float> logits) = 0;
};

struct EvalProgress {
  int64_t tokens_done = 0;  // of all formats together
  int64_t tokens_total = 0;
  int64_t chunks_done = 0;
  double first_ppl = 0;  // of the first format so far; 0 before its first score
};

struct EvalRequest {
  std::span<const int32_t> tokens;  // [chunks][ctx]
  int64_t ctx = 512;                // >= 4
  int32_t bos = -1;                 // replaces each chunk's first token; -1: nothing does
  int64_t vocab = 0;
  std::span<LogitsSource* const> sources;  // at least one
  const LogitsFile* base = nullptr;        // what KL and delta NLL refer to; null: the first source
  LogitsFileWriter* save = nullptr;        // receives the first source's predictions; null: none
  ThreadPool* pool = nullptr;
  // Scores of the first chunks from an earlier run, [sources], or empty: evaluation goes on after
  // them. Not together with `save`, which needs every prediction.
  std::span<const TokenScores> done;
  // Called after each chunk with its scores, [sources]; an error ends the evaluation. May be empty.
  std::function<Status(int64_t chunk, std::span<const TokenScores> scores)> on_chunk;
  // Called after each step; an error (kCancelled) ends the evaluation and is returned.
  std::function<Status(const EvalProgress&)> on_progress;
};

// Predictions that are scored in a chunk: its second half but for the last token's.
constexpr int64_t scored_per_chunk(int64_t ctx) {
  return ctx - 1 - ctx / 2;
}

struct EvalResult {
  std::vector<TokenScores> scores;  // in the order of `sources`
  std::vector<EvalSummary> summaries;
};
// Errors of the sources, the base, the writer and the callbacks.
Result<EvalResult> evaluate(const EvalRequest& request);

// The part of a text's tokens that is evaluated: whole chunks, at most `max_chunks` (0: all).
// kInvalidArgument unless the text fills one chunk.
Result<std::span<const int32_t>> whole_chunks(std::span<const int32_t> tokens, int64_t ctx,
                                              int64_t max_chunks);

}  // namespace kvant::model
