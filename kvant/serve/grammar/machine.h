// Runs a Grammar: a state is the set of all stacks that the text so far can stand for, made into a
// deterministic automaton as it is needed.
//
// States and stack frames are interned: equal sets have equal ids, and a transition is computed
// once. Single-thread; the Grammar must outlive it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvant/serve/grammar/grammar.h"

namespace kvant::serve::grammar {

using StateId = int32_t;
using FrameId = int32_t;

inline constexpr StateId kDead = -1;      // no continuation and not at an end
inline constexpr FrameId kBottom = 0;     // the end of the root rule returns here
inline constexpr RuleId kPlainCall = -1;  // Frame::rule of a call that is not counted

// Where the end of a rule goes on.
struct Frame {
  FrameId parent = kBottom;
  NodeId target = 0;
  RuleId rule = kPlainCall;  // counted calls: the rule to run again
  uint32_t min = 0;          // counted calls: how often it must and may run after this time
  uint32_t max = 0;
  bool operator==(const Frame&) const = default;
};

// A stack whose top stands at `node`, which reads a byte next.
struct Config {
  NodeId node;
  FrameId frame;
  bool operator==(const Config&) const = default;
  auto operator<=>(const Config&) const = default;
};

class Machine {
 public:
  // A state keeps at most so many stacks. A schema whose alternatives cannot be told apart could
  // double them at each level; those left out only make the output less free, never wrong.
  static constexpr size_t kMaxConfigs = 2048;

  explicit Machine(const Grammar& grammar);

  StateId start();
  // The state of one stack, which reads a byte next.
  StateId single(const Config& config);
  // The state when what stands on `frame` has ended.
  StateId state_after(FrameId frame);
  FrameId intern(const Frame& frame);

  StateId next(StateId state, uint8_t byte) {
    const size_t index =
        static_cast<size_t>(state) * grammar_->num_classes() + grammar_->byte_class(byte);
    const StateId known = transitions_[index];
    return known != kUnknown ? known : compute_next(state, byte, index);
  }

  std::span<const Config> configs(StateId state) const {
    return {configs_.data() + states_[state].begin, states_[state].count};
  }
  bool ends(StateId state) const { return states_[state].ends; }  // the root rule may end here
  const Frame& frame(FrameId id) const { return frames_[id]; }
  size_t num_states() const { return states_.size(); }
  const Grammar& grammar() const { return *grammar_; }

  // The same state of `other`, a machine for the same grammar, with the frames that it needs.
  StateId copy_state(const Machine& other, StateId state);

 private:
  static constexpr StateId kUnknown = -2;
  struct State {
    size_t begin;  // into configs_
    uint32_t count;
    bool ends;
  };

  StateId state_at(NodeId node, FrameId frame);
  StateId compute_next(StateId state, uint8_t byte, size_t index);
  void visit(NodeId node, FrameId frame);
  void enter(const CallEdge& edge, FrameId frame);
  void leave(FrameId frame);
  StateId finish();
  FrameId copy_frame(const Machine& other, FrameId id, std::unordered_map<FrameId, FrameId>& done);

  const Grammar* grammar_;
  std::vector<Frame> frames_;
  std::unordered_multimap<uint64_t, FrameId> frame_ids_;
  std::vector<State> states_;
  std::vector<Config> configs_;
  std::unordered_multimap<uint64_t, StateId> state_ids_;
  std::vector<StateId> transitions_;  // [num_states][num_classes]

  // Of the state that is being made.
  std::vector<Config> reading_;  // with a byte to read
  std::vector<Config> pending_;
  std::vector<Config> visited_;
  std::unordered_map<uint64_t, bool> visited_many_;  // once visited_ is long
  bool ends_ = false;
};

}  // namespace kvant::serve::grammar
