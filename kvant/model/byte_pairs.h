// Byte-level byte-pair encoding (GPT-2): merges the bytes of a piece by the ranks of the file.
// Internal to model/. Immutable and thread-safe once created.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/pretokenizer.h"
#include "kvant/model/vocabulary.h"

namespace kvant::model {

class BytePairs {
 public:
  // Reads `tokenizer.ggml.merges` and `.pre`. `vocabulary` must outlive the result.
  static Result<BytePairs> create(const Gguf& gguf, const Vocabulary& vocabulary);

  // Appends the ids of a text without special tokens. Broken UTF-8 is encoded as U+FFFD
  // (decode_utf8).
  void encode(std::string_view text, std::vector<TokenId>& out) const;
  const PreTokenizer& pretokenizer() const { return *pretokenizer_; }

  // The bytes of a normal token: each of its code points stands for one byte; code points that
  // stand for none are kept as they are.
  static std::string decode(std::string_view token_text);

 private:
  // A symbol is a token, or a string that merges produce but that is no token; equal strings are
  // equal symbols. Ids below the vocabulary size are token ids.
  using Symbol = uint32_t;
  struct Merge {
    uint32_t rank = 0;
    Symbol result = 0;
  };
  struct Part {  // of a piece: a run of bytes that has been merged into one symbol
    Symbol symbol = 0;
    int32_t previous = -1;
    int32_t next = -1;
    uint32_t generation = 0;  // changes whenever the part does, so that old candidates are noticed
  };
  struct Candidate {
    uint32_t rank = 0;
    int32_t left = 0;
    int32_t right = 0;
    uint32_t left_generation = 0;
    uint32_t right_generation = 0;
    Symbol result = 0;
  };
  struct Work {  // reused from piece to piece
    std::vector<Part> parts;
    std::vector<Candidate> heap;
  };

  BytePairs() = default;
  Status read_merges(const Gguf& gguf, const Vocabulary& vocabulary);
  Symbol intern(const std::string& text, const Vocabulary& vocabulary,
                std::unordered_map<std::string, Symbol>& others);
  void encode_piece(std::string_view bytes, Work& work, std::vector<TokenId>& out) const;
  void add_candidate(int32_t left, int32_t right, Work& work) const;
  void merge_all(Work& work) const;

  const Vocabulary* vocabulary_ = nullptr;
  const PreTokenizer* pretokenizer_ = nullptr;
  std::array<Symbol, 256> byte_symbols_{};
  std::unordered_map<uint64_t, Merge> merges_;  // by left << 32 | right
  std::vector<std::string> other_symbols_;      // texts of symbols from the vocabulary size on
};

}  // namespace kvant::model
