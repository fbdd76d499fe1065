#include "kvant/serve/grammar/constraint_state.h"

#include <algorithm>
#include <bit>
#include <chrono>

#include "kvant/base/check.h"

namespace kvant::serve::grammar {
namespace {

constexpr auto kWarmUpTime = std::chrono::milliseconds(100);
constexpr size_t kFewNodes = 4;  // up to so many below a node are walked in any case
constexpr int kWideBytes = 64;   // a node that reads so many bytes fits much of a vocabulary

void set_bit(std::span<uint32_t> bitmask, int32_t id) {
  bitmask[static_cast<size_t>(id) / 32] |= 1u << (id % 32);
}

}  // namespace

GrammarSource::GrammarSource(Grammar grammar, std::shared_ptr<const Vocabulary> vocabulary)
    : grammar_(std::move(grammar)), vocabulary_(std::move(vocabulary)) {
  warm_up();
}

std::unique_ptr<TokenConstraint> GrammarSource::create() const {
  return std::make_unique<GrammarConstraint>(shared_from_this());
}

// A key is the node, whether the text may end with the place's rule, then for each counted call on
// top of the stack its target, rule and counts.
GrammarSource::Place GrammarSource::place(const Machine& machine, const Config& config) const {
  Key key = {static_cast<uint32_t>(config.node), 0};
  FrameId below = config.frame;
  while (below != kBottom && machine.frame(below).rule != kPlainCall) {
    const Frame& frame = machine.frame(below);
    key.insert(key.end(), {static_cast<uint32_t>(frame.target), static_cast<uint32_t>(frame.rule),
                           clamp_count(frame.min), clamp_count(frame.max)});
    below = frame.parent;
  }
  key[1] = below == kBottom;
  return {mask_of(std::move(key)), below};
}

uint32_t GrammarSource::clamp_count(uint32_t count) {
  return count == kUnbounded ? kUnbounded : std::min(count, kCountedBytes + 1);
}

std::shared_ptr<const PlaceMask> GrammarSource::mask_of(Key key) const {
  {
    const std::lock_guard lock(mutex_);
    const auto found = masks_.find(key);
    if (found != masks_.end()) return found->second;
  }
  std::shared_ptr<const PlaceMask> mask = build(key);
  const std::lock_guard lock(mutex_);
  if (mask_bytes_ > kMaxMaskBytes) {
    masks_.clear();
    mask_bytes_ = 0;
  }
  if (masks_.emplace(std::move(key), mask).second) mask_bytes_ += mask->memory_bytes();
  return mask;
}

// Where most of the vocabulary fits, as in strings, a mask takes milliseconds: better now, on the
// thread that compiles, than between two steps of the engine.
void GrammarSource::warm_up() const {
  const auto deadline = std::chrono::steady_clock::now() + kWarmUpTime;
  std::vector<std::vector<CallEdge>> callers(grammar_.num_rules());
  for (size_t node = 0; node < grammar_.num_nodes(); ++node) {
    for (const CallEdge& call : grammar_.calls(static_cast<NodeId>(node))) {
      std::vector<CallEdge>& known = callers[call.rule];
      // All plain calls of a rule share its masks.
      if (known.empty() || !call.is_plain()) known.push_back(call);
    }
  }
  std::vector<bool> seen(grammar_.num_nodes());
  for (RuleId rule = 0; rule < grammar_.num_rules(); ++rule) {
    std::vector<NodeId> pending = {grammar_.start(rule)};
    while (!pending.empty()) {
      const NodeId node = pending.back();
      pending.pop_back();
      if (seen[node]) continue;
      seen[node] = true;
      int width = 0;
      for (const ByteEdge& edge : grammar_.bytes(node)) {
        width += edge.last - edge.first + 1;
        pending.push_back(edge.target);
      }
      for (const CallEdge& call : grammar_.calls(node)) pending.push_back(call.target);
      for (const NodeId target : grammar_.empties(node)) pending.push_back(target);
      if (width < kWideBytes) continue;
      for (const CallEdge& call : callers[rule]) {
        if (std::chrono::steady_clock::now() > deadline) return;
        (void)mask_of(first_key(node, call));
      }
    }
  }
}

// The key of a node of a rule that has just been called.
GrammarSource::Key GrammarSource::first_key(NodeId node, const CallEdge& call) {
  Key key = {static_cast<uint32_t>(node), 0};
  if (call.is_plain()) return key;
  key.insert(key.end(), {static_cast<uint32_t>(call.target), static_cast<uint32_t>(call.rule),
                         clamp_count(call.min == 0 ? 0 : call.min - 1),
                         clamp_count(call.max == kUnbounded ? kUnbounded : call.max - 1)});
  return key;
}

std::shared_ptr<const PlaceMask> GrammarSource::build(const Key& key) const {
  Machine machine(grammar_);  // whose bottom is the frame below the place's rule
  FrameId frame = kBottom;
  size_t max_bytes = ByteTrie::kMaxLength;
  for (size_t i = key.size(); i > 2; i -= 4) {
    frame = machine.intern({.parent = frame,
                            .target = static_cast<NodeId>(key[i - 4]),
                            .rule = static_cast<RuleId>(key[i - 3]),
                            .min = key[i - 2],
                            .max = key[i - 1]});
    if (key[i - 2] != 0 || key[i - 1] != kUnbounded) max_bytes = kCountedBytes;
  }
  const StateId start = machine.single({static_cast<NodeId>(key[0]), frame});
  const ByteTrie& trie = vocabulary_->trie();
  std::vector<uint32_t> bits((vocabulary_->size() + 31) / 32);
  size_t count = 0;
  std::vector<std::pair<std::string_view, int32_t>> rest;
  std::vector<int32_t> path;
  StateLoops loops(machine);
  const TrieCharacters& characters = vocabulary_->characters();
  // Adds what lies below a node without a walk, if it can be said of all of it together.
  const auto take_below = [&](size_t node, StateId state) {
    const ByteTrie::Node& at = trie.node(node);
    if (at.subtree_end - node <= kFewNodes) return false;
    size_t most = loops.characters_taken(state, characters.kinds(node),
                                         std::min(characters.height(node), max_bytes - at.depth));
    if (most == StateLoops::kUnknown) return false;
    most += characters.depth(node);
    size_t index = trie.first_id_below(node);
    for (const int32_t id : trie.ids_below(node)) {
      const TrieCharacters::Length& length = characters.length(index++);
      if (length.bytes > max_bytes || length.characters > most) continue;
      set_bit(bits, id);
      ++count;
    }
    return true;
  };
  trie.walk(
      start, max_bytes, path,
      [&](StateId state, uint8_t byte) { return machine.next(state, byte); },
      [&](size_t node, StateId state) {
        for (const int32_t id : trie.ids_at(node)) {
          set_bit(bits, id);
          ++count;
        }
        if (take_below(node, state)) return false;
        if (!machine.ends(state) || key[1] != 0) return true;
        for (const int32_t id : trie.ids_below(node)) {
          const std::string_view token = vocabulary_->token(id);
          if (token.size() <= max_bytes) rest.emplace_back(token.substr(trie.node(node).depth), id);
        }
        return true;
      });
  auto mask = std::make_shared<PlaceMask>();
  if (count * 8 < bits.size()) {
    for (size_t word = 0; word < bits.size(); ++word) {
      for (uint32_t left = bits[word]; left != 0; left &= left - 1) {
        mask->few.push_back(static_cast<int32_t>(word * 32) + std::countr_zero(left));
      }
    }
  } else {
    mask->bits = std::move(bits);
  }
  mask->rest = ByteTrie(std::move(rest));
  return mask;
}

GrammarConstraint::GrammarConstraint(std::shared_ptr<const GrammarSource> source)
    : source_(std::move(source)),
      machine_(std::make_unique<Machine>(source_->grammar())),
      state_(machine_->start()) {
  KVANT_CHECK(state_ != kDead, "a grammar has a text");
}

void GrammarConstraint::allowed(std::span<uint32_t> bitmask) {
  KVANT_CHECK(bitmask.size() == (source_->vocabulary().size() + 31) / 32, "one bit per token");
  std::ranges::fill(bitmask, 0);
  bool any = false;
  if (!ended_) {
    // By index: the walks below add states, and configs may move.
    for (size_t i = 0; i < machine_->configs(state_).size(); ++i) {
      add_place(machine_->configs(state_)[i], bitmask);
    }
    any = std::ranges::any_of(bitmask, [](uint32_t word) { return word != 0; });
  }
  stuck_ = !any;
  if (any && !is_complete()) return;
  for (const int32_t id : source_->vocabulary().end_tokens()) set_bit(bitmask, id);
}

void GrammarConstraint::add_place(const Config& config, std::span<uint32_t> bitmask) {
  const GrammarSource::Place place = source_->place(*machine_, config);
  const PlaceMask& mask = *place.mask;
  for (size_t i = 0; i < mask.bits.size(); ++i) bitmask[i] |= mask.bits[i];
  for (const int32_t id : mask.few) set_bit(bitmask, id);
  if (mask.rest.num_nodes() == 0) return;
  const StateId after = machine_->state_after(place.below);
  if (after == kDead) return;
  mask.rest.walk(
      after, ByteTrie::kMaxLength, path_,
      [&](StateId state, uint8_t byte) { return machine_->next(state, byte); },
      [&](size_t node, StateId) {
        for (const int32_t id : mask.rest.ids_at(node)) set_bit(bitmask, id);
        return true;
      });
}

bool GrammarConstraint::is_end_token(int32_t token) const {
  return std::ranges::find(source_->vocabulary().end_tokens(), token) !=
         source_->vocabulary().end_tokens().end();
}

bool GrammarConstraint::accept(int32_t token) {
  if (token < 0 || static_cast<size_t>(token) >= source_->vocabulary().size()) return false;
  if (is_end_token(token)) {
    if (!is_complete() && !stuck_) return false;
    ended_ = true;
    return true;
  }
  const std::string_view bytes = source_->vocabulary().token(token);
  if (ended_ || bytes.empty()) return false;
  StateId state = state_;
  for (const char byte : bytes) {
    state = machine_->next(state, static_cast<uint8_t>(byte));
    if (state == kDead) return false;
  }
  state_ = state;
  stuck_ = false;
  if (machine_->num_states() > kMaxStates) {
    auto fresh = std::make_unique<Machine>(source_->grammar());
    state_ = fresh->copy_state(*machine_, state_);
    machine_ = std::move(fresh);
  }
  return true;
}

std::unique_ptr<TokenConstraint> GrammarConstraint::clone() const {
  auto copy = std::make_unique<GrammarConstraint>(source_);
  copy->state_ = copy->machine_->copy_state(*machine_, state_);
  copy->stuck_ = stuck_;
  copy->ended_ = ended_;
  return copy;
}

}  // namespace kvant::serve::grammar
