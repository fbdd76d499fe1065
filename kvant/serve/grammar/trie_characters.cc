#include "kvant/serve/grammar/trie_characters.h"

#include <algorithm>
#include <array>
#include <span>

namespace kvant::serve::grammar {
namespace {

// Kinds of ASCII characters by number: letters that hexadecimal numbers have and others, digits but
// 0, and every sign for itself.
constexpr int kMultiByte = 62;  // any character of two bytes and more
constexpr int kInvalid = 63;    // bytes that are no UTF-8

constexpr std::array<uint8_t, 128> kAsciiKinds = [] {
  std::array<uint8_t, 128> kinds{};
  uint8_t signs = 8;
  for (int c = 0; c < 128; ++c) {
    const bool sign = (c >= ' ' && c < 127) || c == '\n' || c == '\t' || c == '\r';
    if (c >= 'a' && c <= 'z') {
      kinds[c] = c <= 'f' ? 0 : 1;
    } else if (c >= 'A' && c <= 'Z') {
      kinds[c] = c <= 'F' ? 2 : 3;
    } else if (c == '0') {
      kinds[c] = 4;
    } else if (c > '0' && c <= '9') {
      kinds[c] = 5;
    } else {
      kinds[c] = sign ? signs++ : 6;
    }
  }
  return kinds;
}();
static_assert(*std::max_element(kAsciiKinds.begin(), kAsciiKinds.end()) < kMultiByte);

CharacterKinds kind(int number) {
  return CharacterKinds{1} << number;
}

// First bytes of characters (Unicode 15, table 3-7).
constexpr uint8_t kFirstLead = 0xC2, kLastLead = 0xF4;

// `lead` is in [kFirstLead, kLastLead].
Utf8Tail after_lead(uint8_t lead) {
  const int left = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  const uint8_t first = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t last = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  return {first, last, left};
}
Utf8Tail after_next(const Utf8Tail& at) {
  return {0x80, 0xBF, at.left - 1};
}

template <typename Visit>
void for_each_child(const ByteTrie& trie, size_t node, Visit visit) {
  for (size_t child = node + 1; child < trie.node(node).subtree_end;
       child = trie.node(child).subtree_end) {
    visit(child, trie.node(child).byte);
  }
}

}  // namespace

TrieCharacters::TrieCharacters(const ByteTrie& trie)
    : nodes_(trie.num_nodes()), lengths_(trie.num_ids()) {
  std::vector<uint16_t> depths(trie.max_depth() + 1);  // characters by bytes, down to a node
  size_t index = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const ByteTrie::Node& node = trie.node(i);
    depths[node.depth] = static_cast<uint16_t>(depths[node.depth - 1] + (node.byte >> 6 != 2));
    nodes_[i].depth = depths[node.depth];
    for (size_t own = trie.ids_at(i).size(); own > 0; --own)
      lengths_[index++] = {.bytes = node.depth, .characters = depths[node.depth]};
  }
  // Nodes below come behind, and are known first.
  for (size_t i = nodes_.size(); i-- > 0;) {
    Node& node = nodes_[i];
    for_each_child(trie, i, [&](size_t child, uint8_t byte) {
      node.height = std::max<uint16_t>(node.height, nodes_[child].height + 1);
      if (byte < 128) {
        node.kinds |= kind(kAsciiKinds[byte]) | nodes_[child].kinds;
      } else if (byte < kFirstLead || byte > kLastLead) {
        node.kinds |= kind(kInvalid);
      } else {
        node.kinds |= kind(kMultiByte) | kinds_within(trie, child, after_lead(byte));
      }
    });
  }
}

// Of the strings that go on from a node within a character.
CharacterKinds TrieCharacters::kinds_within(const ByteTrie& trie, size_t node,
                                            const Utf8Tail& at) const {
  if (at.left == 0) return nodes_[node].kinds;
  CharacterKinds kinds = 0;
  for_each_child(trie, node, [&](size_t child, uint8_t byte) {
    kinds |= byte < at.first || byte > at.last ? kind(kInvalid)
                                               : kinds_within(trie, child, after_next(at));
  });
  return kinds;
}

size_t StateLoops::characters_taken(StateId state, CharacterKinds kinds, size_t height) {
  bool ends = false;
  for (size_t taken = 0; taken < height; ++taken) {
    const Loop& here = loop(state);
    ends = ends || machine_.ends(state);
    if ((kinds & ~here.kinds) != 0) return (kinds & ~here.dead) == 0 && !ends ? taken : kUnknown;
    if (here.next == state) return height;
    state = here.next;
  }
  return height;
}

const StateLoops::Loop& StateLoops::loop(StateId state) {
  if (static_cast<size_t>(state) >= loops_.size()) loops_.resize(machine_.num_states());
  if (!loops_[state].known) {
    const Loop found = find(state);
    loops_[state] = found;
  }
  return loops_[state];
}

// The state behind every character of several bytes; kDead if they lead to different ones. Then
// those cut off are alive as well.
StateId StateLoops::behind_all_multi_byte(StateId state) {
  StateId behind = kDead;
  bool same = true;
  const auto go = [&](const auto& self, StateId from, const Utf8Tail& at) -> void {
    StateId last = kDead;
    for (int byte = at.first; same && byte <= at.last; ++byte) {
      const StateId next = machine_.next(from, static_cast<uint8_t>(byte));
      if (next == kDead) same = false;
      if (!same || next == last) continue;
      last = next;
      if (at.left > 1) {
        self(self, next, after_next(at));
      } else if (behind == kDead) {
        behind = next;
      } else {
        same = next == behind;
      }
    }
  };
  for (int lead = kFirstLead; same && lead <= kLastLead; ++lead) {
    const StateId next = machine_.next(state, static_cast<uint8_t>(lead));
    same = next != kDead;
    if (same) go(go, next, after_lead(static_cast<uint8_t>(lead)));
  }
  return same ? behind : kDead;
}

bool StateLoops::no_multi_byte(StateId state) {
  for (int lead = kFirstLead; lead <= kLastLead; ++lead) {
    if (machine_.next(state, static_cast<uint8_t>(lead)) != kDead) return false;
  }
  return true;
}

// `next` is where most kinds lead to; a loop back to the state is best.
StateLoops::Loop StateLoops::find(StateId state) {
  std::array<StateId, kInvalid> behind;  // by kind; kDead: not one state
  CharacterKinds seen = 0, alive = 0;
  behind.fill(kDead);
  for (int byte = 0; byte < 128; ++byte) {
    const int number = kAsciiKinds[byte];
    const StateId next = machine_.next(state, static_cast<uint8_t>(byte));
    if (next != kDead) alive |= kind(number);
    behind[number] = (seen & kind(number)) == 0 || behind[number] == next ? next : kDead;
    seen |= kind(number);
  }
  behind[kMultiByte] = behind_all_multi_byte(state);
  Loop best{.known = true};
  int most = 0;
  for (const StateId next : behind) {
    if (next == kDead || next == best.next) continue;
    const int count =
        next == state ? kInvalid + 1 : static_cast<int>(std::ranges::count(behind, next));
    if (count <= most) continue;
    most = count;
    best.next = next;
  }
  for (int number = 0; number < kInvalid; ++number) {
    if (best.next != kDead && behind[number] == best.next) best.kinds |= kind(number);
  }
  best.dead = seen & ~alive;
  if (no_multi_byte(state)) best.dead |= kind(kMultiByte);
  return best;
}

}  // namespace kvant::serve::grammar
