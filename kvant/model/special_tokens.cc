#include "kvant/model/special_tokens.h"

#include <algorithm>
#include <functional>

namespace kvant::model {

SpecialTokens::SpecialTokens(const Vocabulary& vocabulary) : nodes_(1), roots_(256, 0) {
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    if (!vocabulary.is_special(id)) continue;
    uint32_t node = 0;
    for (const char c : vocabulary.text(id)) {
      const unsigned char byte = static_cast<unsigned char>(c);
      uint32_t next = child(node, byte);
      if (next == 0) {
        next = static_cast<uint32_t>(nodes_.size());
        nodes_.push_back({.length = nodes_[node].length + 1});
        if (node == 0) {
          roots_[byte] = next;
        } else {
          children_.emplace(uint64_t{node} << 8 | byte, next);
        }
      }
      node = next;
    }
    nodes_[node].token = id;
    nodes_[node].user_defined_only = (vocabulary.kind(id) & (kTokenControl | kTokenUnknown)) == 0;
  }
  // Links to shorter tokens: walk every token's path once more, now that all tokens are in.
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    if (!vocabulary.is_special(id)) continue;
    uint32_t node = 0;
    uint32_t shorter = 0;
    for (const char c : vocabulary.text(id)) {
      node = child(node, static_cast<unsigned char>(c));
      nodes_[node].shorter = shorter;
      if (nodes_[node].token >= 0) shorter = node;
    }
  }
}

uint32_t SpecialTokens::child(uint32_t node, unsigned char byte) const {
  if (node == 0) return roots_[byte];
  const auto it = children_.find(uint64_t{node} << 8 | byte);
  return it == children_.end() ? 0 : it->second;
}

std::vector<SpecialTokens::Match> SpecialTokens::find_matches(
    std::string_view text, ParseSpecial parse, std::vector<uint32_t>& lengths) const {
  std::vector<Match> matches;
  std::vector<bool> marked;  // nodes whose length, and the shorter ones above them, are in `seen`
  std::vector<bool> seen;    // lengths
  for (size_t begin = 0; begin < text.size(); ++begin) {
    uint32_t node = roots_[static_cast<unsigned char>(text[begin])];
    uint32_t longest = 0;
    for (size_t i = begin + 1; node != 0; ++i) {
      if (wanted(nodes_[node], parse)) longest = node;
      if (i == text.size()) break;
      node = child(node, static_cast<unsigned char>(text[i]));
    }
    if (longest == 0) continue;
    matches.push_back({begin, longest});
    marked.resize(nodes_.size());
    for (uint32_t n = longest; n != 0 && !marked[n]; n = nodes_[n].shorter) {
      marked[n] = true;
      const uint32_t length = nodes_[n].length;
      if (seen.size() <= length) seen.resize(length + 1);
      if (wanted(nodes_[n], parse)) seen[length] = true;
    }
  }
  for (uint32_t length = static_cast<uint32_t>(seen.size()); length-- > 0;) {
    if (seen[length]) lengths.push_back(length);
  }
  return matches;
}

TokenId SpecialTokens::token_of_length(uint32_t node, uint32_t length, ParseSpecial parse) const {
  while (node != 0 && nodes_[node].length > length) node = nodes_[node].shorter;
  if (node == 0 || nodes_[node].length != length || !wanted(nodes_[node], parse)) return -1;
  return nodes_[node].token;
}

std::vector<SpecialTokens::Fragment> SpecialTokens::split(std::string_view text,
                                                          ParseSpecial parse) const {
  std::vector<Fragment> fragments;
  if (text.empty()) return fragments;
  fragments.push_back({0, text.size(), -1});
  std::vector<uint32_t> lengths;  // descending
  std::vector<Match> matches = find_matches(text, parse, lengths);
  std::vector<Fragment> next;
  std::vector<Match> remaining;
  for (const uint32_t length : lengths) {
    next.clear();
    remaining.clear();
    size_t m = 0;
    for (const Fragment& fragment : fragments) {
      if (fragment.token >= 0) {
        next.push_back(fragment);
        continue;
      }
      size_t start = fragment.begin;
      while (m < matches.size() && matches[m].begin < fragment.begin) ++m;
      for (; m < matches.size() && matches[m].begin < fragment.end; ++m) {
        const Match match = matches[m];
        if (match.begin < start) continue;
        const TokenId token = token_of_length(match.node, length, parse);
        if (token < 0 || match.begin + length > fragment.end) {
          remaining.push_back(match);
          continue;
        }
        if (match.begin > start) next.push_back({start, match.begin, -1});
        start = match.begin + length;
        next.push_back({match.begin, start, token});
      }
      if (start < fragment.end) next.push_back({start, fragment.end, -1});
    }
    fragments.swap(next);
    matches.swap(remaining);
  }
  return fragments;
}

}  // namespace kvant::model
