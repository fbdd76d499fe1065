#include "kvant/serve/grammar/char_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <string>

namespace kvant::serve::grammar {
namespace {

constexpr char32_t kLast = 0x10FFFF;
constexpr char32_t kFirstSurrogate = 0xD800;
constexpr char32_t kLastSurrogate = 0xDFFF;

struct Utf8 {
  std::array<uint8_t, 4> bytes;
  int length;
};

Utf8 encode(char32_t c) {
  const auto tail = [c](int shift) { return static_cast<uint8_t>(0x80 | (c >> shift & 0x3f)); };
  if (c < 0x80) return {{static_cast<uint8_t>(c)}, 1};
  if (c < 0x800) return {{static_cast<uint8_t>(0xC0 | c >> 6), tail(0)}, 2};
  if (c < 0x10000) return {{static_cast<uint8_t>(0xE0 | c >> 12), tail(6), tail(0)}, 3};
  return {{static_cast<uint8_t>(0xF0 | c >> 18), tail(12), tail(6), tail(0)}, 4};
}

// Writes ranges of UTF-8 sequences that end at one node; whole tails are shared.
class Utf8Edges {
 public:
  Utf8Edges(GrammarBuilder& builder, NodeId to) : builder_(builder) {
    tails_.fill(-1), tails_[0] = to;
  }

  void add(NodeId from, char32_t first, char32_t last) {
    for (const char32_t end : {char32_t{0x7f}, char32_t{0x7ff}, char32_t{0xffff}, kLast}) {
      if (first > last) return;
      if (first > end) continue;
      const Utf8 low = encode(first);
      const Utf8 high = encode(std::min(last, end));
      add_bytes(from, low.bytes.data(), high.bytes.data(), low.length);
      first = end + 1;
    }
  }

 private:
  void add_bytes(NodeId from, const uint8_t* low, const uint8_t* high, int length) {
    if (length == 1) return builder_.byte_edge(from, *low, *high, tails_[0]);
    const auto through = [&](uint8_t lead, const uint8_t* rest_low, const uint8_t* rest_high) {
      const NodeId next = builder_.new_node();
      builder_.byte_edge(from, lead, lead, next);
      add_bytes(next, rest_low, rest_high, length - 1);
    };
    static constexpr uint8_t kLeast[3] = {0x80, 0x80, 0x80};
    static constexpr uint8_t kMost[3] = {0xBF, 0xBF, 0xBF};
    const bool from_least = std::equal(low + 1, low + length, kLeast);
    const bool to_most = std::equal(high + 1, high + length, kMost);
    if (*low == *high && !(from_least && to_most)) return through(*low, low + 1, high + 1);
    int first = *low;
    int last = *high;
    if (!from_least) through(static_cast<uint8_t>(first++), low + 1, kMost);
    if (!to_most) through(static_cast<uint8_t>(last--), kLeast, high + 1);
    if (first > last) return;
    builder_.byte_edge(from, static_cast<uint8_t>(first), static_cast<uint8_t>(last),
                       tail(length - 1));
  }

  // A node from which `length` continuation bytes lead to the end.
  NodeId tail(int length) {
    if (tails_[length] < 0) {
      const NodeId next = tail(length - 1);
      tails_[length] = builder_.new_node();
      builder_.byte_edge(tails_[length], 0x80, 0xBF, next);
    }
    return tails_[length];
  }

  GrammarBuilder& builder_;
  std::array<NodeId, 4> tails_;
};

std::string escape_of(char32_t c) {
  switch (c) {
    case '"': return "\\\"";
    case '\\': return "\\\\";
    case '\b': return "\\b";
    case '\f': return "\\f";
    case '\n': return "\\n";
    case '\r': return "\\r";
    case '\t': return "\\t";
    default: return fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
  }
}

}  // namespace

CharSet CharSet::all() {
  CharSet set;
  set.add(0, kLast);
  return set;
}

CharSet CharSet::of(char32_t first, char32_t last) {
  CharSet set;
  set.add(first, last);
  return set;
}

void CharSet::add(char32_t first, char32_t last) {
  ranges_.emplace_back(first, std::min(last, kLast));
  normalize();
}

void CharSet::add(const CharSet& other) {
  ranges_.insert(ranges_.end(), other.ranges_.begin(), other.ranges_.end());
  normalize();
}

void CharSet::normalize() {
  std::vector<std::pair<char32_t, char32_t>> cut;  // around the surrogates
  for (const auto& [first, last] : ranges_) {
    if (first < kFirstSurrogate)
      cut.emplace_back(first, std::min<char32_t>(last, kFirstSurrogate - 1));
    if (last > kLastSurrogate)
      cut.emplace_back(std::max<char32_t>(first, kLastSurrogate + 1), last);
  }
  std::erase_if(cut, [](const auto& range) { return range.first > range.second; });
  std::ranges::sort(cut);
  ranges_.clear();
  for (const auto& range : cut) {
    if (!ranges_.empty() && range.first <= ranges_.back().second + 1) {
      ranges_.back().second = std::max(ranges_.back().second, range.second);
    } else {
      ranges_.push_back(range);
    }
  }
}

CharSet CharSet::inverse() const {
  CharSet out;
  char32_t next = 0;
  for (const auto& [first, last] : ranges_) {
    if (first > next) out.ranges_.emplace_back(next, first - 1);
    next = last + 1;
  }
  if (next <= kLast) out.ranges_.emplace_back(next, kLast);
  out.normalize();
  return out;
}

CharSet CharSet::without(const CharSet& other) const {
  CharSet kept = inverse();
  kept.add(other);
  return kept.inverse();
}

void add_chars(GrammarBuilder& builder, NodeId from, const CharSet& set, TextContext context,
               NodeId to) {
  Utf8Edges edges(builder, to);
  const bool in_string = context == TextContext::kJsonString;
  const CharSet plain = plain_in_json_string();
  const CharSet direct = in_string ? set.without(plain.inverse()) : set;
  const CharSet escaped = set.without(plain);
  for (const auto& [first, last] : direct.ranges()) edges.add(from, first, last);
  if (!in_string) return;
  for (const auto& [first, last] : escaped.ranges()) {
    for (char32_t c = first; c <= last; ++c) {
      builder.empty_edge(builder.literal(from, escape_of(c)), to);
    }
  }
}

CharSet plain_in_json_string() {
  CharSet special = CharSet::of(0, 0x1f);
  special.add('"', '"');
  special.add('\\', '\\');
  return special.inverse();
}

}  // namespace kvant::serve::grammar
