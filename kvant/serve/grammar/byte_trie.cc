#include "kvant/serve/grammar/byte_trie.h"

#include <algorithm>

namespace kvant::serve::grammar {

ByteTrie::ByteTrie(std::vector<std::pair<std::string_view, int32_t>> strings) {
  std::erase_if(strings, [](const auto& string) {
    return string.first.empty() || string.first.size() > kMaxLength;
  });
  std::sort(strings.begin(), strings.end());
  std::vector<uint32_t> path;  // nodes from the root to the last string's end
  std::string_view last;
  const auto close = [&](size_t depth) {
    for (; path.size() > depth; path.pop_back()) {
      nodes_[path.back()].subtree_end = static_cast<uint32_t>(nodes_.size());
    }
  };
  for (const auto& [string, id] : strings) {
    const size_t shared = static_cast<size_t>(
        std::mismatch(last.begin(), last.end(), string.begin(), string.end()).first - last.begin());
    close(shared);
    for (size_t i = shared; i < string.size(); ++i) {
      path.push_back(static_cast<uint32_t>(nodes_.size()));
      nodes_.push_back({.subtree_end = 0,
                        .first_id = static_cast<uint32_t>(ids_.size()),
                        .depth = static_cast<uint16_t>(i + 1),
                        .byte = static_cast<uint8_t>(string[i])});
    }
    max_depth_ = std::max(max_depth_, string.size());
    ids_.push_back(id);
    last = string;
  }
  close(0);
  nodes_.push_back({0, static_cast<uint32_t>(ids_.size()), 0, 0});
}

}  // namespace kvant::serve::grammar
