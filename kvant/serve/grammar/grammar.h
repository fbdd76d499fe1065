// A context-free grammar over bytes, as a recursive transition network: every rule is a small
// automaton whose edges read a range of bytes or call a rule.
//
// GrammarBuilder is what the compilers of JSON schemas, regular expressions and choices write
// (json_schema.h, regex.h); Machine runs the finished Grammar. A Grammar is immutable and
// thread-safe; a builder is single-thread.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::serve::grammar {

using NodeId = int32_t;
using RuleId = int32_t;

inline constexpr uint32_t kUnbounded = UINT32_MAX;

struct ByteEdge {
  uint8_t first;
  uint8_t last;  // inclusive
  NodeId target;
};

// Calls `rule` min to max times and goes on at `target`. A count other than 1 to 1 is kept on the
// stack, so that counts cost no nodes.
struct CallEdge {
  RuleId rule;
  NodeId target;
  uint32_t min = 1;
  uint32_t max = 1;  // kUnbounded: no limit
  bool is_plain() const { return min == 1 && max == 1; }
};

class Grammar {
 public:
  std::span<const ByteEdge> bytes(NodeId node) const { return slice(bytes_, nodes_, node, 0); }
  std::span<const CallEdge> calls(NodeId node) const { return slice(calls_, nodes_, node, 1); }
  std::span<const NodeId> empties(NodeId node) const { return slice(empties_, nodes_, node, 2); }
  bool accepts(NodeId node) const { return accepts_[node]; }  // its rule may end here
  // Nothing but the end of its rule follows: a call that returns here need not return here.
  bool only_accepts(NodeId node) const {
    return accepts_[node] && bytes(node).empty() && calls(node).empty() && empties(node).empty();
  }
  NodeId start(RuleId rule) const { return starts_[rule]; }
  RuleId root() const { return root_; }
  size_t num_nodes() const { return accepts_.size(); }
  RuleId num_rules() const { return static_cast<RuleId>(starts_.size()); }

  // Bytes of one class are on the same edges everywhere.
  uint8_t byte_class(uint8_t byte) const { return class_of_[byte]; }
  int num_classes() const { return num_classes_; }

 private:
  friend class GrammarBuilder;
  using Offsets = std::array<uint32_t, 3>;  // where a node's edges begin; the next node's: end

  template <typename T>
  static std::span<const T> slice(const std::vector<T>& all, const std::vector<Offsets>& nodes,
                                  NodeId node, int kind) {
    const uint32_t begin = nodes[node][kind];
    return std::span(all).subspan(begin, nodes[node + 1][kind] - begin);
  }

  std::vector<Offsets> nodes_;  // [num_nodes + 1]
  std::vector<ByteEdge> bytes_;
  std::vector<CallEdge> calls_;
  std::vector<NodeId> empties_;
  std::vector<bool> accepts_;
  std::vector<NodeId> starts_;  // by rule
  RuleId root_ = 0;
  std::array<uint8_t, 256> class_of_ = {};
  int num_classes_ = 0;
};

// Functions that take `from` add edges there and return the node where the text goes on.
class GrammarBuilder {
 public:
  // Writes a part of the grammar from a node and returns the node behind it.
  using Part = std::function<NodeId(NodeId from)>;

  // What a grammar may have; build() fails beyond, and the builder stops growing. 200,000 edges are
  // a schema of some thousand properties.
  static constexpr size_t kMaxEdges = 200'000;

  RuleId new_rule();  // with a start node and no end yet
  NodeId start(RuleId rule) const { return starts_[rule]; }
  void end_rule(RuleId rule, NodeId at);

  NodeId new_node();
  void byte_edge(NodeId from, uint8_t first, uint8_t last, NodeId to);
  void empty_edge(NodeId from, NodeId to);
  void call_edge(NodeId from, const CallEdge& edge);

  NodeId literal(NodeId from, std::string_view text);
  NodeId call(NodeId from, RuleId rule);
  NodeId any_of(NodeId from, std::span<const Part> parts);
  NodeId optional(NodeId from, const Part& part);
  // min to max times; `part` must not match the empty text if max is neither 1 nor kUnbounded.
  NodeId repeat(NodeId from, const Part& part, uint32_t min, uint32_t max);

  bool is_full() const { return num_edges() > kMaxEdges; }
  size_t num_edges() const { return bytes_.size() + calls_.size() + empties_.size(); }

  // kInvalidArgument if the grammar is too large, if a rule calls itself before it has read
  // anything, or if no text satisfies it.
  Result<Grammar> build(RuleId root);

 private:
  template <typename Edge>
  struct From {
    NodeId from;
    Edge edge;
  };
  std::vector<bool> productive_nodes() const;
  void drop_dead_ends(const std::vector<bool>& productive);
  std::vector<bool> nullable_rules() const;
  bool calls_itself_first(const std::vector<bool>& nullable) const;

  std::vector<From<ByteEdge>> bytes_;
  std::vector<From<CallEdge>> calls_;
  std::vector<From<NodeId>> empties_;
  std::vector<bool> accepts_;   // by node
  std::vector<NodeId> starts_;  // by rule
};

}  // namespace kvant::serve::grammar
