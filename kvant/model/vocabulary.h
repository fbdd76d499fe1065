// The tokens of a model: texts, scores, kinds, special ids. Internal to the tokenizers of model/.
//
// Owns copies of everything, so the Gguf may go. Immutable and thread-safe once created.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/gguf.h"
#include "kvant/model/tokenizer.h"

namespace kvant::model {

// What a token is; a set of bits, because a control token may also be unused, for example.
using TokenKind = uint8_t;
inline constexpr TokenKind kTokenUnknown = 1;
inline constexpr TokenKind kTokenUnused = 2;
inline constexpr TokenKind kTokenNormal = 4;
inline constexpr TokenKind kTokenControl = 8;
inline constexpr TokenKind kTokenUserDefined = 16;
inline constexpr TokenKind kTokenByte = 32;

class Vocabulary {
 public:
  // Which of the two families `tokenizer.ggml.model` names.
  enum class Family { kBytePairs, kSentencePiece };

  static Result<Vocabulary> create(const Gguf& gguf);
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;

  Family family() const { return family_; }
  TokenId size() const { return static_cast<TokenId>(texts_.size()); }
  // The token as the file has it: bytes in disguise (byte pairs) or with U+2581 for spaces.
  std::string_view text(TokenId id) const { return texts_[static_cast<size_t>(id)]; }
  float score(TokenId id) const { return scores_[static_cast<size_t>(id)]; }
  TokenKind kind(TokenId id) const { return kinds_[static_cast<size_t>(id)]; }
  bool is_special(TokenId id) const {
    return (kind(id) & (kTokenControl | kTokenUserDefined | kTokenUnknown)) != 0;
  }
  std::optional<TokenId> find(std::string_view text) const;
  size_t max_text_bytes() const { return max_text_bytes_; }

  std::optional<TokenId> bos() const { return bos_; }
  std::optional<TokenId> eos() const { return eos_; }
  std::optional<TokenId> eot() const { return eot_; }
  std::optional<TokenId> unknown() const { return unknown_; }
  std::optional<TokenId> padding() const { return padding_; }
  // Every token after which a model has finished its answer, ascending.
  const std::vector<TokenId>& end_of_generation() const { return end_of_generation_; }

 private:
  Vocabulary() = default;
  Status read_tokens(const Gguf& gguf);
  Status read_kinds(const Gguf& gguf);
  Status read_special_ids(const Gguf& gguf);
  Status find_known_tokens(const Gguf& gguf);
  void find_special_by_text();

  Family family_ = Family::kBytePairs;
  // The texts one after another. A vector, not a string: moving it keeps the views valid.
  std::vector<char> arena_;
  std::vector<std::string_view> texts_;
  std::vector<float> scores_;
  std::vector<TokenKind> kinds_;
  std::unordered_map<std::string_view, TokenId> ids_;
  size_t max_text_bytes_ = 0;
  std::optional<TokenId> bos_, eos_, eot_, unknown_, padding_;
  std::vector<TokenId> end_of_generation_;
};

}  // namespace kvant::model
