// The working parts of constraint.h: masks of places in a grammar, and the state of one choice.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "kvant/serve/grammar/byte_trie.h"
#include "kvant/serve/grammar/constraint.h"
#include "kvant/serve/grammar/grammar.h"
#include "kvant/serve/grammar/machine.h"
#include "kvant/serve/token_constraint.h"

namespace kvant::serve::grammar {

// What the tokens do at a place in a rule, whatever called the rule. Immutable.
struct PlaceMask {
  // Tokens that end within the rule or right at its end: as bits, or as a list where few are.
  std::vector<uint32_t> bits;
  std::vector<int32_t> few;
  // What is left, behind the end of the rule, of tokens that leave it.
  ByteTrie rest;
  size_t memory_bytes() const { return bits.size() * 4 + few.size() * 4 + rest.memory_bytes(); }
};

// A grammar over a vocabulary, with the masks that were needed so far. Thread-safe.
class GrammarSource : public ConstraintSource, public std::enable_shared_from_this<GrammarSource> {
 public:
  GrammarSource(Grammar grammar, std::shared_ptr<const Vocabulary> vocabulary);
  std::unique_ptr<TokenConstraint> create() const override;

  const Grammar& grammar() const { return grammar_; }
  const Vocabulary& vocabulary() const { return *vocabulary_; }

  // The mask of the place where a stack of `machine` stands, and the frame below the place's rule.
  struct Place {
    std::shared_ptr<const PlaceMask> mask;  // shared with the table, which may forget it
    FrameId below;
  };
  Place place(const Machine& machine, const Config& config) const;

 private:
  using Key = std::vector<uint32_t>;
  std::shared_ptr<const PlaceMask> mask_of(Key key) const;
  std::shared_ptr<const PlaceMask> build(const Key& key) const;
  void warm_up() const;
  static Key first_key(NodeId node, const CallEdge& call);
  static uint32_t clamp_count(uint32_t count);

  static constexpr size_t kMaxMaskBytes = 64 << 20;  // then all are forgotten
  // Within a counted repetition only tokens of so many bytes are offered: counts beyond are alike
  // then. The text of longer ones can be written with shorter ones.
  static constexpr uint32_t kCountedBytes = 16;

  const Grammar grammar_;
  const std::shared_ptr<const Vocabulary> vocabulary_;  // shared by all sources of a model
  mutable std::mutex mutex_;                            // guards the two below
  mutable std::map<Key, std::shared_ptr<const PlaceMask>> masks_;
  mutable size_t mask_bytes_ = 0;
};

class GrammarConstraint : public TokenConstraint {
 public:
  explicit GrammarConstraint(std::shared_ptr<const GrammarSource> source);
  void allowed(std::span<uint32_t> bitmask) override;
  bool accept(int32_t token) override;
  bool is_complete() const override { return ended_ || machine_->ends(state_); }
  std::unique_ptr<TokenConstraint> clone() const override;

 private:
  void add_place(const Config& config, std::span<uint32_t> bitmask);
  bool is_end_token(int32_t token) const;

  // A machine of its own: no lock on the way of every byte. Made anew when it has grown.
  static constexpr size_t kMaxStates = 4096;

  std::shared_ptr<const GrammarSource> source_;  // shared with all choices of the source
  std::unique_ptr<Machine> machine_;
  StateId state_;
  bool stuck_ = false;  // the vocabulary cannot spell what must come: only the end is left
  bool ended_ = false;
  std::vector<StateId> path_;  // scratch of walks
};

}  // namespace kvant::serve::grammar
