// SentencePiece-style encoding (Llama 2, Gemma): merges characters by the scores of the tokens that
// they form; characters that are no token become byte tokens. Internal to model/.
// Immutable and thread-safe once created.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/vocabulary.h"

namespace kvant::model {

// U+2581, which stands for a space in tokens.
inline constexpr std::string_view kSpaceMark = "\xe2\x96\x81";

class SentencePiece {
 public:
  // `vocabulary` must outlive the result. kCorruptData if there is neither a token for every byte
  // nor an unknown token.
  static Result<SentencePiece> create(const Gguf& gguf, const Vocabulary& vocabulary);

  // Appends the ids of a text without special tokens, whose spaces are not yet marked.
  void encode(std::string_view text, std::vector<TokenId>& out) const;

  // The byte that a byte token "<0x0A>" stands for; negative if the text has another form.
  static int byte_of(std::string_view token_text);

 private:
  // Bytes [begin, begin + length) of the text; length 0 once merged into the part before it.
  struct Part {
    size_t begin = 0;
    size_t length = 0;
    int32_t previous = -1;
    int32_t next = -1;
  };
  struct Candidate {
    float score = 0;
    int32_t left = 0;
    int32_t right = 0;
    size_t length = 0;  // of both parts, to notice that one has changed since
  };

  SentencePiece() = default;
  void add_candidate(std::string_view text, const std::vector<Part>& parts, int32_t left,
                     int32_t right, std::vector<Candidate>& heap) const;

  const Vocabulary* vocabulary_ = nullptr;
  std::array<TokenId, 256> byte_tokens_{};
};

}  // namespace kvant::model
