// Finds special tokens (control, user-defined, unknown) in text, before anything else is tokenized.
// Internal to model/. Immutable and thread-safe once created.
//
// Rule (llama.cpp's): longer tokens first; for each length, occurrences from left to right that do
// not overlap what has been taken. Runs in one pass over the text plus one over the matches for
// each length that occurs.
#pragma once

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvant/model/vocabulary.h"

namespace kvant::model {

enum class ParseSpecial {
  kAll,          // all special tokens
  kUserDefined,  // only tokens that are part of ordinary text (newline runs, markup)
};

class SpecialTokens {
 public:
  // A part of a text: a special token, or raw text if `token` is negative.
  struct Fragment {
    size_t begin = 0;  // bytes [begin, end)
    size_t end = 0;
    TokenId token = -1;
  };

  explicit SpecialTokens(const Vocabulary& vocabulary);

  // Fragments that cover `text` in order, none of them empty.
  std::vector<Fragment> split(std::string_view text, ParseSpecial parse) const;

 private:
  // A trie over bytes. Node 0 is the root.
  struct Node {
    TokenId token = -1;              // that ends here
    bool user_defined_only = false;  // `token` is found in both modes
    uint32_t length = 0;             // bytes from the root
    uint32_t shorter = 0;            // nearest node above with a token; 0 if none
  };
  struct Match {
    size_t begin = 0;
    uint32_t node = 0;  // of the longest token that starts here
  };

  uint32_t child(uint32_t node, unsigned char byte) const;
  std::vector<Match> find_matches(std::string_view text, ParseSpecial parse,
                                  std::vector<uint32_t>& lengths) const;
  bool wanted(const Node& node, ParseSpecial parse) const {
    return node.token >= 0 && (parse == ParseSpecial::kAll || node.user_defined_only);
  }
  // The token of exactly `length` bytes on the way to `node`; negative if there is none.
  TokenId token_of_length(uint32_t node, uint32_t length, ParseSpecial parse) const;

  std::vector<Node> nodes_;
  std::vector<uint32_t> roots_;                      // [256] children of the root
  std::unordered_map<uint64_t, uint32_t> children_;  // (node << 8 | byte) of all other nodes
};

}  // namespace kvant::model
