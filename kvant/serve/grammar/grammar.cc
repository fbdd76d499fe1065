#include "kvant/serve/grammar/grammar.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kvant/base/check.h"

namespace kvant::serve::grammar {
namespace {

constexpr uint32_t kMaxCopies = 8;  // of a part whose repetition is written out

// Edges of all nodes in the order of their nodes: out[offsets[n] .. offsets[n + 1]) are node n's.
template <typename From, typename Edge>
void sort_by_node(const std::vector<From>& edges, size_t num_nodes, std::vector<uint32_t>& offsets,
                  std::vector<Edge>& out) {
  offsets.assign(num_nodes + 1, 0);
  for (const From& edge : edges) ++offsets[edge.from + 1];
  for (size_t i = 0; i < num_nodes; ++i) offsets[i + 1] += offsets[i];
  std::vector<uint32_t> next(offsets.begin(), offsets.end() - 1);
  out.resize(edges.size());
  for (const From& edge : edges) out[next[edge.from]++] = edge.edge;
}

}  // namespace

RuleId GrammarBuilder::new_rule() {
  starts_.push_back(new_node());
  return static_cast<RuleId>(starts_.size() - 1);
}

void GrammarBuilder::end_rule(RuleId, NodeId at) {
  accepts_[at] = true;
}

NodeId GrammarBuilder::new_node() {
  accepts_.push_back(false);
  return static_cast<NodeId>(accepts_.size() - 1);
}

void GrammarBuilder::byte_edge(NodeId from, uint8_t first, uint8_t last, NodeId to) {
  if (!is_full()) bytes_.push_back({from, {first, last, to}});
}

void GrammarBuilder::empty_edge(NodeId from, NodeId to) {
  if (!is_full()) empties_.push_back({from, to});
}

void GrammarBuilder::call_edge(NodeId from, const CallEdge& edge) {
  if (!is_full()) calls_.push_back({from, edge});
}

NodeId GrammarBuilder::literal(NodeId from, std::string_view text) {
  for (const char c : text) {
    if (is_full()) break;
    const NodeId to = new_node();
    byte_edge(from, static_cast<uint8_t>(c), static_cast<uint8_t>(c), to);
    from = to;
  }
  return from;
}

NodeId GrammarBuilder::call(NodeId from, RuleId rule) {
  const NodeId to = new_node();
  call_edge(from, {.rule = rule, .target = to});
  return to;
}

NodeId GrammarBuilder::any_of(NodeId from, std::span<const Part> parts) {
  const NodeId end = new_node();
  for (const Part& part : parts) {
    const NodeId begin = new_node();  // a loop that a part begins with must not reach the others
    empty_edge(from, begin);
    empty_edge(part(begin), end);
  }
  return end;
}

NodeId GrammarBuilder::optional(NodeId from, const Part& part) {
  const NodeId begin = new_node();
  const NodeId end = new_node();
  empty_edge(from, begin);
  empty_edge(part(begin), end);
  empty_edge(from, end);
  return end;
}

NodeId GrammarBuilder::repeat(NodeId from, const Part& part, uint32_t min, uint32_t max) {
  if (max == 0) return from;
  if (min <= 1 && max == kUnbounded) {
    const NodeId begin = new_node();
    const NodeId end = new_node();
    empty_edge(from, begin);
    const NodeId last = part(begin);
    empty_edge(last, begin);
    empty_edge(last, end);
    if (min == 0) empty_edge(from, end);
    return end;
  }
  if (max <= kMaxCopies) {
    const NodeId end = new_node();
    for (uint32_t i = 0; i < max; ++i) {
      if (i >= min) empty_edge(from, end);
      from = part(from);
    }
    empty_edge(from, end);
    return end;
  }
  const RuleId rule = new_rule();
  end_rule(rule, part(start(rule)));
  const NodeId end = new_node();
  call_edge(from, {.rule = rule, .target = end, .min = min, .max = max});
  return end;
}

Result<Grammar> GrammarBuilder::build(RuleId root) {
  if (is_full()) {
    return Error(
        ErrorCode::kInvalidArgument,
        fmt::format("it needs a grammar of more than {} edges; make it smaller", kMaxEdges));
  }
  const std::vector<bool> productive = productive_nodes();
  if (!productive[starts_[root]]) {
    return Error(ErrorCode::kInvalidArgument, "no finite text satisfies it");
  }
  drop_dead_ends(productive);
  if (calls_itself_first(nullable_rules())) {
    return Error(ErrorCode::kInvalidArgument,
                 "it refers to itself without anything in between; put the reference inside an "
                 "object or array");
  }
  Grammar grammar;
  const size_t num_nodes = accepts_.size();
  std::vector<uint32_t> offsets[3];
  sort_by_node(bytes_, num_nodes, offsets[0], grammar.bytes_);
  sort_by_node(calls_, num_nodes, offsets[1], grammar.calls_);
  sort_by_node(empties_, num_nodes, offsets[2], grammar.empties_);
  grammar.nodes_.resize(num_nodes + 1);
  for (size_t i = 0; i <= num_nodes; ++i) {
    grammar.nodes_[i] = {offsets[0][i], offsets[1][i], offsets[2][i]};
  }
  grammar.accepts_ = accepts_;
  grammar.starts_ = starts_;
  grammar.root_ = root;
  std::array<bool, 257> begins = {};  // a class begins at this byte
  for (const auto& [from, edge] : bytes_) begins[edge.first] = begins[edge.last + 1] = true;
  int byte_class = 0;
  for (int byte = 0; byte < 256; ++byte) {
    if (byte > 0 && begins[byte]) ++byte_class;
    grammar.class_of_[byte] = static_cast<uint8_t>(byte_class);
  }
  grammar.num_classes_ = byte_class + 1;
  return grammar;
}

// Nodes from which the end of their rule can be reached.
std::vector<bool> GrammarBuilder::productive_nodes() const {
  struct Back {
    NodeId from;
    RuleId needs;  // must be productive too; -1: nothing
  };
  std::vector<std::vector<Back>> into(accepts_.size());
  for (const auto& [from, edge] : bytes_) into[edge.target].push_back({from, -1});
  for (const auto& [from, to] : empties_) into[to].push_back({from, -1});
  std::vector<std::vector<size_t>> callers(starts_.size());  // indices into calls_
  for (size_t i = 0; i < calls_.size(); ++i) {
    const CallEdge& edge = calls_[i].edge;
    into[edge.target].push_back({calls_[i].from, edge.min == 0 ? -1 : edge.rule});
    callers[edge.rule].push_back(i);
  }
  std::vector<RuleId> rule_of_start(accepts_.size(), -1);
  for (size_t rule = 0; rule < starts_.size(); ++rule) {
    rule_of_start[starts_[rule]] = static_cast<RuleId>(rule);
  }
  std::vector<bool> productive(accepts_.size());
  std::vector<NodeId> pending;
  const auto mark = [&](NodeId node) {
    if (!productive[node]) pending.push_back(node);
    productive[node] = true;
  };
  for (size_t node = 0; node < accepts_.size(); ++node) {
    if (accepts_[node]) mark(static_cast<NodeId>(node));
  }
  while (!pending.empty()) {
    const NodeId node = pending.back();
    pending.pop_back();
    for (const Back& back : into[node]) {
      if (back.needs < 0 || productive[starts_[back.needs]]) mark(back.from);
    }
    if (rule_of_start[node] < 0) continue;
    for (const size_t call : callers[rule_of_start[node]]) {
      if (productive[calls_[call].edge.target]) mark(calls_[call].from);
    }
  }
  return productive;
}

void GrammarBuilder::drop_dead_ends(const std::vector<bool>& productive) {
  std::erase_if(bytes_, [&](const auto& e) { return !productive[e.edge.target]; });
  std::erase_if(empties_, [&](const auto& e) { return !productive[e.edge]; });
  for (const auto& [from, edge] : calls_) {
    if (edge.min == 0 && productive[edge.target] && !productive[starts_[edge.rule]]) {
      empties_.push_back({from, edge.target});  // zero times
    }
  }
  std::erase_if(calls_, [&](const auto& e) {
    return !productive[e.edge.target] || !productive[starts_[e.edge.rule]];
  });
}

std::vector<bool> GrammarBuilder::nullable_rules() const {
  // Backwards from the ends over edges that read nothing.
  std::vector<std::vector<std::pair<NodeId, RuleId>>> into(accepts_.size());
  std::vector<std::vector<size_t>> callers(starts_.size());
  for (const auto& [from, to] : empties_) into[to].emplace_back(from, -1);
  for (size_t i = 0; i < calls_.size(); ++i) {
    const CallEdge& edge = calls_[i].edge;
    into[edge.target].emplace_back(calls_[i].from, edge.min == 0 ? -1 : edge.rule);
    callers[edge.rule].push_back(i);
  }
  std::vector<RuleId> rule_of_start(accepts_.size(), -1);
  for (size_t rule = 0; rule < starts_.size(); ++rule) {
    rule_of_start[starts_[rule]] = static_cast<RuleId>(rule);
  }
  std::vector<bool> reaches(accepts_.size());
  std::vector<NodeId> pending;
  const auto mark = [&](NodeId node) {
    if (!reaches[node]) pending.push_back(node);
    reaches[node] = true;
  };
  for (size_t node = 0; node < accepts_.size(); ++node) {
    if (accepts_[node]) mark(static_cast<NodeId>(node));
  }
  while (!pending.empty()) {
    const NodeId node = pending.back();
    pending.pop_back();
    for (const auto& [from, needs] : into[node]) {
      if (needs < 0 || reaches[starts_[needs]]) mark(from);
    }
    if (rule_of_start[node] < 0) continue;
    for (const size_t call : callers[rule_of_start[node]]) {
      if (reaches[calls_[call].edge.target]) mark(calls_[call].from);
    }
  }
  std::vector<bool> nullable(starts_.size());
  for (size_t rule = 0; rule < starts_.size(); ++rule) nullable[rule] = reaches[starts_[rule]];
  return nullable;
}

// A cycle among "calls before it has read anything" would push on the stack for ever.
bool GrammarBuilder::calls_itself_first(const std::vector<bool>& nullable) const {
  std::vector<std::vector<NodeId>> skips(accepts_.size());  // to nodes of the same rule
  std::vector<std::vector<RuleId>> enters(accepts_.size());
  for (const auto& [from, to] : empties_) skips[from].push_back(to);
  for (const auto& [from, edge] : calls_) {
    enters[from].push_back(edge.rule);
    if (edge.min == 0 || nullable[edge.rule]) skips[from].push_back(edge.target);
    KVANT_CHECK(!nullable[edge.rule] || edge.is_plain(), "counted parts match no empty text");
  }
  std::vector<std::vector<RuleId>> first(starts_.size());
  std::vector<RuleId> seen_by(accepts_.size(), -1);
  for (size_t rule = 0; rule < starts_.size(); ++rule) {
    std::vector<NodeId> pending = {starts_[rule]};
    while (!pending.empty()) {
      const NodeId node = pending.back();
      pending.pop_back();
      if (std::exchange(seen_by[node], static_cast<RuleId>(rule)) == static_cast<RuleId>(rule)) {
        continue;
      }
      first[rule].insert(first[rule].end(), enters[node].begin(), enters[node].end());
      pending.insert(pending.end(), skips[node].begin(), skips[node].end());
    }
  }
  // Kahn: rules that are left when those without callers are taken away one by one.
  std::vector<size_t> num_callers(starts_.size());
  for (const auto& rules : first) {
    for (const RuleId rule : rules) ++num_callers[rule];
  }
  std::vector<RuleId> ready;
  for (size_t rule = 0; rule < starts_.size(); ++rule) {
    if (num_callers[rule] == 0) ready.push_back(static_cast<RuleId>(rule));
  }
  size_t num_done = 0;
  while (!ready.empty()) {
    const RuleId rule = ready.back();
    ready.pop_back();
    ++num_done;
    for (const RuleId called : first[rule]) {
      if (--num_callers[called] == 0) ready.push_back(called);
    }
  }
  return num_done < starts_.size();
}

}  // namespace kvant::serve::grammar
