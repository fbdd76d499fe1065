#include "kvant/serve/grammar/regex.h"

#include <fmt/format.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kvant::serve::grammar {
namespace {

constexpr int kMaxDepth = 100;            // of groups in groups
constexpr size_t kMaxPattern = 16 << 10;  // bytes
constexpr uint32_t kMaxCount = 100'000;   // in braces
constexpr uint32_t kMaxEmptyCopies = 8;   // of a part that may be empty

struct Node;
using NodePtr = std::unique_ptr<Node>;

struct Node {
  enum class Kind { kChars, kSequence, kChoice, kRepeat } kind = Kind::kSequence;
  CharSet chars;
  std::vector<NodePtr> parts;
  uint32_t min = 1;
  uint32_t max = 1;

  bool may_be_empty() const {
    if (kind == Kind::kChars) return false;
    if (kind == Kind::kRepeat) return min == 0 || parts[0]->may_be_empty();
    const bool any = kind == Kind::kChoice;
    for (const NodePtr& part : parts) {
      if (part->may_be_empty() == any) return any;
    }
    return !any;
  }
};

NodePtr chars_node(CharSet set) {
  auto node = std::make_unique<Node>();
  node->kind = Node::Kind::kChars;
  node->chars = std::move(set);
  return node;
}

NodePtr repeat_node(NodePtr part, uint32_t min, uint32_t max) {
  auto node = std::make_unique<Node>();
  node->kind = Node::Kind::kRepeat;
  node->min = min;
  node->max = max;
  node->parts.push_back(std::move(part));
  return node;
}

CharSet digits() {
  return CharSet::of('0', '9');
}

CharSet word_chars() {
  CharSet set = digits();
  set.add('a', 'z');
  set.add('A', 'Z');
  set.add('_', '_');
  return set;
}

CharSet spaces() {
  CharSet set = CharSet::of('\t', '\r');
  for (const char32_t c : {0x20, 0xa0, 0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000, 0xfeff}) {
    set.add(c, c);
  }
  set.add(0x2000, 0x200a);
  return set;
}

CharSet any_but_newline() {
  CharSet set;
  for (const char32_t c : {0x0a, 0x0d, 0x2028, 0x2029}) set.add(c, c);
  return set.inverse();
}

class Parser {
 public:
  Parser(std::string_view pattern, RegexMatch match) : pattern_(pattern), match_(match) {}

  Result<NodePtr> parse() {
    if (pattern_.size() > kMaxPattern) {
      return error(
          ErrorCode::kInvalidArgument,
          fmt::format("the expression has {} bytes; at most {}", pattern_.size(), kMaxPattern));
    }
    KVANT_ASSIGN(NodePtr node, choice(0));
    if (!at_end()) return error(ErrorCode::kInvalidArgument, "unmatched )");
    return node;
  }

 private:
  bool at_end() const { return at_ == pattern_.size(); }
  bool looking_at(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  bool take(std::string_view text) {
    if (!looking_at(text)) return false;
    at_ += text.size();
    return true;
  }

  Error error(ErrorCode code, std::string_view what) const {
    return Error(code, fmt::format("regular expression, position {}: {}", at_, what));
  }
  Error invalid(std::string_view what) const { return error(ErrorCode::kInvalidArgument, what); }
  Error unsupported(std::string_view what) const {
    return error(ErrorCode::kUnsupported, fmt::format("{} is not supported", what));
  }

  Result<NodePtr> choice(int depth) {
    if (depth > kMaxDepth) return invalid(fmt::format("more than {} nested groups", kMaxDepth));
    auto node = std::make_unique<Node>();
    node->kind = Node::Kind::kChoice;
    do {
      KVANT_ASSIGN(NodePtr part, sequence(depth));
      node->parts.push_back(std::move(part));
    } while (take("|"));
    return node;
  }

  Result<NodePtr> sequence(int depth) {
    auto node = std::make_unique<Node>();
    const bool search = match_ == RegexMatch::kSearch && depth == 0;
    if (depth == 0 && take("^")) {
      // The match begins where the text does.
    } else if (search) {
      node->parts.push_back(repeat_node(chars_node(CharSet::all()), 0, kUnbounded));
    }
    bool ends_text = false;
    while (!at_end() && !looking_at("|") && !looking_at(")")) {
      if (looking_at("^") || looking_at("$")) {
        ends_text = depth == 0 && take("$") && (at_end() || looking_at("|"));
        if (!ends_text) return unsupported("an anchor inside the expression");
        continue;
      }
      KVANT_ASSIGN(NodePtr part, atom(depth));
      KVANT_ASSIGN(part, quantified(std::move(part)));
      node->parts.push_back(std::move(part));
    }
    if (search && !ends_text) {
      node->parts.push_back(repeat_node(chars_node(CharSet::all()), 0, kUnbounded));
    }
    return node;
  }

  Result<NodePtr> quantified(NodePtr part) {
    uint32_t min = 1;
    uint32_t max = 1;
    if (take("*")) {
      min = 0, max = kUnbounded;
    } else if (take("+")) {
      max = kUnbounded;
    } else if (take("?")) {
      min = 0;
    } else if (looking_at("{")) {
      KVANT_TRY(braces(min, max));
    } else {
      return part;
    }
    take("?");  // lazy: the same language
    if (looking_at("+")) return unsupported("a possessive quantifier");
    if (looking_at("*") || looking_at("{") || looking_at("?")) {
      return invalid("a quantifier after a quantifier");
    }
    if (part->may_be_empty() && max != 1) {
      if (max != kUnbounded && max > kMaxEmptyCopies) {
        return unsupported(fmt::format("a part that may be empty, up to {} times", max));
      }
      min = 0;  // its empty matches make up the rest
    }
    return repeat_node(std::move(part), min, max);
  }

  Status braces(uint32_t& min, uint32_t& max) {
    take("{");
    const auto number = [&](uint32_t& out) {
      const size_t begin = at_;
      uint64_t value = 0;
      while (!at_end() && pattern_[at_] >= '0' && pattern_[at_] <= '9' && at_ - begin < 9) {
        value = value * 10 + static_cast<uint64_t>(pattern_[at_++] - '0');
      }
      out = static_cast<uint32_t>(value);
      return at_ > begin;
    };
    if (!number(min)) return invalid("expected a number after {");
    max = min;
    if (take(",") && !number(max)) max = kUnbounded;
    if (!take("}")) return invalid("expected }");
    if (max < min) return invalid("a range that ends before it begins");
    if (min > kMaxCount || (max != kUnbounded && max > kMaxCount)) {
      return invalid(fmt::format("a count above {}", kMaxCount));
    }
    return {};
  }

  Result<NodePtr> atom(int depth) {
    if (looking_at("*") || looking_at("+") || looking_at("?") || looking_at("{")) {
      return invalid("a quantifier without anything before it");
    }
    if (take("(")) return group(depth);
    if (take("[")) {
      KVANT_ASSIGN(CharSet set, char_class());
      return chars_node(std::move(set));
    }
    if (take(".")) return chars_node(any_but_newline());
    if (take("\\")) {
      KVANT_ASSIGN(CharSet set, escape(false));
      return chars_node(std::move(set));
    }
    KVANT_ASSIGN(const char32_t c, character());
    return chars_node(CharSet::of(c, c));
  }

  Result<NodePtr> group(int depth) {
    if (take("?P<") ||
        (looking_at("?<") && !looking_at("?<=") && !looking_at("?<!") && take("?<"))) {
      const size_t close = pattern_.find('>', at_);
      if (close == std::string_view::npos) return invalid("a group's name without >");
      at_ = close + 1;
    } else if (looking_at("?") && !take("?:")) {
      return unsupported(fmt::format("a group that begins with ({}", pattern_.substr(at_, 3)));
    }
    KVANT_ASSIGN(NodePtr node, choice(depth + 1));
    if (!take(")")) return invalid("expected )");
    return node;
  }

  Result<CharSet> char_class() {
    const bool inverse = take("^");
    CharSet set;
    bool first = true;
    while (first || !looking_at("]")) {
      if (at_end()) return invalid("expected ]");
      if (first && looking_at("]")) {  // ECMAScript's empty class; Python's literal ]
        return unsupported("a class that begins with ]");
      }
      first = false;
      KVANT_ASSIGN(CharSet low, class_item());
      if (!looking_at("-") || looking_at("-]")) {
        set.add(low);
        continue;
      }
      take("-");
      if (at_end()) return invalid("expected ]");
      KVANT_ASSIGN(CharSet high, class_item());
      const auto single = [](const CharSet& s) {
        return s.ranges().size() == 1 && s.ranges()[0].first == s.ranges()[0].second;
      };
      if (!single(low) || !single(high)) return invalid("a range whose ends are not characters");
      if (low.ranges()[0].first > high.ranges()[0].first) return invalid("a range backwards");
      set.add(low.ranges()[0].first, high.ranges()[0].first);
    }
    take("]");
    return inverse ? set.inverse() : set;
  }

  Result<CharSet> class_item() {
    if (looking_at("[:")) return unsupported("a named class");
    if (take("\\")) return escape(true);
    KVANT_ASSIGN(const char32_t c, character());
    return CharSet::of(c, c);
  }

  Result<CharSet> escape(bool in_class) {
    if (at_end()) return invalid("a backslash at the end");
    const char c = pattern_[at_];
    const auto single = [&](char32_t code) {
      ++at_;
      return CharSet::of(code, code);
    };
    const auto set = [&](CharSet chars, bool inverse) {
      ++at_;
      return inverse ? chars.inverse() : chars;
    };
    switch (c) {
      case 'd':
      case 'D': return set(digits(), c == 'D');
      case 'w':
      case 'W': return set(word_chars(), c == 'W');
      case 's':
      case 'S': return set(spaces(), c == 'S');
      case 't': return single('\t');
      case 'n': return single('\n');
      case 'r': return single('\r');
      case 'f': return single('\f');
      case 'v': return single('\v');
      case '0': return single(0);
      case 'x': ++at_; return hex(2, 2);
      case 'u': return unicode_escape();
      case 'b':
        if (in_class) return single('\b');
        break;
      default: break;
    }
    const bool is_word = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (is_word) return unsupported(fmt::format("\\{}", c));
    KVANT_ASSIGN(const char32_t literal, character());
    return CharSet::of(literal, literal);
  }

  Result<CharSet> hex(int min_digits, int max_digits) {
    char32_t value = 0;
    int count = 0;
    for (; count < max_digits && !at_end(); ++count, ++at_) {
      const char c = pattern_[at_];
      if (c >= '0' && c <= '9')
        value = value * 16 + static_cast<char32_t>(c - '0');
      else if (c >= 'a' && c <= 'f')
        value = value * 16 + static_cast<char32_t>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F')
        value = value * 16 + static_cast<char32_t>(c - 'A' + 10);
      else
        break;
    }
    if (count < min_digits) return invalid("expected hexadecimal digits");
    if (value > 0x10FFFF) return invalid("a character above 10FFFF");
    last_hex_ = value;
    return CharSet::of(value, value);
  }

  Result<CharSet> unicode_escape() {
    take("u");
    if (take("{")) {
      KVANT_ASSIGN(CharSet set, hex(1, 6));
      if (!take("}")) return invalid("expected }");
      return set;
    }
    KVANT_ASSIGN(CharSet set, hex(4, 4));
    const char32_t high = last_hex_;
    if (high < 0xD800 || high > 0xDFFF) return set;
    if (high > 0xDBFF || !take("\\u")) return invalid("half of a surrogate pair");
    KVANT_TRY(hex(4, 4));
    if (last_hex_ < 0xDC00 || last_hex_ > 0xDFFF) return invalid("half of a surrogate pair");
    const char32_t c = 0x10000 + ((high - 0xD800) << 10) + (last_hex_ - 0xDC00);
    return CharSet::of(c, c);
  }

  Result<char32_t> character() {
    const auto byte = static_cast<unsigned char>(pattern_[at_]);
    const int length = byte < 0x80   ? 1
                       : byte < 0xC2 ? 0
                       : byte < 0xE0 ? 2
                       : byte < 0xF0 ? 3
                       : byte < 0xF5 ? 4
                                     : 0;
    if (length == 0 || at_ + static_cast<size_t>(length) > pattern_.size()) {
      return invalid("broken UTF-8");
    }
    char32_t c = length == 1 ? byte : byte & (0x7fu >> length);
    for (int i = 1; i < length; ++i) {
      const auto next = static_cast<unsigned char>(pattern_[at_ + i]);
      if ((next & 0xC0) != 0x80) return invalid("broken UTF-8");
      c = c << 6 | (next & 0x3f);
    }
    at_ += static_cast<size_t>(length);
    return c;
  }

  std::string_view pattern_;
  RegexMatch match_;
  size_t at_ = 0;
  char32_t last_hex_ = 0;
};

NodeId emit(GrammarBuilder& builder, NodeId from, const Node& node, TextContext context) {
  if (builder.is_full()) return from;
  const auto part = [&](const Node& child) {
    return [&builder, &child, context](NodeId at) { return emit(builder, at, child, context); };
  };
  switch (node.kind) {
    case Node::Kind::kChars: {
      const NodeId to = builder.new_node();
      add_chars(builder, from, node.chars, context, to);
      return to;
    }
    case Node::Kind::kSequence:
      for (const NodePtr& child : node.parts) from = emit(builder, from, *child, context);
      return from;
    case Node::Kind::kChoice: {
      if (node.parts.size() == 1) return emit(builder, from, *node.parts[0], context);
      std::vector<GrammarBuilder::Part> parts;
      for (const NodePtr& child : node.parts) parts.emplace_back(part(*child));
      return builder.any_of(from, parts);
    }
    case Node::Kind::kRepeat: return builder.repeat(from, part(*node.parts[0]), node.min, node.max);
  }
  return from;
}

}  // namespace

Result<NodeId> add_regex(GrammarBuilder& builder, NodeId from, std::string_view pattern,
                         RegexOptions options) {
  KVANT_ASSIGN(const NodePtr node, Parser(pattern, options.match).parse());
  return emit(builder, from, *node, options.context);
}

}  // namespace kvant::serve::grammar
