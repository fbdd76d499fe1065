// A request inside the engine. Internal to kvant/serve/engine*.cc; engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvant/cache/kv_cache.h"
#include "kvant/cache/prefix_tree.h"
#include "kvant/model/random.h"
#include "kvant/serve/request.h"
#include "kvant/serve/tiers/page_tiers.h"

namespace kvant::serve {

struct Sequence {
  RequestNumber number = 0;
  Request request;
  Clock::time_point submitted;

  std::vector<int32_t> tokens;  // prompt, then what was generated
  int64_t prompt_tokens = 0;
  std::unique_ptr<TokenConstraint> constraint;  // may be null
  model::SplitMix64 random{0};

  // While it runs:
  std::optional<cache::SequenceId> id;
  cache::PrefixLease lease;  // the part of the tree that it shares
  int64_t computed = 0;      // tokens whose keys and values are in the cache
  int64_t admission = 0;     // the engine's how-manieth

  // While it waits: pages that lower tiers are asked for.
  struct Loading {
    std::optional<PageTiers::PrefetchId> id;
    Clock::time_point since;
    int64_t asked_from = -1;  // the pages before this one were in the tree then
  };
  Loading loading;

  // What one step does to it; also what undoes it.
  struct Step {
    int64_t new_tokens = 0;                  // known tokens that are computed
    std::vector<int32_t> draft;              // that follow them
    std::vector<int32_t> input;              // both
    std::vector<backend::RowQuery> queries;  // of the rows whose logits decide; empty: none
    std::vector<SampledToken> sampled;       // already at the end of `tokens`, not yet handed over
    int64_t known = 0;                       // at its beginning
    model::SplitMix64 random{0};             // the same
    size_t prompt_logprobs = 0;              // the same
  };
  Step step;

  PromptRecord prompt_record;
  bool prompt_told = false;
  std::optional<Clock::time_point> last_token;
  FinishRecord record;

  int64_t known() const { return static_cast<int64_t>(tokens.size()); }
  int64_t missing() const { return known() - computed; }
  // Logits of the whole prompt are wanted, and not yet had.
  bool scores_prompt() const {
    return request.sampling.prompt_logprobs.has_value() && !prompt_told;
  }
  // Of all rows that a step gives, nothing but the greatest logit is needed.
  bool takes_greatest() const {
    return !scores_prompt() &&
           serve::takes_greatest(request.sampling, constraint != nullptr,
                                 tokens.size() - static_cast<size_t>(prompt_tokens));
  }
  // What to ask of `num_rows` rows of logits; nothing of any if one takes more.
  std::vector<backend::RowQuery> row_queries(int64_t num_rows, int vocab_size) const {
    std::vector<backend::RowQuery> queries;
    if (scores_prompt()) return queries;
    model::SplitMix64 numbers = random;  // one for each token, if its draft is chosen
    for (int64_t i = 0; i < num_rows; ++i) {
      const auto query =
          serve::row_query(request.sampling, constraint != nullptr,
                           tokens.size() - static_cast<size_t>(prompt_tokens), vocab_size, numbers);
      if (!query) return {};
      queries.push_back(*query);
    }
    return queries;
  }
  void undo_step() {
    tokens.resize(static_cast<size_t>(step.known));
    random = step.random;
    prompt_record.logprobs.resize(step.prompt_logprobs);
    step.sampled.clear();
  }
};

}  // namespace kvant::serve
