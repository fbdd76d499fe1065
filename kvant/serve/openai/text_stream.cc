#include "kvant/serve/openai/text_stream.h"

#include <algorithm>

namespace kvant::serve::openai {
namespace {

// The longest end of `text` that is the beginning of `stop`, the whole of it excluded.
size_t partial_match(std::string_view text, std::string_view stop) {
  for (size_t size = std::min(text.size(), stop.size() - 1); size > 0; --size) {
    if (text.substr(text.size() - size) == stop.substr(0, size)) return size;
  }
  return 0;
}

}  // namespace

StopStrings::StopStrings(std::vector<std::string> stops, bool include_in_output)
    : stops_(std::move(stops)), include_(include_in_output) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

std::string StopStrings::push(std::string_view piece) {
  if (found_) return {};
  if (stops_.empty()) return std::string(piece);
  held_ += piece;
  // The one that is complete first, so that the result does not depend on where pieces are cut.
  size_t first = std::string::npos;
  size_t end = std::string::npos;
  const std::string* stop = nullptr;
  for (const std::string& candidate : stops_) {
    const size_t at = held_.find(candidate);
    if (at == std::string::npos) continue;
    const size_t candidate_end = at + candidate.size();
    if (candidate_end < end || (candidate_end == end && at < first)) {
      first = at;
      end = candidate_end;
      stop = &candidate;
    }
  }
  if (stop != nullptr) {
    found_ = *stop;
    std::string shown = held_.substr(0, first + (include_ ? stop->size() : 0));
    held_.clear();
    return shown;
  }
  size_t keep = 0;
  for (const std::string& candidate : stops_) {
    keep = std::max(keep, partial_match(held_, candidate));
  }
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, shown.size());
  return shown;
}

std::string StopStrings::finish() {
  return std::exchange(held_, {});
}

TextStream::TextStream(const model::Tokenizer& tokenizer, const TextStreamOptions& options)
    : decoder_(tokenizer, options.from,
               options.skip_special_tokens ? model::SpecialInOutput::kHide
                                           : model::SpecialInOutput::kShow),
      stops_(options.stop, options.include_stop_str_in_output),
      min_tokens_(options.min_tokens) {}

std::string TextStream::push(int32_t token) {
  ++tokens_;
  const std::string piece = decoder_.push(token);
  if (tokens_ <= min_tokens_) return piece;
  return stops_.push(piece);
}

std::string TextStream::finish() {
  if (stopped()) return {};
  std::string shown = stops_.push(decoder_.finish());
  return shown + stops_.finish();
}

int64_t count_characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

}  // namespace kvant::serve::openai
