#include "kvant/model/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "kvant/model/pretokenizer.h"
#include "kvant/model/special_tokens.h"
#include "kvant/model/testing/gguf_builder.h"
#include "kvant/model/unicode.h"

namespace kvant::model {
namespace {

using Ids = std::vector<TokenId>;

constexpr int32_t kNormal = 1;
constexpr int32_t kControl = 3;
constexpr int32_t kUserDefined = 4;
constexpr int32_t kByte = 6;

Result<Tokenizer> create(const testing::GgufBuilder& builder) {
  const std::vector<std::byte> file = builder.build();
  KVANT_ASSIGN(const Gguf gguf, Gguf::parse(file, "test"));
  return Tokenizer::create(gguf);  // needs neither afterwards
}

// A byte-level vocabulary: the printable ASCII characters, Ġ (space), Ċ (newline), some merges.
testing::GgufBuilder byte_pairs(std::string_view pre = "gpt-2") {
  std::vector<std::string> tokens = {"<|im_start|>", "<|im_end|>", "Ġ", "Ċ"};
  std::vector<int32_t> types = {kControl, kControl, kNormal, kNormal};
  for (char c = '!'; c <= '~'; ++c) tokens.emplace_back(1, c);
  for (const char* merged : {"th", "the", "Ġthe", "an", "Ġan"}) tokens.emplace_back(merged);
  types.resize(tokens.size(), kNormal);
  testing::GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2")
      .string("tokenizer.ggml.pre", pre)
      .strings("tokenizer.ggml.tokens", tokens)
      .array("tokenizer.ggml.token_type", GgufValueType::kI32, types)
      .strings("tokenizer.ggml.merges", {"t h", "th e", "Ġ the", "a n", "Ġ an"})
      .u32("tokenizer.ggml.bos_token_id", 0)
      .u32("tokenizer.ggml.eos_token_id", 1);
  return builder;
}

// A SentencePiece-style vocabulary with byte fallback; a higher score merges first.
testing::GgufBuilder sentence_piece() {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>", "\n\n", "▁", "a",
                                     "b",     "ab",  "▁ab",  "abab", "ü"};
  std::vector<int32_t> types = {2,       kControl, kControl, kUserDefined, kNormal, kNormal,
                                kNormal, kNormal,  kNormal,  kNormal,      kNormal};
  std::vector<float> scores = {0, 0, 0, 0, -9, -9, -9, -1, -3, -2, -9};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    tokens.emplace_back(name);
    types.push_back(kByte);
    scores.push_back(0);
  }
  testing::GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "llama")
      .strings("tokenizer.ggml.tokens", tokens)
      .array("tokenizer.ggml.scores", GgufValueType::kF32, scores)
      .array("tokenizer.ggml.token_type", GgufValueType::kI32, types);
  return builder;
}

TEST(Tokenizer, BytePairsMergeByRank) {
  const Result<Tokenizer> tokenizer = create(byte_pairs());
  ASSERT_TRUE(tokenizer) << tokenizer.error().message();
  EXPECT_EQ(tokenizer->family(), "bpe");
  const TokenId the = *tokenizer->find("the");
  const TokenId space_the = *tokenizer->find("Ġthe");
  const TokenId space_an = *tokenizer->find("Ġan");
  EXPECT_EQ(tokenizer->encode("the the an").value(), (Ids{the, space_the, space_an}));
  // The last space of a run belongs to the word that follows.
  const TokenId space = *tokenizer->find("Ġ");
  EXPECT_EQ(tokenizer->encode("the   the").value(), (Ids{the, space, space, space_the}));
  EXPECT_EQ(tokenizer->encode("").value(), Ids{});
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("the  an\n!").value()).value(), "the  an\n!");
}

TEST(Tokenizer, SpecialTokens) {
  const Result<Tokenizer> tokenizer = create(byte_pairs());
  ASSERT_TRUE(tokenizer);
  const TokenId the = *tokenizer->find("the");
  EXPECT_EQ(tokenizer->encode("<|im_start|>the<|im_end|>").value(), (Ids{0, the, 1}));
  EXPECT_EQ(tokenizer->encode("the", {.bos = Bos::kAlways}).value(), (Ids{0, the}));
  EXPECT_EQ(tokenizer->encode("the", {.bos = Bos::kAsModel}).value(), (Ids{the}));
  const Ids plain = tokenizer->encode("<|im_end|>", {.special = SpecialInText::kIgnore}).value();
  EXPECT_EQ(plain.size(), 10u);
  EXPECT_EQ(tokenizer->decode(plain).value(), "<|im_end|>");
  EXPECT_EQ(tokenizer->decode(Ids{0, the, 1}).value(), "<|im_start|>the<|im_end|>");
  EXPECT_EQ(tokenizer->decode(Ids{0, the, 1}, SpecialInOutput::kHide).value(), "the");
  EXPECT_EQ(tokenizer->bos(), 0);
  EXPECT_EQ(tokenizer->eos(), 1);
  EXPECT_EQ(tokenizer->eot(), 1);
  EXPECT_TRUE(tokenizer->is_end_of_generation(1));
  EXPECT_FALSE(tokenizer->is_end_of_generation(the));
  EXPECT_TRUE(tokenizer->is_control(0));
}

TEST(Tokenizer, IgnoreMergesTakesWholePieces) {
  // "▁" has no merge that leads to "zz", which is a token all the same.
  testing::GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2")
      .string("tokenizer.ggml.pre", "llama-bpe")
      .strings("tokenizer.ggml.tokens", {"z", "zz", "<s>"})
      .strings("tokenizer.ggml.merges", {})
      .u32("tokenizer.ggml.bos_token_id", 2);
  const Result<Tokenizer> tokenizer = create(builder);
  ASSERT_TRUE(tokenizer) << tokenizer.error().message();
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->encode("zz").value(), (Ids{1}));
  EXPECT_EQ(tokenizer->encode("zzz", {.bos = Bos::kAsModel}).value(), (Ids{2, 0, 0, 0}));
}

TEST(Tokenizer, SentencePieceMergesByScore) {
  testing::GgufBuilder builder = sentence_piece();
  const Result<Tokenizer> tokenizer =
      create(builder.boolean("tokenizer.ggml.add_space_prefix", false));
  ASSERT_TRUE(tokenizer) << tokenizer.error().message();
  EXPECT_EQ(tokenizer->family(), "spm");
  EXPECT_EQ(tokenizer->encode("ab").value(), (Ids{7}));
  EXPECT_EQ(tokenizer->encode("abab ab").value(), (Ids{9, 8}));
  EXPECT_EQ(tokenizer->encode("ü", {.bos = Bos::kAsModel}).value(), (Ids{1, 10}));
  // User-defined tokens come first, what is no token becomes bytes.
  EXPECT_EQ(tokenizer->encode("a\n\n\x01").value(), (Ids{5, 3, 11 + 1}));
  EXPECT_EQ(tokenizer->encode("é").value(), (Ids{11 + 0xc3, 11 + 0xa9}));
  // Any bytes come back, even where a broken sequence swallows a marked space.
  for (const std::string text : {"é ab", "\xe2 ab", "\xf0 ", "\xc3 \xe2\x96", "\xff\xfe", "a  b"}) {
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text).value()).value(), text);
  }
}

TEST(Tokenizer, SpacePrefix) {
  const Result<Tokenizer> tokenizer = create(sentence_piece());
  ASSERT_TRUE(tokenizer);
  EXPECT_TRUE(tokenizer->adds_space_prefix());
  EXPECT_EQ(tokenizer->encode("ab").value(), (Ids{8}));
  EXPECT_EQ(tokenizer->encode("ab</s>ab").value(), (Ids{8, 2, 8}));
  for (const std::string text : {"ab", " ab", "ab</s>ab", "</s> ab", "a\n\na"}) {
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text).value()).value(), text);
  }
}

TEST(Tokenizer, StreamsOnlyWholeCharacters) {
  testing::GgufBuilder builder = sentence_piece();
  const Result<Tokenizer> tokenizer =
      create(builder.boolean("tokenizer.ggml.add_space_prefix", false));
  ASSERT_TRUE(tokenizer);
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.push(5), "a");
  EXPECT_EQ(stream.push(11 + 0xf0), "");
  EXPECT_EQ(stream.push(11 + 0x9f), "");
  EXPECT_EQ(stream.push(11 + 0x98), "");
  EXPECT_EQ(stream.push(11 + 0x80), "😀");
  EXPECT_EQ(stream.push(2), "");  // control tokens are not shown
  EXPECT_EQ(stream.push(11 + 0xc3), "");
  EXPECT_EQ(stream.push(5),
            "\xc3"
            "a");  // cannot become a character any more
  EXPECT_EQ(stream.push(11 + 0xe2), "");
  EXPECT_EQ(stream.finish(), "\xe2");
  EXPECT_EQ(stream.finish(), "");
}

TEST(Tokenizer, ErrorsNameWhatIsWrong) {
  const auto message = [](const testing::GgufBuilder& builder) {
    const Result<Tokenizer> tokenizer = create(builder);
    return tokenizer ? std::string() : tokenizer.error().message();
  };
  testing::GgufBuilder empty;
  EXPECT_EQ(message(empty), "test: no metadata key \"tokenizer.ggml.model\"");
  EXPECT_NE(message(byte_pairs("no-such")).find("\"no-such\" is not supported; supported: smollm"),
            std::string::npos);
  testing::GgufBuilder bert;
  EXPECT_NE(message(bert.string("tokenizer.ggml.model", "bert")).find("\"bert\""),
            std::string::npos);
  testing::GgufBuilder twice;
  twice.string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", {"a", "b", "a"});
  EXPECT_EQ(message(twice), "test: the tokens 0 and 2 have the same text");
  testing::GgufBuilder merge;
  merge.string("tokenizer.ggml.model", "gpt2")
      .strings("tokenizer.ggml.tokens", {"a"})
      .strings("tokenizer.ggml.merges", {"ab"});
  EXPECT_NE(message(merge).find("item 0 of tokenizer.ggml.merges"), std::string::npos);

  const Result<Tokenizer> tokenizer = create(byte_pairs());
  ASSERT_TRUE(tokenizer);
  EXPECT_EQ(tokenizer->decode(Ids{5, 100000}).error().code(), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(tokenizer->decode(Ids{-1}));
  EXPECT_EQ(tokenizer->token_bytes(-1), "");
}

std::vector<std::string> pieces(std::string_view pre, std::string_view text) {
  const PreTokenizer* found = find_pretokenizer(pre).value();
  const ClassifiedText classified(decode_utf8(text));
  std::vector<std::string> out;
  for (const Piece piece : found->split(classified)) {
    out.emplace_back();
    for (size_t i = piece.begin; i < piece.end; ++i) {
      append_utf8(classified.code_points[i], out.back());
    }
  }
  return out;
}

TEST(PreTokenizer, SplitsAsEachModelDoes) {
  using Pieces = std::vector<std::string>;
  EXPECT_EQ(pieces("gpt-2", "I'm 123x!?  done\n"),
            (Pieces{"I", "'m", " 123", "x", "!?", " ", " done", "\n"}));
  EXPECT_EQ(pieces("smollm", "on 12.5 days"), (Pieces{"on", " ", "1", "2", ".", "5", " days"}));
  EXPECT_EQ(pieces("qwen2", "I'LL 123\n\n  x(y)"),
            (Pieces{"I", "'LL", " ", "1", "2", "3", "\n\n", " ", " x", "(y", ")"}));
  EXPECT_EQ(pieces("llama-bpe", "12345 ab;\r\nc"), (Pieces{"123", "45", " ab", ";\r\n", "c"}));
  EXPECT_EQ(pieces("default", "a+b 1234"), (Pieces{"a", "+", "b", " ", "123", "4"}));
  EXPECT_EQ(pieces("qwen2",
                   "\xff"
                   "a"),
            (Pieces{"\xef\xbf\xbd"
                    "a"}));
}

TEST(PreTokenizer, PiecesCoverTheText) {
  std::mt19937 random(3);
  const std::string_view alphabet[] = {"a", "'", "s", " ",    "\n", "\r",
                                       "1", "!", "é", "\xff", "字", "$"};
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (auto n = random() % 20; n > 0; --n) text += alphabet[random() % std::size(alphabet)];
    for (const char* pre : {"gpt-2", "smollm", "qwen2", "llama-bpe", "default"}) {
      const PreTokenizer* found = find_pretokenizer(pre).value();
      const ClassifiedText classified(decode_utf8(text));
      size_t at = 0;
      for (const Piece piece : found->split(classified)) {
        EXPECT_EQ(piece.begin, at);
        EXPECT_GT(piece.end, piece.begin);
        at = piece.end;
      }
      EXPECT_EQ(at, classified.code_points.size());
    }
  }
}

TEST(Unicode, DecodesLeniently) {
  EXPECT_EQ(decode_utf8("aé字😀"), (std::vector<char32_t>{U'a', U'é', U'字', U'😀'}));
  EXPECT_EQ(decode_utf8("\x80\xc3"), (std::vector<char32_t>{0xfffd, 0xfffd}));
  EXPECT_EQ(decode_utf8("\xe2\x96x"), (std::vector<char32_t>{0xfffd, 0xfffd, U'x'}));
  EXPECT_EQ(decode_utf8("\xc0\x80"), (std::vector<char32_t>{0}));           // overlong
  EXPECT_EQ(decode_utf8("\xed\xa0\x80"), (std::vector<char32_t>{0xd800}));  // surrogate
  EXPECT_EQ(decode_utf8("\xf4\x90\x80\x80").size(), 4u);                    // above U+10FFFF
  EXPECT_EQ(complete_utf8_prefix("a\xf0\x9f\x98"), 1u);
  EXPECT_EQ(complete_utf8_prefix("a\xf0\x9f\x98\x80"), 5u);
  EXPECT_EQ(complete_utf8_prefix("\x80\x80\x80\x80"), 4u);
}

// Long runs of one character, long words and many matches of special tokens take n log n.
TEST(Tokenizer, LongTextsTakeNoQuadraticTime) {
  const Result<Tokenizer> bpe = create(byte_pairs());
  const Result<Tokenizer> spm = create(sentence_piece());
  ASSERT_TRUE(bpe);
  ASSERT_TRUE(spm);
  for (const std::string unit : {"the", "\n", " ", "<|im_end|", "ab", "\xff", "<"}) {
    std::string text;
    while (text.size() < 400000) text += unit;
    const auto start = std::chrono::steady_clock::now();
    const Ids ids = bpe->encode(text).value();
    const Ids spm_ids = spm->encode(text).value();
    EXPECT_FALSE(spm_ids.empty());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    EXPECT_LT(took.count(), 20.0) << unit;  // quadratic would be minutes
  }
}

}  // namespace
}  // namespace kvant::model
