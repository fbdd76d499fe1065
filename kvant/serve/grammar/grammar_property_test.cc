// What random schemas promise: every walk through allowed tokens ends in a document that satisfies
// the schema, and every document that satisfies it is allowed token by token.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "kvant/model/gguf.h"
#include "kvant/model/tokenizer.h"
#include "kvant/serve/grammar/constraint.h"
#include "kvant/serve/grammar/testing/documents.h"

namespace kvant::serve::grammar {
namespace {

using testing::Json;

std::shared_ptr<const ConstraintSource> source_of(const Json& schema,
                                                  std::shared_ptr<const Vocabulary> vocabulary) {
  const ConstraintSpec spec = {.kind = ConstraintSpec::Kind::kJsonSchema, .text = schema.dump()};
  Result<Grammar> grammar = compile_grammar(spec);
  EXPECT_TRUE(grammar) << grammar.error().message() << "\n" << schema.dump(1);
  if (!grammar) return nullptr;
  return make_constraint_source(std::move(grammar).value(), std::move(vocabulary));
}

std::vector<int32_t> allowed_ids(TokenConstraint& constraint, std::vector<uint32_t>& bitmask) {
  constraint.allowed(bitmask);
  std::vector<int32_t> ids;
  for (size_t id = 0; id < bitmask.size() * 32; ++id) {
    if (bitmask[id / 32] >> (id % 32) & 1) ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

// A random walk. Once it is long, tokens that end things are preferred: a walk among all would go
// on for ever.
std::string walk(const ConstraintSource& source, const Vocabulary& vocabulary,
                 testing::SchemaWriter& random, size_t patience) {
  const auto constraint = source.create();
  std::vector<uint32_t> bitmask((vocabulary.size() + 31) / 32);
  std::string text;
  for (size_t step = 0; step < patience + 4000; ++step) {
    std::vector<int32_t> ids = allowed_ids(*constraint, bitmask);
    EXPECT_FALSE(ids.empty());
    int32_t id = ids[random.pick(ids.size())];
    if (step > patience) {
      std::vector<int32_t> closing;
      for (const int32_t i : ids) {
        const std::string_view token = vocabulary.token(i);
        if (token.empty()) closing = {i};
        if (token.empty()) break;
        if (token.size() == 1 &&
            std::string_view("}]\"0:b").find(token[0]) != std::string_view::npos)
          closing.push_back(i);
      }
      if (!closing.empty()) id = closing[random.pick(closing.size())];
    }
    EXPECT_TRUE(constraint->accept(id)) << text;
    if (vocabulary.token(id).empty()) return text;
    text += vocabulary.token(id);
  }
  ADD_FAILURE() << "no end: " << text;
  return text;
}

void expect_walks_to_satisfy(const Json& schema,
                             const std::shared_ptr<const Vocabulary>& vocabulary,
                             testing::SchemaWriter& random, int num_walks) {
  const auto source = source_of(schema, vocabulary);
  if (source == nullptr) return;
  const testing::Validator validator(schema);
  for (int i = 0; i < num_walks; ++i) {
    const std::string text = walk(*source, *vocabulary, random, 10 + random.pick(60));
    const Json document = Json::parse(text, nullptr, false);
    ASSERT_FALSE(document.is_discarded()) << text << "\n" << schema.dump(1);
    ASSERT_TRUE(validator.valid(document)) << text << "\n" << schema.dump(1);
  }
}

TEST(GrammarProperty, WalksEndInDocumentsThatSatisfyTheSchema) {
  const auto vocabulary = testing::small_vocabulary();
  for (uint32_t seed = 0; seed < 150; ++seed) {
    testing::SchemaWriter random(seed);
    const Json schema = random.schema();
    expect_walks_to_satisfy(schema, vocabulary, random, 4);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
}

TEST(GrammarProperty, DocumentsThatSatisfyTheSchemaAreAccepted) {
  const auto vocabulary = testing::small_vocabulary(2);
  std::vector<uint32_t> bitmask((vocabulary->size() + 31) / 32);
  for (uint32_t seed = 1000; seed < 1300; ++seed) {
    testing::SchemaWriter random(seed);
    const Json schema = random.schema();
    const auto source = source_of(schema, vocabulary);
    ASSERT_NE(source, nullptr);
    const testing::Validator validator(schema);
    for (int i = 0; i < 4; ++i) {
      const std::string text = random.document();
      ASSERT_TRUE(validator.valid(Json::parse(text))) << text << "\n" << schema.dump(1);
      auto constraint = source->create();
      for (const int32_t id : random.tokenize(*vocabulary, text)) {
        constraint->allowed(bitmask);
        ASSERT_TRUE(bitmask[id / 32] >> (id % 32) & 1)
            << text << "\n at " << vocabulary->token(id) << "\n"
            << schema.dump(1);
        if (random.chance(0.1)) constraint = constraint->clone();
        ASSERT_TRUE(constraint->accept(id)) << text;
      }
      ASSERT_TRUE(constraint->is_complete()) << text << "\n" << schema.dump(1);
    }
  }
}

// The mask says of every token what running its bytes says.
TEST(GrammarProperty, MasksAgreeWithTheMachine) {
  const auto vocabulary = testing::small_vocabulary(3);
  for (uint32_t seed = 2000; seed < 2040; ++seed) {
    testing::SchemaWriter random(seed);
    const auto source = source_of(random.schema(), vocabulary);
    const auto constraint = source->create();
    std::vector<uint32_t> bitmask((vocabulary->size() + 31) / 32);
    for (int step = 0; step < 25; ++step) {
      const std::vector<int32_t> ids = allowed_ids(*constraint, bitmask);
      for (size_t id = 0; id < vocabulary->size(); ++id) {
        const bool accepted = constraint->clone()->accept(static_cast<int32_t>(id));
        ASSERT_EQ(accepted, static_cast<bool>(bitmask[id / 32] >> (id % 32) & 1))
            << "seed " << seed << " token '" << vocabulary->token(static_cast<int32_t>(id)) << "'";
      }
      const int32_t id = ids[random.pick(ids.size())];
      ASSERT_TRUE(constraint->accept(id));
      if (vocabulary->token(id).empty()) break;
    }
  }
}

TEST(GrammarProperty, RealVocabularies) {
  const char* folder = std::getenv("KVANT_MODEL_DIR");
  if (folder == nullptr) GTEST_SKIP() << "KVANT_MODEL_DIR is not set";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".gguf") continue;
    const Result<model::Gguf> gguf = model::Gguf::open(entry.path());
    ASSERT_TRUE(gguf) << gguf.error().message();
    const Result<model::Tokenizer> tokenizer = model::Tokenizer::create(*gguf);
    ASSERT_TRUE(tokenizer) << tokenizer.error().message();
    const auto vocabulary = Vocabulary::create(*tokenizer);
    std::vector<uint32_t> bitmask((vocabulary->size() + 31) / 32);
    for (uint32_t seed = 3000; seed < 3006; ++seed) {
      testing::SchemaWriter random(seed);
      const Json schema = random.schema();
      expect_walks_to_satisfy(schema, vocabulary, random, 1);
      const auto source = source_of(schema, vocabulary);
      for (int i = 0; i < 3; ++i) {
        const std::string text = random.document();
        const auto ids = tokenizer->encode(text);
        ASSERT_TRUE(ids);
        if (tokenizer->decode(*ids).value() != text) continue;  // a leading space
        const auto constraint = source->create();
        for (const int32_t id : *ids) ASSERT_TRUE(constraint->accept(id)) << text;
        ASSERT_TRUE(constraint->is_complete()) << text;
      }
    }
  }
}

}  // namespace
}  // namespace kvant::serve::grammar
