#include "kvant/model/pretokenizer.h"

#include <fmt/format.h>

#include <array>

namespace kvant::model {
namespace {

// A view of one piece: positions outside it have no code point, whatever the text has there.
class Scanner {
 public:
  Scanner(const ClassifiedText& text, Piece piece, std::vector<Piece>& out)
      : text_(text), end_(piece.end), pos_(piece.begin), out_(out) {}

  bool done() const { return pos_ == end_; }
  bool inside(size_t ahead) const { return pos_ + ahead < end_; }
  // The code point `ahead` of the position; no character past the end.
  char32_t at(size_t ahead) const {
    return inside(ahead) ? text_.code_points[pos_ + ahead] : kNone;
  }
  bool is(CharClass wanted, size_t ahead) const {
    return inside(ahead) && text_.classes[pos_ + ahead] == wanted;
  }
  bool is_letter(size_t ahead) const { return is(CharClass::kLetter, ahead); }
  bool is_number(size_t ahead) const { return is(CharClass::kNumber, ahead); }
  bool is_space(size_t ahead) const { return is(CharClass::kSpace, ahead); }
  // [^\s\p{L}\p{N}]
  bool is_symbol(size_t ahead) const {
    return is(CharClass::kOther, ahead) || is(CharClass::kPunctuation, ahead);
  }
  bool is_line_end(size_t ahead) const { return at(ahead) == U'\r' || at(ahead) == U'\n'; }

  void emit(size_t length) {
    out_.push_back({pos_, pos_ + length});
    pos_ += length;
  }

 private:
  static constexpr char32_t kNone = 0xffffffff;
  const ClassifiedText& text_;
  size_t end_;
  size_t pos_;
  std::vector<Piece>& out_;
};

enum class Case { kSensitive, kInsensitive };

// Length of 's 't 're 've 'm 'll 'd at the position, 0 if there is none.
size_t contraction(const Scanner& scan, Case sensitivity) {
  if (scan.at(0) != U'\'') return 0;
  const auto letter = [&scan, sensitivity](size_t ahead) {
    const char32_t c = scan.at(ahead);
    return sensitivity == Case::kInsensitive && c >= U'A' && c <= U'Z' ? c + 32 : c;
  };
  const char32_t first = letter(1);
  if (first == U's' || first == U't' || first == U'm' || first == U'd') return 2;
  const char32_t second = letter(2);
  if ((first == U'r' && second == U'e') || (first == U'v' && second == U'e') ||
      (first == U'l' && second == U'l')) {
    return 3;
  }
  return 0;
}

// \s+(?!\S)|\s+ : leaves the last space to the word that follows, if there is a word and more than
// one space. The position is at a space.
void emit_spaces(Scanner& scan) {
  size_t n = 1;
  while (scan.is_space(n)) ++n;
  scan.emit(n > 1 && scan.inside(n) ? n - 1 : n);
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
void split_gpt2(const ClassifiedText& text, Piece piece, std::vector<Piece>& out) {
  Scanner scan(text, piece, out);
  while (!scan.done()) {
    if (const size_t length = contraction(scan, Case::kSensitive); length != 0) {
      scan.emit(length);
      continue;
    }
    const size_t start = scan.at(0) == U' ' ? 1 : 0;
    size_t n = start;
    if (scan.is_letter(n)) {
      while (scan.is_letter(n)) ++n;
    } else if (scan.is_number(n)) {
      while (scan.is_number(n)) ++n;
    } else {
      while (scan.is_symbol(n)) ++n;
    }
    if (n > start) {
      scan.emit(n);
    } else {
      emit_spaces(scan);
    }
  }
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,kMaxDigits}|
// ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
template <size_t kMaxDigits>
void split_llama3(const ClassifiedText& text, Piece piece, std::vector<Piece>& out) {
  Scanner scan(text, piece, out);
  while (!scan.done()) {
    if (const size_t length = contraction(scan, Case::kInsensitive); length != 0) {
      scan.emit(length);
      continue;
    }
    const bool may_lead = !scan.is_line_end(0) && !scan.is_number(0);
    if (scan.is_letter(0) || (may_lead && scan.is_letter(1))) {
      size_t n = 1;
      while (scan.is_letter(n)) ++n;
      scan.emit(n);
      continue;
    }
    if (scan.is_number(0)) {
      size_t n = 1;
      while (n < kMaxDigits && scan.is_number(n)) ++n;
      scan.emit(n);
      continue;
    }
    const size_t start = scan.at(0) == U' ' ? 1 : 0;
    if (scan.is_symbol(start)) {
      size_t n = start + 1;
      while (scan.is_symbol(n)) ++n;
      while (scan.is_line_end(n)) ++n;
      scan.emit(n);
      continue;
    }
    size_t after_line_end = 0;  // end of the last \r or \n in the run of spaces
    for (size_t n = 0; scan.is_space(n); ++n) {
      if (scan.is_line_end(n)) after_line_end = n + 1;
    }
    if (after_line_end != 0) {
      scan.emit(after_line_end);
    } else {
      emit_spaces(scan);
    }
  }
}

// Splits where `in_run` changes; each run of kMaxRun such characters is a piece, the rest stays
// whole.
template <size_t kMaxRun, typename InRun>
void isolate_runs(const ClassifiedText& text, Piece piece, std::vector<Piece>& out, InRun in_run) {
  size_t start = piece.begin;
  size_t i = piece.begin;
  while (i < piece.end) {
    if (!in_run(text, i)) {
      ++i;
      continue;
    }
    if (i > start) out.push_back({start, i});
    start = i;
    while (i < piece.end && i - start < kMaxRun && in_run(text, i)) ++i;
    out.push_back({start, i});
    start = i;
  }
  if (piece.end > start) out.push_back({start, piece.end});
}

bool is_number(const ClassifiedText& text, size_t i) {
  return text.classes[i] == CharClass::kNumber;
}

constexpr size_t kNoLimit = static_cast<size_t>(-1);

// \p{N}
void isolate_digits(const ClassifiedText& text, Piece piece, std::vector<Piece>& out) {
  isolate_runs<1>(text, piece, out, is_number);
}

// \p{N}+
void isolate_numbers(const ClassifiedText& text, Piece piece, std::vector<Piece>& out) {
  isolate_runs<kNoLimit>(text, piece, out, is_number);
}

// [\p{P}\$\+<=>\^~\|]+
void isolate_punctuation(const ClassifiedText& text, Piece piece, std::vector<Piece>& out) {
  isolate_runs<kNoLimit>(text, piece, out, [](const ClassifiedText& t, size_t i) {
    const char32_t c = t.code_points[i];
    return t.classes[i] == CharClass::kPunctuation || c == U'$' || c == U'+' || c == U'<' ||
           c == U'=' || c == U'>' || c == U'^' || c == U'~' || c == U'|';
  });
}

// [0-9][0-9][0-9]
void isolate_digit_triples(const ClassifiedText& text, Piece piece, std::vector<Piece>& out) {
  const auto digit = [&text](size_t i) {
    return text.code_points[i] >= U'0' && text.code_points[i] <= U'9';
  };
  size_t start = piece.begin;
  size_t i = piece.begin;
  while (i < piece.end) {
    if (i + 3 > piece.end || !digit(i) || !digit(i + 1) || !digit(i + 2)) {
      ++i;
      continue;
    }
    if (i > start) out.push_back({start, i});
    out.push_back({i, i + 3});
    i += 3;
    start = i;
  }
  if (piece.end > start) out.push_back({start, piece.end});
}

// One row for each rule and each name that files use for it.
const std::vector<PreTokenizer>& table() {
  static const std::vector<PreTokenizer> rows = {
      {.name = "smollm", .stages = {isolate_digits, split_gpt2}},
      {.name = "starcoder", .stages = {isolate_digits, split_gpt2}},
      {.name = "refact", .stages = {isolate_digits, split_gpt2}},
      {.name = "command-r", .stages = {isolate_digits, split_gpt2}},
      {.name = "qwen2", .stages = {split_llama3<1>}},
      {.name = "deepseek-r1-qwen", .stages = {split_llama3<1>}},
      {.name = "stablelm2", .stages = {split_llama3<1>}},
      {.name = "megrez", .stages = {split_llama3<1>}},
      {.name = "llama-bpe", .stages = {split_llama3<3>}, .ignore_merges = true, .add_bos = true},
      {.name = "llama3", .stages = {split_llama3<3>}, .ignore_merges = true, .add_bos = true},
      {.name = "llama-v3", .stages = {split_llama3<3>}, .ignore_merges = true, .add_bos = true},
      {.name = "falcon3", .stages = {split_llama3<3>}, .ignore_merges = true, .add_bos = true},
      {.name = "pixtral", .stages = {split_llama3<3>}, .ignore_merges = true, .add_bos = true},
      {.name = "dbrx", .stages = {split_llama3<3>}},
      {.name = "smaug-bpe", .stages = {split_llama3<3>}},
      {.name = "gpt-2", .stages = {split_gpt2}},
      {.name = "phi-2", .stages = {split_gpt2}},
      {.name = "mpt", .stages = {split_gpt2}},
      {.name = "olmo", .stages = {split_gpt2}},
      {.name = "default",
       .stages = {isolate_punctuation, split_gpt2, isolate_numbers, isolate_digit_triples}},
  };
  return rows;
}

}  // namespace

ClassifiedText::ClassifiedText(std::vector<char32_t> text) : code_points(std::move(text)) {
  classes.reserve(code_points.size());
  for (const char32_t c : code_points) classes.push_back(char_class(c));
}

std::vector<Piece> PreTokenizer::split(const ClassifiedText& text) const {
  std::vector<Piece> pieces;
  if (text.code_points.empty()) return pieces;
  pieces.push_back({0, text.code_points.size()});
  std::vector<Piece> next;
  for (const Stage stage : stages) {
    next.clear();
    for (const Piece piece : pieces) stage(text, piece, next);
    pieces.swap(next);
  }
  return pieces;
}

Result<const PreTokenizer*> find_pretokenizer(std::string_view name) {
  std::string known;
  for (const PreTokenizer& row : table()) {
    if (row.name == name) return &row;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", row.name);
  }
  return Error(
      ErrorCode::kUnsupported,
      fmt::format("the pre-tokenizer \"{}\" is not supported; supported: {}", name, known));
}

}  // namespace kvant::model
