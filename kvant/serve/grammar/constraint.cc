#include "kvant/serve/grammar/constraint.h"

#include <fmt/format.h>

#include <algorithm>

#include "kvant/serve/grammar/constraint_state.h"
#include "kvant/serve/grammar/regex.h"

namespace kvant::serve::grammar {
namespace {

constexpr size_t kMaxChoices = 10'000;

Result<NodeId> add_choices(GrammarBuilder& builder, NodeId from, const ConstraintSpec& spec) {
  if (spec.choices.empty() || spec.choices.size() > kMaxChoices) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("{} choices; expected 1 to {}", spec.choices.size(), kMaxChoices));
  }
  const NodeId end = builder.new_node();
  for (const std::string& choice : spec.choices) {
    if (choice.empty()) return Error(ErrorCode::kInvalidArgument, "a choice is an empty string");
    builder.empty_edge(builder.literal(from, choice), end);
  }
  return end;
}

Result<NodeId> add_sequences(GrammarBuilder& builder, NodeId from, const ConstraintSpec& spec) {
  if (spec.sequences.empty() || spec.max_sequences == 0) {
    return Error(ErrorCode::kInvalidArgument, "no sequence to choose from");
  }
  JsonSchemaCompiler compiler(builder, spec.json);
  const RuleId any = builder.new_rule();
  const NodeId end = builder.new_node();
  for (const auto& sequence : spec.sequences) {
    NodeId at = builder.start(any);
    for (const ConstraintPiece& piece : sequence) {
      if (piece.kind == ConstraintPiece::Kind::kText) {
        at = builder.literal(at, piece.text);
      } else {
        KVANT_ASSIGN(at, compiler.add(at, piece.text));
      }
    }
    builder.empty_edge(at, end);
  }
  builder.end_rule(any, end);
  const auto next = [&](NodeId at) {
    return builder.call(builder.literal(at, spec.separator), any);
  };
  return builder.repeat(builder.call(from, any), next, 0, spec.max_sequences - 1);
}

Result<NodeId> add_spec(GrammarBuilder& builder, NodeId from, const ConstraintSpec& spec) {
  switch (spec.kind) {
    case ConstraintSpec::Kind::kJsonObject:
      return JsonSchemaCompiler(builder, spec.json).add(from, R"({"type": "object"})");
    case ConstraintSpec::Kind::kJsonSchema:
      return JsonSchemaCompiler(builder, spec.json).add(from, spec.text);
    case ConstraintSpec::Kind::kRegex: return add_regex(builder, from, spec.text);
    case ConstraintSpec::Kind::kChoice: return add_choices(builder, from, spec);
    case ConstraintSpec::Kind::kSequences: return add_sequences(builder, from, spec);
  }
  return Error(ErrorCode::kInvalidArgument, "unknown kind of constraint");
}

// Equal for equal specs only: every string with its length in front.
std::string key_of(const ConstraintSpec& spec) {
  std::string key = fmt::format("{} {} {} {}:{} {}:{} ", static_cast<int>(spec.kind),
                                static_cast<int>(spec.json.whitespace), spec.max_sequences,
                                spec.text.size(), spec.text, spec.separator.size(), spec.separator);
  for (const std::string& choice : spec.choices) key += fmt::format("{}:{}", choice.size(), choice);
  for (const auto& sequence : spec.sequences) {
    key += fmt::format("({}", sequence.size());
    for (const ConstraintPiece& piece : sequence) {
      key += fmt::format(" {} {}:{}", static_cast<int>(piece.kind), piece.text.size(), piece.text);
    }
  }
  return key;
}

}  // namespace

std::shared_ptr<const Vocabulary> Vocabulary::create(const model::Tokenizer& tokenizer) {
  std::vector<std::string> tokens(tokenizer.vocabulary_size());
  for (model::TokenId id = 0; id < tokenizer.vocabulary_size(); ++id) {
    if (tokenizer.is_control(id) || tokenizer.is_end_of_generation(id)) continue;
    tokens[id] = tokenizer.token_bytes(id);
  }
  const auto ends = tokenizer.end_of_generation();
  return std::make_shared<Vocabulary>(std::move(tokens),
                                      std::vector<int32_t>(ends.begin(), ends.end()));
}

Vocabulary::Vocabulary(std::vector<std::string> tokens, std::vector<int32_t> end_tokens)
    : tokens_(std::move(tokens)), end_tokens_(std::move(end_tokens)) {
  std::vector<std::pair<std::string_view, int32_t>> strings;
  strings.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (tokens_[id].size() > ByteTrie::kMaxLength) tokens_[id].clear();
    if (!tokens_[id].empty()) strings.emplace_back(tokens_[id], static_cast<int32_t>(id));
  }
  trie_ = ByteTrie(std::move(strings));
  characters_ = TrieCharacters(trie_);
}

Result<Grammar> compile_grammar(const ConstraintSpec& spec) {
  GrammarBuilder builder;
  const RuleId root = builder.new_rule();
  KVANT_ASSIGN(const NodeId end, add_spec(builder, builder.start(root), spec));
  builder.end_rule(root, end);
  Result<Grammar> grammar = builder.build(root);
  if (!grammar) return grammar.error().with_context("the constraint on the output");
  return grammar;
}

std::shared_ptr<const ConstraintSource> make_constraint_source(
    Grammar grammar, std::shared_ptr<const Vocabulary> vocabulary) {
  return std::make_shared<GrammarSource>(std::move(grammar), std::move(vocabulary));
}

ConstraintCompiler::ConstraintCompiler(std::shared_ptr<const Vocabulary> vocabulary,
                                       size_t capacity)
    : vocabulary_(std::move(vocabulary)), capacity_(capacity) {}

Result<std::shared_ptr<const ConstraintSource>> ConstraintCompiler::compile(
    const ConstraintSpec& spec) {
  std::string key = key_of(spec);
  const auto with_key = [&](const Entry& entry) { return entry.key == key; };
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::ranges::find_if(entries_, with_key);
    if (found != entries_.end()) {
      std::rotate(found, found + 1, entries_.end());
      return entries_.back().source;
    }
  }
  // Not under the lock: a large schema must not keep others waiting.
  KVANT_ASSIGN(Grammar grammar, compile_grammar(spec));
  auto source = make_constraint_source(std::move(grammar), vocabulary_);
  const std::lock_guard lock(mutex_);
  std::erase_if(entries_, with_key);
  if (entries_.size() >= capacity_) entries_.erase(entries_.begin());
  entries_.push_back({std::move(key), source});
  return source;
}

}  // namespace kvant::serve::grammar
