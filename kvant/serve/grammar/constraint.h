// Constrained decoding: compiles what a request demands of its output, and says for each step which
// tokens keep to it.
//
// How: the grammar (grammar.h) runs over bytes; a token is allowed if all its bytes are. The
// vocabulary is a trie, so that one walk tries all tokens. For a place in a rule the walk is done
// once and kept: tokens that stay within the rule are a bitmask, and what tokens that leave it
// spell afterwards is a small trie of its own, which is walked with the real stack at every step
// (the idea of XGrammar, arXiv:2411.15100, section 3.1). Places within counted repetitions are told
// apart only where the count is near its end. Parts of the trie that a loop takes as a whole are
// not walked (trie_characters.h).
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/tokenizer.h"
#include "kvant/serve/grammar/byte_trie.h"
#include "kvant/serve/grammar/grammar.h"
#include "kvant/serve/grammar/json_schema.h"
#include "kvant/serve/grammar/trie_characters.h"
#include "kvant/serve/token_constraint.h"

namespace kvant::serve::grammar {

// The bytes of a model's tokens, as a trie. Immutable and thread-safe.
class Vocabulary {
 public:
  // Control tokens and those without text are never allowed; end-of-generation tokens at the end.
  static std::shared_ptr<const Vocabulary> create(const model::Tokenizer& tokenizer);
  // For tests: tokens by id.
  Vocabulary(std::vector<std::string> tokens, std::vector<int32_t> end_tokens);

  size_t size() const { return tokens_.size(); }
  std::string_view token(int32_t id) const { return tokens_[id]; }  // empty: never allowed
  std::span<const int32_t> end_tokens() const { return end_tokens_; }
  const ByteTrie& trie() const { return trie_; }
  const TrieCharacters& characters() const { return characters_; }

 private:
  std::vector<std::string> tokens_;
  std::vector<int32_t> end_tokens_;
  ByteTrie trie_;
  TrieCharacters characters_;
};

// One piece of a ConstraintSpec::kSequences: fixed text, or a value that satisfies a schema.
struct ConstraintPiece {
  enum class Kind { kText, kJsonSchema } kind = Kind::kText;
  std::string text;
};

// What the output must be.
struct ConstraintSpec {
  enum class Kind {
    kJsonObject,  // response_format json_object
    kJsonSchema,  // response_format json_schema, guided_json: `text` is the schema
    kRegex,       // guided_regex: `text`, of which the whole output is a match (regex.h)
    kChoice,      // guided_choice: one of `choices`
    kSequences,   // tool calls: 1 to max_sequences of `sequences`, `separator` in between
  };
  Kind kind = Kind::kJsonObject;
  std::string text = {};
  std::vector<std::string> choices = {};
  std::vector<std::vector<ConstraintPiece>> sequences = {};
  std::string separator = {};
  uint32_t max_sequences = 1;
  JsonOptions json = {};
};

// The grammar of a spec. kInvalidArgument or kUnsupported name what is wrong; time and memory are
// bounded whatever the spec says.
Result<Grammar> compile_grammar(const ConstraintSpec& spec);

// A source of constraints that keep to a grammar. What it creates keeps it alive.
std::shared_ptr<const ConstraintSource> make_constraint_source(
    Grammar grammar, std::shared_ptr<const Vocabulary> vocabulary);

// Compiles specs, and remembers the last ones: requests with the same schema share its masks.
// Thread-safe; for the HTTP threads.
class ConstraintCompiler {
 public:
  explicit ConstraintCompiler(std::shared_ptr<const Vocabulary> vocabulary, size_t capacity = 32);
  Result<std::shared_ptr<const ConstraintSource>> compile(const ConstraintSpec& spec);

 private:
  struct Entry {
    std::string key;
    std::shared_ptr<const ConstraintSource> source;
  };
  const std::shared_ptr<const Vocabulary> vocabulary_;  // shared with all sources
  const size_t capacity_;
  std::mutex mutex_;            // guards entries_
  std::vector<Entry> entries_;  // least recently used first
};

}  // namespace kvant::serve::grammar
