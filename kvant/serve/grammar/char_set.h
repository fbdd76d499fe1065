// Sets of Unicode characters, written into grammars as UTF-8 or as the contents of JSON strings.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kvant/serve/grammar/grammar.h"

namespace kvant::serve::grammar {

// Where text stands: as it is, or between the quotes of a JSON string, where quotes, backslashes
// and control characters are escaped.
enum class TextContext { kPlain, kJsonString };

// Characters as sorted, disjoint, non-adjacent ranges; never surrogates.
class CharSet {
 public:
  CharSet() = default;
  static CharSet all();
  static CharSet of(char32_t first, char32_t last);

  void add(char32_t first, char32_t last);
  void add(const CharSet& other);
  CharSet inverse() const;
  CharSet without(const CharSet& other) const;
  bool empty() const { return ranges_.empty(); }
  const std::vector<std::pair<char32_t, char32_t>>& ranges() const { return ranges_; }

 private:
  void normalize();
  std::vector<std::pair<char32_t, char32_t>> ranges_;
};

// Edges from `from` to `to` that read one character of the set.
void add_chars(GrammarBuilder& builder, NodeId from, const CharSet& set, TextContext context,
               NodeId to);

// What a JSON string may hold without a backslash.
CharSet plain_in_json_string();

}  // namespace kvant::serve::grammar
