// Hostile states of `kvant eval --resume`: parsing.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tools/eval_state.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const kvant::tools::EvalIdentity identity = {
      .facts = {{"ctx", 8}}, .num_formats = 2, .scored_per_chunk = 3, .num_chunks = 3};
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto state = kvant::tools::parse_eval_state(text, identity, "fuzz");
  if (!state) return 0;
  for (const kvant::model::TokenScores& scores : state->scores) {
    if (scores.nll.size() != static_cast<size_t>(3 * state->chunks)) __builtin_trap();
    if (scores.kl.size() != scores.nll.size()) __builtin_trap();
  }
  return 0;
}
