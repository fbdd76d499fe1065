// One conversation: a sequence of a cache that is prompted, extended token by token, and prompted
// again.
//
//   KVANT_ASSIGN(Session session, Session::create(model, cache));
//   auto result = session.generate(prompt_ids, options, [&](int32_t id) { ...; return Status(); });
//
// Single-thread. Model and cache must outlive it; the cache may hold other sequences.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/model/model.h"
#include "kvant/model/sampler.h"

namespace kvant::model {

enum class StopReason {
  kEndOfGeneration,  // the model said so
  kMaxTokens,
  kContextFull,
  kCancelled,  // by the flag
};
std::string_view stop_reason_name(
    StopReason reason);  // "end", "length", "context_full", "cancelled"

struct GenerateOptions {
  int64_t max_tokens = -1;  // below 0: until the model or the context ends it
  SamplerOptions sampler;
  std::vector<int32_t> end_ids;  // tokens that end the answer; not passed on, not counted
  // A full context drops its older half (but for the first `keep_tokens`) and goes on. What stays
  // is computed anew: pages of shifted tokens are never patched.
  bool context_shift = false;
  int64_t keep_tokens = 0;
  const std::atomic<bool>* cancel = nullptr;
  // Called between chunks of a prompt with tokens done and their total; may be empty.
  std::function<void(int64_t done, int64_t total)> on_prefill;
};

struct GenerateStats {
  int64_t prompt_tokens = 0;
  int64_t reused_tokens = 0;   // of the prompt: already in the cache
  int64_t prefill_tokens = 0;  // computed, shifts included
  double prefill_seconds = 0;
  int64_t decode_tokens = 0;  // steps of one token
  double decode_seconds = 0;  // of those steps and their sampling, not of the callback
  int64_t context_shifts = 0;
  int64_t context_tokens = 0;  // in the cache at the end
  cache::CacheBytes cache;     // at the end

  double prefill_tokens_per_second() const;
  double decode_tokens_per_second() const;
};

struct GenerateResult {
  std::vector<int32_t> token_ids;  // generated
  StopReason reason = StopReason::kMaxTokens;
  GenerateStats stats;
};

// An error stops the generation and is returned.
using TokenCallback = std::function<Status(int32_t id)>;

class Session {
 public:
  static Result<Session> create(Model& model, cache::KvCache& cache);
  Session(Session&& other) noexcept;
  Session& operator=(Session&&) = delete;
  ~Session();  // removes its sequence

  // Tokens whose keys and values are in the cache.
  std::span<const int32_t> tokens() const { return tokens_; }
  cache::SequenceId sequence() const { return *id_; }

  // What the pages hold that others have put into sequence(), which was empty: those of a session
  // file or a page store. kInvalidArgument if the sequence does not have as many tokens.
  Status adopt(std::span<const int32_t> tokens);

  // Continues `prompt` (at least one token): what it shares with tokens() is reused, page by page.
  // kResourceExhausted if the prompt is longer than the context, unless it may be shifted.
  Result<GenerateResult> generate(std::span<const int32_t> prompt, const GenerateOptions& options,
                                  const TokenCallback& on_token);

  // Makes the context equal to `prompt` and calls `sink` for its last token, without its logits if
  // the sampler takes the greatest or candidates; the part of generate() before the first token.
  Status prefill(std::span<const int32_t> prompt, const GenerateOptions& options,
                 const RowsSink& sink, GenerateStats& stats);

 private:
  Session(Model& model, cache::KvCache& cache) : model_(&model), cache_(&cache) {}
  Status rewind(int64_t length);
  Status shift(const GenerateOptions& options, GenerateStats& stats);

  Model* model_;
  cache::KvCache* cache_;
  std::optional<cache::SequenceId> id_;
  std::vector<int32_t> tokens_;
};

}  // namespace kvant::model
