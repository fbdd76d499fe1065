// Tokens to the text that a client may see: characters are whole, and nothing is shown that could
// still turn out to be the start of a stop string.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/model/tokenizer.h"

namespace kvant::serve::openai {

// Finds the one of several strings that is complete first in text that comes in pieces (of equals
// the one that begins first). Single-thread.
class StopStrings {
 public:
  // Empty strings are ignored.
  StopStrings(std::vector<std::string> stops, bool include_in_output);

  // The part of the text so far that can be shown now and was not before.
  std::string push(std::string_view piece);
  // What was held back, if no stop string came.
  std::string finish();
  // The stop string that ended the text.
  const std::optional<std::string>& found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  bool include_;
  std::string held_;
  std::optional<std::string> found_;
};

struct TextStreamOptions {
  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
  int min_tokens = 0;  // stop strings count only beyond so many tokens
  bool skip_special_tokens = true;
  model::StreamDecoder::From from = model::StreamDecoder::From::kMiddle;
};

// The text of one answer. Single-thread; the tokenizer must outlive it.
class TextStream {
 public:
  TextStream(const model::Tokenizer& tokenizer, const TextStreamOptions& options);

  // Text that can be shown now. Once stopped(), nothing more comes.
  std::string push(int32_t token);
  std::string finish();
  bool stopped() const { return stops_.found().has_value(); }
  const std::optional<std::string>& stop_string() const { return stops_.found(); }

 private:
  model::StreamDecoder decoder_;
  StopStrings stops_;
  int64_t min_tokens_;
  int64_t tokens_ = 0;
};

// Characters (code points) of UTF-8 text; a stray byte counts as one.
int64_t count_characters(std::string_view text);

}  // namespace kvant::serve::openai
