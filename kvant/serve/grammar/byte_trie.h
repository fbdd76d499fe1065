// Byte strings with ids as a trie in preorder: one array, walked front to back, with jumps over
// subtrees that cannot match. Immutable and thread-safe once built.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace kvant::serve::grammar {

class ByteTrie {
 public:
  struct Node {
    uint32_t subtree_end;  // index of the first node behind those below this one
    uint32_t first_id;     // into ids(); its own come first, then those of the nodes below
    uint16_t depth;        // 1 for the first byte
    uint8_t byte;
  };
  static constexpr size_t kMaxLength = 4096;  // longer strings are left out

  ByteTrie() : nodes_{{0, 0, 0, 0}} {}
  // Empty strings are left out. Several ids may have the same string.
  explicit ByteTrie(std::vector<std::pair<std::string_view, int32_t>> strings);

  size_t num_nodes() const { return nodes_.size() - 1; }
  size_t max_depth() const { return max_depth_; }
  size_t memory_bytes() const { return nodes_.size() * sizeof(Node) + ids_.size() * 4; }
  const Node& node(size_t index) const { return nodes_[index]; }
  // Of the strings that end at a node.
  std::span<const int32_t> ids_at(size_t index) const {
    return ids_between(nodes_[index].first_id, nodes_[index + 1].first_id);
  }
  // Of the strings that go on below it.
  std::span<const int32_t> ids_below(size_t index) const {
    return ids_between(first_id_below(index), nodes_[nodes_[index].subtree_end].first_id);
  }
  // Where these begin among all ids, which are in the order of their strings.
  size_t first_id_below(size_t index) const { return nodes_[index + 1].first_id; }
  size_t num_ids() const { return ids_.size(); }

  // Calls next(state, byte) down the trie and visit(node index, state) for each node with a state;
  // a negative state leaves out everything below, as do a depth above `max_depth` and a visit that
  // returns false. `states` is scratch memory.
  template <typename Next, typename Visit>
  void walk(int32_t start, size_t max_depth, std::vector<int32_t>& states, Next next,
            Visit visit) const {
    states.resize(max_depth_ + 1);
    states[0] = start;
    for (size_t i = 0; i + 1 < nodes_.size();) {
      const Node& node = nodes_[i];
      const int32_t state = node.depth > max_depth ? -1 : next(states[node.depth - 1], node.byte);
      if (state < 0) {
        i = node.subtree_end;
        continue;
      }
      states[node.depth] = state;
      i = visit(i, state) ? i + 1 : node.subtree_end;
    }
  }

 private:
  std::span<const int32_t> ids_between(size_t begin, size_t end) const {
    return std::span(ids_).subspan(begin, end - begin);
  }
  std::vector<Node> nodes_;  // and one behind the last
  std::vector<int32_t> ids_;
  size_t max_depth_ = 0;
};

}  // namespace kvant::serve::grammar
