#include "kvant/serve/grammar/trie_characters.h"

#include <gtest/gtest.h>

#include <bit>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/serve/grammar/constraint.h"
#include "kvant/serve/grammar/machine.h"

namespace kvant::serve::grammar {
namespace {

using Kind = ConstraintSpec::Kind;

Grammar regex(const std::string& pattern) {
  Result<Grammar> grammar = compile_grammar({.kind = Kind::kRegex, .text = pattern});
  EXPECT_TRUE(grammar) << grammar.error().message();
  return std::move(grammar).value();
}

// Deep and bushy, with characters of all lengths, some of them in pieces, and bytes that are none.
std::shared_ptr<const Vocabulary> bushy_vocabulary() {
  const std::vector<std::string> pieces = {
      "a",    "b",        "f",        "q",      "A",           "Z",          "0",
      "7",    " ",        "\"",       ".",      "\\",          "n",          "{",
      "\n",   "\u00e9",   "\u07ff",   "\u0800", "\u8a9e",      "\U0001f600", "\xc3",
      "\xa9", "\xe8\xaa", "\xf0\x9f", "\xff",   "\xed\xa0\x80"};
  std::mt19937 random(5);
  std::set<std::string> tokens(pieces.begin(), pieces.end());
  while (tokens.size() < 12'000) {
    std::string token;
    // Mostly letters, so that parts of the trie are of one kind.
    const size_t kinds = random() % 3 == 0 ? pieces.size() : 4 + random() % 5;
    for (size_t length = 1 + random() % 9; length > 0; --length) token += pieces[random() % kinds];
    if (token.size() <= 16) tokens.insert(token);
  }
  return std::make_shared<Vocabulary>(std::vector<std::string>(tokens.begin(), tokens.end()),
                                      std::vector<int32_t>{});
}

TEST(TrieCharacters, KnowWhatLiesBelow) {
  const std::vector<std::string> strings = {"a", "ab1", "ab\u00e9x", "ac\xc3", "b\xa9"};
  std::vector<std::pair<std::string_view, int32_t>> named;
  for (size_t i = 0; i < strings.size(); ++i)
    named.emplace_back(strings[i], static_cast<int32_t>(i));
  const ByteTrie trie(std::move(named));
  const TrieCharacters characters(trie);
  EXPECT_EQ(characters.height(0), 4u) << "below 'a': b, e with an accent, x";
  EXPECT_EQ(characters.depth(0), 1u);
  EXPECT_EQ(std::popcount(characters.kinds(0)), 4) << "b and c, digits, x, several bytes";
  size_t b = 0;
  while (trie.node(b).depth != 1 || trie.node(b).byte != 'b') ++b;
  EXPECT_EQ(characters.kinds(b), CharacterKinds{1} << 63) << "no character begins with that byte";
  const TrieCharacters::Length last = characters.length(trie.first_id_below(0) + 1);
  EXPECT_EQ(last.bytes, 5);
  EXPECT_EQ(last.characters, 4);
}

TEST(StateLoops, CountCharacters) {
  const ByteTrie trie({{"q", 0}, {"qrs", 1}, {"q\u00e9", 2}, {"q1", 3}});
  const TrieCharacters characters(trie);
  const auto taken = [&](const std::string& pattern, std::string_view text, CharacterKinds kinds,
                         size_t height) {
    const Grammar grammar = regex(pattern);
    Machine machine(grammar);
    StateId state = machine.start();
    for (const char c : text) state = machine.next(state, static_cast<uint8_t>(c));
    return StateLoops(machine).characters_taken(state, kinds, height);
  };
  const CharacterKinds letters = TrieCharacters(ByteTrie({{"q", 0}, {"qrs", 1}})).kinds(0);
  const CharacterKinds all = characters.kinds(0);
  EXPECT_EQ(taken("[a-z]*!", "x", letters, 9), 9u);
  EXPECT_EQ(taken("[a-z]{5}!", "x", letters, 9), 4u);
  EXPECT_EQ(taken("[a-z]{5}!", "x", letters, 3), 3u);
  EXPECT_EQ(taken("[a-z]{0,5}!", "x", letters, 9), 4u);
  EXPECT_EQ(taken("[a-z]{0,5}", "x", letters, 9), StateLoops::kUnknown) << "it may end before";
  EXPECT_EQ(taken("[a-z]{5}k!", "x", letters, 9), StateLoops::kUnknown) << "k leads on";
  EXPECT_EQ(taken("[a-z]*!", "x", all, 9), StateLoops::kUnknown);
  EXPECT_EQ(taken("[^!]*!", "x", all, 9), 9u);
  EXPECT_EQ(taken("[^!]{0,5}!", "x", all, 9), 4u);
  EXPECT_EQ(taken("[^\u00e9]*!", "x", all, 9), StateLoops::kUnknown);
  EXPECT_EQ(taken("xyz", "x", letters, 9), StateLoops::kUnknown);
  EXPECT_EQ(taken("x!", "x", letters, 9), 0u);
}

// A mask says of every token what running its bytes says, wherever the text stands.
TEST(StateLoops, MasksAgreeWithTheMachine) {
  const auto vocabulary = bushy_vocabulary();
  std::mt19937 random(9);
  std::vector<uint32_t> mask((vocabulary->size() + 31) / 32);
  int steps = 0;
  for (const char* pattern :
       {"[a-z]*", "[^.]{3,9}\\.", "[a-z]{2,6}[a-z0-9]{1,5}Z", "([a-z]{1,3} )*q",
        "(a|b|\u8a9e){4,12}", "[^\"\\\\]{0,7}\"[^\u00e9]*", "(ab?){2,5}.{3,}", ".{1,4}(7.{1,4})*",
        "[a-fA-F]+(0|7)*", "\"([^\"\\\\]|\\\\[n\"])*\"[a-z]{4}"}) {
    SCOPED_TRACE(pattern);
    const Grammar grammar = regex(pattern);
    const auto source = make_constraint_source(regex(pattern), vocabulary);
    for (int walk = 0; walk < 6; ++walk) {
      const auto constraint = source->create();
      Machine machine(grammar);
      StateId state = machine.start();
      for (int step = 0; step < 12; ++step) {
        constraint->allowed(mask);
        std::vector<int32_t> ids;
        for (size_t id = 0; id < vocabulary->size(); ++id) {
          StateId after = state;
          for (const char byte : vocabulary->token(static_cast<int32_t>(id))) {
            after = machine.next(after, static_cast<uint8_t>(byte));
            if (after == kDead) break;
          }
          ASSERT_EQ(after != kDead, static_cast<bool>(mask[id / 32] >> (id % 32) & 1))
              << "step " << step << ", token '" << vocabulary->token(static_cast<int32_t>(id))
              << "'";
          if (after != kDead) ids.push_back(static_cast<int32_t>(id));
        }
        if (ids.empty()) break;
        ++steps;
        // Short ones, to come by many places.
        int32_t id = ids[random() % ids.size()];
        for (int i = 0; i < 20; ++i) {
          const int32_t other = ids[random() % ids.size()];
          if (vocabulary->token(other).size() < vocabulary->token(id).size()) id = other;
        }
        ASSERT_TRUE(constraint->accept(id));
        for (const char byte : vocabulary->token(id))
          state = machine.next(state, static_cast<uint8_t>(byte));
      }
    }
  }
  EXPECT_GT(steps, 300);
}

}  // namespace
}  // namespace kvant::serve::grammar
