// Splits text into the pieces within which byte-level BPE may merge. Internal to model/.
//
// A pre-tokenizer is a row of a table (pretokenizer.cc): the names that files use for it, and its
// stages. Each stage is a hand-written scanner that splits a piece further, in linear time; it
// stands for one regular expression, stated beside it. Thread-safe (pure functions).
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/unicode.h"

namespace kvant::model {

// A text as code points and their classes.
struct ClassifiedText {
  explicit ClassifiedText(std::vector<char32_t> text);
  std::vector<char32_t> code_points;
  std::vector<CharClass> classes;  // [code_points.size()]
};

struct Piece {
  size_t begin = 0;  // code points [begin, end)
  size_t end = 0;
};

struct PreTokenizer {
  // Appends pieces that cover `piece` without gaps, none of them empty.
  using Stage = void (*)(const ClassifiedText& text, Piece piece, std::vector<Piece>& out);

  std::string_view name;
  std::vector<Stage> stages;
  bool ignore_merges = false;  // a piece that is a token as a whole is not split further
  bool add_bos = false;        // unless the file says otherwise

  std::vector<Piece> split(const ClassifiedText& text) const;
};

// Looks up the value of `tokenizer.ggml.pre`. kUnsupported for an unknown name, listing those
// known.
Result<const PreTokenizer*> find_pretokenizer(std::string_view name);

}  // namespace kvant::model
