#include "kvant/serve/grammar/machine.h"

#include <algorithm>

namespace kvant::serve::grammar {
namespace {

constexpr size_t kFewVisited = 24;  // up to so many, looking through all is faster than a table
constexpr size_t kMaxVisited = 8 * Machine::kMaxConfigs;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 32);
}

uint64_t key_of(const Config& config) {
  return static_cast<uint64_t>(config.node) << 32 | static_cast<uint32_t>(config.frame);
}

}  // namespace

Machine::Machine(const Grammar& grammar) : grammar_(&grammar), frames_(1) {}

StateId Machine::start() {
  return state_at(grammar_->start(grammar_->root()), kBottom);
}

StateId Machine::state_at(NodeId node, FrameId frame) {
  pending_.push_back({node, frame});
  return finish();
}

StateId Machine::single(const Config& config) {
  reading_.push_back(config);
  return finish();
}

StateId Machine::state_after(FrameId frame) {
  leave(frame);
  return finish();
}

FrameId Machine::intern(const Frame& frame) {
  uint64_t hash = mix(static_cast<uint64_t>(frame.parent), static_cast<uint64_t>(frame.target));
  if (frame.rule != kPlainCall) {
    hash = mix(mix(mix(hash, static_cast<uint64_t>(frame.rule)), frame.min), frame.max);
  }
  const auto [begin, end] = frame_ids_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    if (frames_[it->second] == frame) return it->second;
  }
  frames_.push_back(frame);
  const FrameId id = static_cast<FrameId>(frames_.size() - 1);
  frame_ids_.emplace(hash, id);
  return id;
}

StateId Machine::compute_next(StateId state, uint8_t byte, size_t index) {
  for (size_t i = 0; i < states_[state].count; ++i) {
    const Config config = configs_[states_[state].begin + i];
    for (const ByteEdge& edge : grammar_->bytes(config.node)) {
      if (byte >= edge.first && byte <= edge.last) pending_.push_back({edge.target, config.frame});
    }
  }
  const StateId next = finish();
  transitions_[index] = next;
  return next;
}

void Machine::visit(NodeId node, FrameId frame) {
  const Config config = {node, frame};
  if (visited_.size() < kFewVisited) {
    if (std::ranges::find(visited_, config) != visited_.end()) return;
  } else {
    if (visited_many_.empty()) {
      for (const Config& old : visited_) visited_many_.emplace(key_of(old), true);
    }
    if (!visited_many_.emplace(key_of(config), true).second) return;
  }
  if (visited_.size() >= kMaxVisited) return;
  visited_.push_back(config);
  if (!grammar_->bytes(node).empty() && reading_.size() < kMaxConfigs) reading_.push_back(config);
  for (const NodeId target : grammar_->empties(node)) pending_.push_back({target, frame});
  for (const CallEdge& edge : grammar_->calls(node)) enter(edge, frame);
  if (grammar_->accepts(node)) leave(frame);
}

void Machine::enter(const CallEdge& edge, FrameId frame) {
  const NodeId start = grammar_->start(edge.rule);
  if (edge.is_plain()) {
    const bool returns = !grammar_->only_accepts(edge.target);
    const FrameId below = returns ? intern({.parent = frame, .target = edge.target}) : frame;
    pending_.push_back({start, below});
    return;
  }
  if (edge.min == 0) pending_.push_back({edge.target, frame});
  if (edge.max == 0) return;
  pending_.push_back({start, intern({.parent = frame,
                                     .target = edge.target,
                                     .rule = edge.rule,
                                     .min = edge.min == 0 ? 0 : edge.min - 1,
                                     .max = edge.max == kUnbounded ? kUnbounded : edge.max - 1})});
}

void Machine::leave(FrameId frame) {
  if (frame == kBottom) {
    ends_ = true;
    return;
  }
  const Frame f = frames_[frame];
  if (f.rule == kPlainCall || f.min == 0) pending_.push_back({f.target, f.parent});
  if (f.rule != kPlainCall && f.max > 0) {
    Frame again = f;
    again.min = f.min == 0 ? 0 : f.min - 1;
    again.max = f.max == kUnbounded ? kUnbounded : f.max - 1;
    pending_.push_back({grammar_->start(f.rule), intern(again)});
  }
}

StateId Machine::finish() {
  while (!pending_.empty()) {
    const Config config = pending_.back();
    pending_.pop_back();
    visit(config.node, config.frame);
  }
  visited_.clear();
  visited_many_.clear();
  const bool ends = ends_;
  ends_ = false;
  if (reading_.empty() && !ends) return kDead;
  std::ranges::sort(reading_);
  uint64_t hash = ends ? 1 : 2;
  for (const Config& config : reading_) hash = mix(hash, key_of(config));
  const auto [begin, end] = state_ids_.equal_range(hash);
  StateId id = kDead;
  for (auto it = begin; it != end && id == kDead; ++it) {
    if (states_[it->second].ends == ends && std::ranges::equal(configs(it->second), reading_)) {
      id = it->second;
    }
  }
  if (id == kDead) {
    id = static_cast<StateId>(states_.size());
    states_.push_back({configs_.size(), static_cast<uint32_t>(reading_.size()), ends});
    configs_.insert(configs_.end(), reading_.begin(), reading_.end());
    transitions_.resize(transitions_.size() + grammar_->num_classes(), kUnknown);
    state_ids_.emplace(hash, id);
  }
  reading_.clear();
  return id;
}

StateId Machine::copy_state(const Machine& other, StateId state) {
  std::unordered_map<FrameId, FrameId> done;
  for (const Config& config : other.configs(state)) {
    reading_.push_back({config.node, copy_frame(other, config.frame, done)});
  }
  ends_ = other.ends(state);
  return finish();
}

FrameId Machine::copy_frame(const Machine& other, FrameId id,
                            std::unordered_map<FrameId, FrameId>& done) {
  std::vector<FrameId> path;  // from the top down to the first one that is there already
  FrameId below = kBottom;
  for (FrameId at = id; at != kBottom; at = other.frames_[at].parent) {
    if (const auto known = done.find(at); known != done.end()) {
      below = known->second;
      break;
    }
    path.push_back(at);
  }
  for (; !path.empty(); path.pop_back()) {
    Frame frame = other.frames_[path.back()];
    frame.parent = below;
    below = intern(frame);
    done.emplace(path.back(), below);
  }
  return below;
}

}  // namespace kvant::serve::grammar
