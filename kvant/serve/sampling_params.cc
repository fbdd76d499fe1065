#include "kvant/serve/sampling_params.h"

#include <fmt/format.h>

#include <cmath>
#include <span>
#include <string_view>

namespace kvant::serve {
namespace {

constexpr size_t kMaxStopBytes = 1024;  // the text held back for a stop string stays small

Error out_of_range(std::string_view field, const auto& value, std::string_view expected) {
  return Error(ErrorCode::kInvalidArgument,
               fmt::format("{} is {}; expected {}", field, value, expected));
}

// False for NaN and infinities too.
bool within(float value, float low, float high) {
  return value >= low && value <= high;
}

Status check_distribution(const SamplingParams& p) {
  if (!(p.temperature >= 0) || !std::isfinite(p.temperature)) {
    return out_of_range("temperature", p.temperature, "a finite number, 0 (greedy) or more");
  }
  if (!within(p.top_p, 0, 1) || p.top_p == 0) {
    return out_of_range("top_p", p.top_p, "a number above 0, at most 1");
  }
  if (p.top_k < -1) return out_of_range("top_k", p.top_k, "1 or more, or 0 or -1 for all tokens");
  if (!within(p.min_p, 0, 1)) return out_of_range("min_p", p.min_p, "a number from 0 to 1");
  if (!within(p.presence_penalty, -2, 2)) {
    return out_of_range("presence_penalty", p.presence_penalty, "a number from -2 to 2");
  }
  if (!within(p.frequency_penalty, -2, 2)) {
    return out_of_range("frequency_penalty", p.frequency_penalty, "a number from -2 to 2");
  }
  if (!(p.repetition_penalty > 0) || !std::isfinite(p.repetition_penalty)) {
    return out_of_range("repetition_penalty", p.repetition_penalty,
                        "a finite number above 0, 1 for none");
  }
  return {};
}

Status check_ids(std::string_view field, std::span<const int32_t> ids, int vocab_size) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return out_of_range(field, id, fmt::format("token ids from 0 to {}", vocab_size - 1));
    }
  }
  return {};
}

Status check_tokens(const SamplingParams& p, int vocab_size) {
  for (const auto& [id, bias] : p.logit_bias) {
    KVANT_TRY(check_ids("logit_bias", std::span(&id, 1), vocab_size));
    if (!within(bias, -100, 100)) {
      return out_of_range(fmt::format("logit_bias of token {}", id), bias,
                          "a number from -100 to 100");
    }
  }
  KVANT_TRY(check_ids("allowed_token_ids", p.allowed_token_ids, vocab_size));
  KVANT_TRY(check_ids("bad_token_ids", p.bad_token_ids, vocab_size));
  return check_ids("stop_token_ids", p.stop_token_ids, vocab_size);
}

Status check_end(const SamplingParams& p, int max_stop_strings) {
  if (p.max_tokens && *p.max_tokens < 0) {
    return out_of_range("max_tokens", *p.max_tokens, "0 or more");
  }
  if (p.min_tokens < 0) return out_of_range("min_tokens", p.min_tokens, "0 or more");
  if (p.max_tokens && p.min_tokens > *p.max_tokens) {
    return out_of_range("min_tokens", p.min_tokens,
                        fmt::format("at most max_tokens, {}", *p.max_tokens));
  }
  if (p.stop.size() > static_cast<size_t>(max_stop_strings)) {
    return out_of_range("stop", fmt::format("a list of {}", p.stop.size()),
                        fmt::format("at most {} strings", max_stop_strings));
  }
  for (const std::string& text : p.stop) {
    if (text.empty()) return out_of_range("stop", "an empty string", "strings of 1 byte or more");
    if (text.size() > kMaxStopBytes) {
      return out_of_range("stop", fmt::format("a string of {} bytes", text.size()),
                          fmt::format("at most {}", kMaxStopBytes));
    }
  }
  return {};
}

}  // namespace

Status SamplingParams::check(const SamplingLimits& limits) const {
  if (n < 1 || n > limits.max_choices) {
    return out_of_range("n", n, fmt::format("1 to {}", limits.max_choices));
  }
  KVANT_TRY(check_distribution(*this));
  KVANT_TRY(check_tokens(*this, limits.vocab_size));
  KVANT_TRY(check_end(*this, limits.max_stop_strings));
  const auto check_count = [&](std::string_view field, const std::optional<int>& count) -> Status {
    if (!count || (*count >= 0 && *count <= limits.max_logprobs)) return {};
    return out_of_range(field, *count, fmt::format("0 to {}", limits.max_logprobs));
  };
  KVANT_TRY(check_count("logprobs", logprobs));
  return check_count("prompt_logprobs", prompt_logprobs);
}

}  // namespace kvant::serve
