// Drafts without a second model: what followed the last few tokens where they stood before.
//
// Texts that repeat themselves or their prompt (code edits, quotes, lists) are guessed well; others
// get no draft and cost only the search. Saxena, "Prompt Lookup Decoding", 2023. Thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvant::serve {

struct PromptLookup {
  int min_ngram = 2;  // 1 or more
  int max_ngram = 4;  // min_ngram or more; longer ones are tried first
};

// Up to `max_tokens` tokens that may follow `tokens`: those after the latest earlier place where
// its last n tokens stand, for the largest n that has one. Empty if there is none. Time is linear
// in the length of `tokens` for each n.
std::vector<int32_t> draft_by_lookup(std::span<const int32_t> tokens, int64_t max_tokens,
                                     const PromptLookup& options);

}  // namespace kvant::serve
