// Shortcuts for walking a vocabulary: parts of the trie of which a state takes all strings, or all
// up to some number of characters, as inside of strings and of counted repetitions.
//
// Characters are told apart by kind (letters, digits, each sign, those of several bytes), as a set
// of 64 bits: every node knows which kinds come below it, and every state of a machine which kinds
// lead it on to one and the same state. Where the first are among the second, as often as the part
// is deep, its tokens need no walk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvant/serve/grammar/byte_trie.h"
#include "kvant/serve/grammar/machine.h"

namespace kvant::serve::grammar {

using CharacterKinds = uint64_t;

// What may follow within a character of UTF-8: the next byte's range, and how many bytes are left.
// None: the character is complete.
struct Utf8Tail {
  uint8_t first = 0, last = 0;
  int left = 0;
};

// What lies below each node of a trie. Immutable and thread-safe once built; does not refer to it.
class TrieCharacters {
 public:
  TrieCharacters() = default;
  explicit TrieCharacters(const ByteTrie& trie);

  // Kinds of the characters of all strings below a node, read from a character's first byte on. A
  // string may end within a character.
  CharacterKinds kinds(size_t node) const { return nodes_[node].kinds; }
  // Bytes of the longest string below a node.
  size_t height(size_t node) const { return nodes_[node].height; }
  // Characters that begin on the way to a node, its own included.
  size_t depth(size_t node) const { return nodes_[node].depth; }
  // Of each string in the order of the trie's ids: its bytes, and characters that begin in it.
  struct Length {
    uint16_t bytes = 0, characters = 0;
  };
  const Length& length(size_t id_index) const { return lengths_[id_index]; }

 private:
  struct Node {
    CharacterKinds kinds = 0;
    uint16_t height = 0, depth = 0;
  };
  CharacterKinds kinds_within(const ByteTrie& trie, size_t node, const Utf8Tail& at) const;

  std::vector<Node> nodes_;
  std::vector<Length> lengths_;
};

// Which kinds of characters lead the states of one machine on. Single-thread; adds states to the
// machine, which must outlive it.
class StateLoops {
 public:
  explicit StateLoops(Machine& machine) : machine_(machine) {}

  // Of the strings of at most `height` bytes and of these kinds of characters, the last of which
  // may be cut off, exactly those of at most so many characters lead on from `state`, and no longer
  // one has a beginning behind which the machine ends. kUnknown: that cannot be said.
  static constexpr size_t kUnknown = SIZE_MAX;
  size_t characters_taken(StateId state, CharacterKinds kinds, size_t height);

 private:
  struct Loop {
    CharacterKinds kinds = 0;  // each character of these leads to `next`
    CharacterKinds dead = 0;   // none of these leads anywhere
    StateId next = kDead;
    bool known = false;
  };
  const Loop& loop(StateId state);
  Loop find(StateId state);
  StateId behind_all_multi_byte(StateId state);
  bool no_multi_byte(StateId state);

  Machine& machine_;
  std::vector<Loop> loops_;  // [states]
};

}  // namespace kvant::serve::grammar
