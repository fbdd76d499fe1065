#include <fmt/format.h>

#include <algorithm>

#include "kvant/model/jinja_syntax.h"
#include "kvant/model/unicode.h"

namespace kvant::model::jinja {
namespace {

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_name_start(char c) {
  return c == '_' || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
}
bool is_name(char c) {
  return is_name_start(c) || is_digit(c);
}

// Longest first.
constexpr std::string_view kOperators[] = {"**", "//", "==", "!=", "<=", ">=", "+", "-", "*",
                                           "/",  "%",  "~",  "<",  ">",  "=",  "(", ")", "[",
                                           "]",  "{",  "}",  ",",  ".",  ":",  "|"};

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  Result<std::vector<Token>> run() {
    while (at_ < source_.size()) {
      size_t tag = at_;
      while (tag < source_.size() && !opens_tag(tag)) ++tag;
      std::string_view text = view().substr(at_, tag - at_);
      const char kind = tag < source_.size() ? source_[tag + 1] : '\0';
      const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
      if (kind != '\0') text = strip_before_tag(text, kind, sign);
      if (!text.empty()) push(Token::Kind::kText, std::string(text));
      advance(tag);
      if (kind == '\0') break;
      if (kind == '#') {
        KVANT_TRY(skip_comment());
      } else {
        advance(at_ + (sign == '-' || sign == '+' ? 3 : 2));
        KVANT_TRY(kind == '%' ? read_block() : read_tag(Token::Kind::kPrintBegin));
      }
    }
    push(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  std::string_view view() const { return source_; }
  bool looking_at(std::string_view what) const { return view().substr(at_).starts_with(what); }
  bool opens_tag(size_t at) const {
    return source_[at] == '{' && at + 1 < source_.size() &&
           (source_[at + 1] == '%' || source_[at + 1] == '{' || source_[at + 1] == '#');
  }
  void push(Token::Kind kind, std::string text) {
    tokens_.push_back({kind, std::move(text), line_});
  }
  void advance(size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         source_.begin() + static_cast<std::ptrdiff_t>(to), '\n'));
    at_ = to;
  }

  // The text in front of a tag: without trailing white space for "{%-", and without the indentation
  // of a block or comment that is the first thing on its line.
  std::string_view strip_before_tag(std::string_view text, char kind, char sign) const {
    if (sign == '-') {
      while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
      return text;
    }
    if (sign == '+' || kind == '{') return text;
    const size_t newline = text.rfind('\n');
    const size_t line_start = newline == std::string_view::npos ? 0 : newline + 1;
    const bool at_line_start = newline != std::string_view::npos || line_starting_;
    const bool blank =
        std::all_of(text.begin() + static_cast<std::ptrdiff_t>(line_start), text.end(), is_space);
    return at_line_start && blank ? text.substr(0, line_start) : text;
  }

  // After the end of a tag: all white space for "-%}", one newline after blocks and comments.
  void strip_after_tag(bool strip_all, bool strip_newline) {
    const size_t before = at_;
    size_t end = at_;
    if (strip_all) {
      while (end < source_.size() && is_space(source_[end])) ++end;
    } else if (strip_newline && end < source_.size() && source_[end] == '\n') {
      ++end;
    }
    advance(end);
    line_starting_ = end > before && source_[end - 1] == '\n';
  }

  Status skip_comment() {
    const size_t end = source_.find("#}", at_ + 2);
    if (end == std::string::npos) return invalid_at(line_, "a comment is not closed");
    const char sign = end > at_ + 2 ? source_[end - 1] : '\0';
    advance(end + 2);
    strip_after_tag(sign == '-', sign != '+');
    return {};
  }

  Status read_block() {
    // {% raw %} ... {% endraw %} is text.
    size_t word = at_;
    while (word < source_.size() && is_space(source_[word])) ++word;
    if (view().substr(word).starts_with("raw") &&
        (word + 3 == source_.size() || !is_name(source_[word + 3]))) {
      return read_raw(word + 3);
    }
    return read_tag(Token::Kind::kBlockBegin);
  }

  Status read_raw(size_t after_word) {
    const int start_line = line_;
    advance(after_word);
    KVANT_TRY(close_block("raw"));
    for (size_t tag = at_; (tag = source_.find("{%", tag)) != std::string::npos; ++tag) {
      size_t word = tag + 2;
      const char sign = word < source_.size() ? source_[word] : '\0';
      if (sign == '-' || sign == '+') ++word;
      while (word < source_.size() && is_space(source_[word])) ++word;
      if (!view().substr(word).starts_with("endraw")) continue;
      const std::string_view text = strip_before_tag(view().substr(at_, tag - at_), '%', sign);
      if (!text.empty()) push(Token::Kind::kText, std::string(text));
      advance(word + 6);
      return close_block("endraw");
    }
    return invalid_at(start_line, "{% raw %} is not closed by {% endraw %}");
  }

  Status close_block(std::string_view name) {
    while (at_ < source_.size() && is_space(source_[at_])) advance(at_ + 1);
    const char sign =
        at_ < source_.size() && (source_[at_] == '-' || source_[at_] == '+') ? source_[at_] : '\0';
    if (sign != '\0') ++at_;
    if (!looking_at("%}")) return invalid_at(line_, fmt::format("expected %}} after {}", name));
    advance(at_ + 2);
    strip_after_tag(sign == '-', sign != '+');
    return {};
  }

  // The tokens of a tag up to its end.
  Status read_tag(Token::Kind begin) {
    const bool block = begin == Token::Kind::kBlockBegin;
    const std::string_view close = block ? "%}" : "}}";
    push(begin, "");
    int brackets = 0;
    for (;;) {
      while (at_ < source_.size() && is_space(source_[at_])) advance(at_ + 1);
      if (at_ >= source_.size()) {
        return invalid_at(line_, fmt::format("the tag is not closed by {}", close));
      }
      const bool sign = source_[at_] == '-' || (block && source_[at_] == '+');
      if (brackets == 0 && view().substr(at_ + (sign ? 1 : 0)).starts_with(close)) {
        const char which = source_[at_];
        push(block ? Token::Kind::kBlockEnd : Token::Kind::kPrintEnd, "");
        advance(at_ + (sign ? 3 : 2));
        strip_after_tag(sign && which == '-', block && which != '+');
        return {};
      }
      KVANT_TRY(read_token(brackets));
    }
  }

  Status read_token(int& brackets) {
    const char c = source_[at_];
    if (is_name_start(c)) {
      size_t end = at_;
      while (end < source_.size() && is_name(source_[end])) ++end;
      push(Token::Kind::kName, source_.substr(at_, end - at_));
      at_ = end;
      return {};
    }
    if (is_digit(c)) return read_number();
    if (c == '"' || c == '\'') return read_string(c);
    for (const std::string_view op : kOperators) {
      if (!looking_at(op)) continue;
      if (op == "(" || op == "[" || op == "{") ++brackets;
      if (op == ")" || op == "]" || op == "}") brackets = std::max(0, brackets - 1);
      push(Token::Kind::kOperator, std::string(op));
      at_ += op.size();
      return {};
    }
    const unsigned char byte = static_cast<unsigned char>(c);
    return invalid_at(line_, byte >= 0x20 && byte < 0x7f
                                 ? fmt::format("unexpected character '{}' in a tag", c)
                                 : fmt::format("unexpected byte {:#04x} in a tag", byte));
  }

  Status read_number() {
    size_t end = at_;
    const auto digits = [&] {
      while (end < source_.size() && (is_digit(source_[end]) || source_[end] == '_')) ++end;
    };
    const auto digit_at = [&](size_t i) { return i < source_.size() && is_digit(source_[i]); };
    digits();
    bool is_float = false;
    if (end < source_.size() && source_[end] == '.' && digit_at(end + 1)) {
      is_float = true;
      ++end;
      digits();
    }
    if (end < source_.size() && (source_[end] | 0x20) == 'e') {
      const bool sign =
          end + 1 < source_.size() && (source_[end + 1] == '-' || source_[end + 1] == '+');
      if (digit_at(end + (sign ? 2 : 1))) {
        is_float = true;
        end += sign ? 2 : 1;
        digits();
      }
    }
    std::string text = source_.substr(at_, end - at_);
    std::erase(text, '_');
    push(is_float ? Token::Kind::kFloat : Token::Kind::kInteger, std::move(text));
    at_ = end;
    return {};
  }

  Status read_string(char quote) {
    const int start_line = line_;
    std::string out;
    size_t i = at_ + 1;
    while (i < source_.size() && source_[i] != quote) {
      if (source_[i] != '\\') {
        out.push_back(source_[i++]);
        continue;
      }
      if (i + 1 >= source_.size()) break;
      KVANT_ASSIGN(i, unescape(i + 1, out));
    }
    if (i >= source_.size()) return invalid_at(start_line, "a string is not closed");
    push(Token::Kind::kString, std::move(out));
    advance(i + 1);
    return {};
  }

  // Python's escapes; an unknown one keeps its backslash. `at` is behind the backslash; returns the
  // position after the escape.
  Result<size_t> unescape(size_t at, std::string& out) const {
    const char c = source_[at];
    switch (c) {
      case 'n': out.push_back('\n'); return at + 1;
      case 'r': out.push_back('\r'); return at + 1;
      case 't': out.push_back('\t'); return at + 1;
      case 'b': out.push_back('\b'); return at + 1;
      case 'f': out.push_back('\f'); return at + 1;
      case 'v': out.push_back('\v'); return at + 1;
      case 'a': out.push_back('\a'); return at + 1;
      case '0': out.push_back('\0'); return at + 1;
      case '\\':
      case '\'':
      case '"': out.push_back(c); return at + 1;
      case '\n': return at + 1;
      case 'x': return unescape_hex(at, 2, out);
      case 'u': return unescape_hex(at, 4, out);
      case 'U': return unescape_hex(at, 8, out);
      default: out += {'\\', c}; return at + 1;
    }
  }

  Result<size_t> unescape_hex(size_t at, size_t digits, std::string& out) const {
    const std::string text = source_.substr(at + 1, digits);
    const bool valid = text.size() == digits &&
                       text.find_first_not_of("0123456789abcdefABCDEF") == std::string::npos;
    const unsigned long value = valid ? std::stoul(text, nullptr, 16) : 0x110000;
    if (value > 0x10ffff) {
      return invalid_at(line_, fmt::format("a broken \\{} escape in a string", source_[at]));
    }
    append_utf8(static_cast<char32_t>(value), out);
    return at + 1 + digits;
  }

  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // nothing has come since a newline
  std::vector<Token> tokens_;
};

}  // namespace

Error error_at(int line, ErrorCode code, std::string_view what) {
  return Error(code, fmt::format("chat template, line {}: {}{}", line, what,
                                 code == ErrorCode::kUnsupported ? " is not supported" : ""));
}

Result<std::vector<Token>> tokenize(std::string_view source) {
  std::string text;
  for (size_t i = 0; i < source.size(); ++i) {  // \r\n and \r are \n
    if (source[i] == '\r') {
      text.push_back('\n');
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      text.push_back(source[i]);
    }
  }
  if (text.ends_with('\n')) text.pop_back();
  return Lexer(std::move(text)).run();
}

}  // namespace kvant::model::jinja
