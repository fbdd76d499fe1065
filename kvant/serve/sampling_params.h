// What a request asks of the choice of its tokens: the fields that the HTTP layer reads and the
// engine obeys.
//
// Names, meanings and defaults are vLLM's SamplingParams (where OpenAI's API differs, the field
// says so). A plain value; sampling.h says how the fields act on logits, and in which order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::serve {

// What a server can honour, against which check() holds the fields.
struct SamplingLimits {
  int vocab_size = 0;         // ids are below this
  int max_logprobs = 20;      // alternatives per token
  int max_choices = 128;      // n
  int max_stop_strings = 16;  // OpenAI's API promises 4
};

struct SamplingParams {
  // Choices that share the prompt, 1 or more. Choice i of a seeded request draws with seed + i.
  int n = 1;

  // ---- the distribution
  float temperature = 1.0f;         // 0 or more; below kGreedyTemperature: the most probable token
  float top_p = 1.0f;               // (0, 1]; 1: all
  int top_k = 0;                    // 0 and -1: all
  float min_p = 0.0f;               // [0, 1]; 0: none
  float presence_penalty = 0.0f;    // [-2, 2]; taken once from each token of the output so far
  float frequency_penalty = 0.0f;   // [-2, 2]; taken once per occurrence in the output so far
  float repetition_penalty = 1.0f;  // above 0; on tokens of prompt and output; 1: none
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, added bias in [-100, 100]
  std::vector<int32_t> allowed_token_ids;             // only these; empty: all
  std::vector<int32_t> bad_token_ids;                 // never these
  std::optional<uint64_t> seed;                       // absent: one that nobody knows

  // ---- the end
  // Absent: what the context has room for. 0: nothing is generated (a prompt that is only scored).
  std::optional<int> max_tokens;
  int min_tokens = 0;             // so many tokens come before any end-of-generation or stop token
  bool ignore_eos = false;        // the model's end-of-generation tokens are ordinary tokens
  std::vector<std::string> stop;  // the text ends before the first of these
  std::vector<int32_t> stop_token_ids;  // these end the answer as the model's own do
  bool include_stop_str_in_output = false;

  // ---- what is reported
  std::optional<int> logprobs;         // of the chosen token and so many of the most probable
  std::optional<int> prompt_logprobs;  // the same for each token of the prompt but the first
  bool skip_special_tokens = true;     // control tokens are not part of the text

  // Temperatures below are greedy, as in vLLM: the quotient would only overflow.
  static constexpr float kGreedyTemperature = 1e-5f;
  bool is_greedy() const { return temperature < kGreedyTemperature; }

  // kInvalidArgument: "FIELD is VALUE; expected RANGE" of the first field that is out of range.
  Status check(const SamplingLimits& limits) const;
};

}  // namespace kvant::serve
