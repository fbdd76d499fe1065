// Hostile texts, ids and vocabularies. The first byte chooses: a fixed vocabulary of each family
// with every pre-tokenizer, or a file that is the rest of the input.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/model/testing/gguf_builder.h"
#include "kvant/model/tokenizer.h"

namespace {

using kvant::model::Gguf;
using kvant::model::GgufValueType;
using kvant::model::TokenId;
using kvant::model::Tokenizer;

Tokenizer create(const kvant::model::testing::GgufBuilder& builder) {
  const std::vector<std::byte> file = builder.build();
  return Tokenizer::create(Gguf::parse(file, "fuzz").value()).value();
}

Tokenizer byte_pairs(std::string_view pre) {
  std::vector<std::string> tokens = {"<|im_start|>", "<|im_end|>", "Ġ", "Ċ"};
  for (char c = '!'; c <= '~'; ++c) tokens.emplace_back(1, c);
  for (const char* merged : {"th", "the", "Ġthe", "ĠĠ", "ĊĊ"}) tokens.emplace_back(merged);
  std::vector<int32_t> types(tokens.size(), 1);
  types[0] = types[1] = 3;
  kvant::model::testing::GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2")
      .string("tokenizer.ggml.pre", pre)
      .strings("tokenizer.ggml.tokens", tokens)
      .array("tokenizer.ggml.token_type", GgufValueType::kI32, types)
      .strings("tokenizer.ggml.merges", {"t h", "th e", "Ġ the", "Ġ Ġ", "Ċ Ċ"})
      .u32("tokenizer.ggml.bos_token_id", 0);
  return create(builder);
}

Tokenizer sentence_piece(bool prefix) {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>", "\n\n", "  ",
                                     "▁",     "a",   "b",    "ab",   "▁ab"};
  std::vector<int32_t> types = {2, 3, 3, 4, 4, 1, 1, 1, 1, 1};
  std::vector<float> scores = {0, 0, 0, 0, 0, -9, -9, -9, -1, -3};
  for (int byte = 0; byte < 256; ++byte) {
    constexpr char kHex[] = "0123456789ABCDEF";
    tokens.push_back(std::string("<0x") + kHex[byte / 16] + kHex[byte % 16] + ">");
    types.push_back(6);
    scores.push_back(0);
  }
  kvant::model::testing::GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "llama")
      .strings("tokenizer.ggml.tokens", tokens)
      .array("tokenizer.ggml.scores", GgufValueType::kF32, scores)
      .array("tokenizer.ggml.token_type", GgufValueType::kI32, types)
      .boolean("tokenizer.ggml.add_space_prefix", prefix);
  return create(builder);
}

// Encodes and decodes; SentencePiece must give the bytes back unless the text has U+2581 itself.
void round_trip(const Tokenizer& tokenizer, std::string_view text) {
  using kvant::model::SpecialInText;
  for (const SpecialInText special : {SpecialInText::kParse, SpecialInText::kIgnore}) {
    const std::vector<TokenId> ids = tokenizer.encode(text, {.special = special}).value();
    const std::string back = tokenizer.decode(ids).value();
    if (tokenizer.family() == "spm" && text.find("\xe2\x96\x81") == std::string_view::npos &&
        text.find("<unk>") == std::string_view::npos) {
      KVANT_CHECK(back == text, "SentencePiece keeps every byte");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Tokenizer tokenizers[] = {
      byte_pairs("gpt-2"),   byte_pairs("smollm"),  byte_pairs("qwen2"), byte_pairs("llama-bpe"),
      byte_pairs("default"), sentence_piece(false), sentence_piece(true)};
  constexpr size_t kCount = sizeof(tokenizers) / sizeof(tokenizers[0]);
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data + 1), size - 1);
  const size_t choice = data[0] % (kCount + 1);
  if (choice < kCount) {
    round_trip(tokenizers[choice], rest);
    std::vector<TokenId> ids;
    for (const char c : rest) ids.push_back(static_cast<unsigned char>(c));
    (void)tokenizers[choice].decode(ids);
    return 0;
  }
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data + 1), size - 1);
  const kvant::Result<Gguf> gguf = Gguf::parse(bytes, "fuzz");
  if (!gguf) return 0;
  const kvant::Result<Tokenizer> tokenizer = Tokenizer::create(*gguf);
  if (!tokenizer) return 0;
  const kvant::Result<std::vector<TokenId>> ids =
      tokenizer->encode("Hello, <s> world 123\n\n  \xff é", {.bos = kvant::model::Bos::kAsModel});
  if (ids) (void)tokenizer->decode(*ids);
  return 0;
}
