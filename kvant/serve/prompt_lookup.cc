#include "kvant/serve/prompt_lookup.h"

#include <algorithm>

namespace kvant::serve {

std::vector<int32_t> draft_by_lookup(std::span<const int32_t> tokens, int64_t max_tokens,
                                     const PromptLookup& options) {
  const int64_t size = static_cast<int64_t>(tokens.size());
  if (max_tokens <= 0) return {};
  for (int64_t n = options.max_ngram; n >= options.min_ngram; --n) {
    const std::span<const int32_t> last = tokens.last(std::min(n, size));
    // The place itself is no earlier place; one that overlaps it is (a run of one token).
    for (int64_t begin = size - n - 1; begin >= 0; --begin) {
      if (!std::equal(last.begin(), last.end(), tokens.begin() + begin)) continue;
      const int64_t follow = begin + n;
      const auto draft = tokens.subspan(follow, std::min(max_tokens, size - follow));
      return {draft.begin(), draft.end()};
    }
  }
  return {};
}

}  // namespace kvant::serve
