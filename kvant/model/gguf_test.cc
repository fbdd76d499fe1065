#include "kvant/model/gguf.h"

#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "kvant/model/testing/gguf_builder.h"

namespace kvant::model {
namespace {

using formats::WeightType;
using testing::GgufBuilder;
using testing::plain_weights;
using testing::random_weights;

GgufBuilder small_model() {
  GgufBuilder builder;
  builder.string("general.architecture", "llama")
      .u32("llama.block_count", 2)
      .f32("llama.rope.freq_base", 10000.0f)
      .boolean("tokenizer.ggml.add_bos_token", true)
      .scalar("wide", GgufValueType::kU64, uint64_t{1} << 40)
      .scalar("negative", GgufValueType::kI8, int8_t{-3})
      .scalar("double", GgufValueType::kF64, 0.5)
      .array<uint16_t>("heads", GgufValueType::kU16, {4, 8})
      .array<float>("scores", GgufValueType::kF32, {-1.0f, 2.5f})
      .array<uint8_t>("flags", GgufValueType::kBool, {1, 0, 1})
      .strings("tokenizer.ggml.tokens", {"a", "", "\xff\n"})
      .tensor("token_embd.weight", WeightType::kF32, {3, 2},
              plain_weights(WeightType::kF32, {1, 2, 3, 4, 5, 6}))
      .tensor("blk.0.attn_q.weight", WeightType::kQ4_K, {256, 2},
              random_weights(WeightType::kQ4_K, 512, 1))
      .tensor("output_norm.weight", WeightType::kBF16, {5},
              plain_weights(WeightType::kBF16, {1, 2, 3, 4, 5}));
  return builder;
}

// The message of the error that parsing gives; empty if it succeeds.
std::string failure(const std::vector<std::byte>& file, ErrorCode code = ErrorCode::kCorruptData) {
  const Result<Gguf> result = Gguf::parse(file, "test");
  if (result) return "";
  EXPECT_EQ(result.error().code(), code) << result.error().message();
  return result.error().message();
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

TEST(Gguf, ReadsMetadata) {
  for (const uint32_t version : {2u, 3u}) {
    GgufBuilder builder = small_model();
    builder.version = version;
    const std::vector<std::byte> file = builder.build();
    const Result<Gguf> parsed = Gguf::parse(file, "test");
    ASSERT_TRUE(parsed) << parsed.error().message();
    const Gguf& gguf = *parsed;
    EXPECT_EQ(gguf.version(), version);
    EXPECT_EQ(gguf.keys().size(), 11u);
    EXPECT_EQ(gguf.keys()[1], "llama.block_count");
    EXPECT_EQ(gguf.string("general.architecture").value(), "llama");
    EXPECT_EQ(gguf.u32("llama.block_count").value(), 2u);
    EXPECT_EQ(gguf.f32("llama.rope.freq_base").value(), 10000.0f);
    EXPECT_EQ(gguf.f32("double").value(), 0.5f);
    EXPECT_TRUE(gguf.boolean("tokenizer.ggml.add_bos_token").value());
    EXPECT_EQ(gguf.u64("wide").value(), uint64_t{1} << 40);
    EXPECT_EQ(gguf.i64("negative").value(), -3);
    EXPECT_EQ(gguf.u32_array("heads").value(), (std::vector<uint32_t>{4, 8}));
    EXPECT_EQ(gguf.f32_array("scores").value(), (std::vector<float>{-1.0f, 2.5f}));
    EXPECT_EQ(gguf.boolean_array("flags").value(), (std::vector<bool>{true, false, true}));
    EXPECT_EQ(gguf.string_array("tokenizer.ggml.tokens").value(),
              (std::vector<std::string_view>{"a", "", "\xff\n"}));
    EXPECT_EQ(gguf.u32_per_layer("heads", 2).value(), (std::vector<uint32_t>{4, 8}));
    EXPECT_EQ(gguf.u32_per_layer("llama.block_count", 3).value(), (std::vector<uint32_t>{2, 2, 2}));
    EXPECT_EQ(gguf.u32_or("absent", 7).value(), 7u);
    EXPECT_EQ(gguf.string_or("absent", "x").value(), "x");
  }
}

TEST(Gguf, GettersNameTheKeyThatIsWrong) {
  const std::vector<std::byte> file = small_model().build();
  const Result<Gguf> gguf = Gguf::parse(file, "test");
  ASSERT_TRUE(gguf);
  EXPECT_EQ(gguf->u32("absent").error().code(), ErrorCode::kNotFound);
  EXPECT_TRUE(contains(gguf->u32("absent").error().message(), "\"absent\""));
  EXPECT_EQ(gguf->u32("wide").error().code(), ErrorCode::kCorruptData);
  EXPECT_FALSE(gguf->u32("negative"));
  EXPECT_FALSE(gguf->f32("llama.block_count"));
  EXPECT_FALSE(gguf->boolean("llama.block_count"));
  EXPECT_FALSE(gguf->u32_or("general.architecture", 1));
  EXPECT_FALSE(gguf->u32("heads"));
  EXPECT_FALSE(gguf->f32_array("heads"));
  EXPECT_FALSE(gguf->string_array("heads"));
  EXPECT_FALSE(gguf->boolean_array("heads"));
  const Result<std::vector<uint32_t>> heads = gguf->u32_per_layer("heads", 3);
  EXPECT_EQ(heads.error().message(),
            "test: \"heads\" should be one value for each of 3 layers, found an array of 2 u16");
}

TEST(Gguf, FindsTensors) {
  const std::vector<std::byte> file = small_model().build();
  const Result<Gguf> gguf = Gguf::parse(file, "test");
  ASSERT_TRUE(gguf);
  ASSERT_EQ(gguf->tensors().size(), 3u);
  const GgufTensor* embedding = gguf->find_tensor("token_embd.weight");
  ASSERT_NE(embedding, nullptr);
  EXPECT_EQ(embedding->dims, (std::array<int64_t, 4>{3, 2, 1, 1}));
  EXPECT_EQ(embedding->num_dims, 2);
  EXPECT_EQ(embedding->num_rows(), 2);
  EXPECT_EQ(embedding->row_bytes(), 12);
  std::vector<float> row(3);
  formats::dequantize_row(embedding->type, embedding->bytes.data() + 12, 3, row.data());
  EXPECT_EQ(row, (std::vector<float>{4, 5, 6}));
  EXPECT_EQ(gguf->find_tensor("blk.0.attn_q.weight")->bytes.size(), 2u * 144);
  EXPECT_EQ(gguf->find_tensor("absent"), nullptr);
  EXPECT_EQ(gguf->tensor("absent").error().code(), ErrorCode::kNotFound);
}

TEST(Gguf, OpensAFileAndKeepsItsViewsValid) {
  const std::string path = ::testing::TempDir() + "/kvant_gguf_test.gguf";
  const std::vector<std::byte> file = small_model().build();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  Result<Gguf> opened = Gguf::open(path);
  ASSERT_TRUE(opened) << opened.error().message();
  const Gguf moved = std::move(opened).value();
  EXPECT_EQ(moved.string("general.architecture").value(), "llama");
  EXPECT_EQ(moved.tensors()[0].name, "token_embd.weight");
  EXPECT_EQ(Gguf::open(path + ".absent").error().code(), ErrorCode::kNotFound);
}

TEST(Gguf, RejectsOtherFilesAndVersions) {
  std::vector<std::byte> file = small_model().build();
  file[0] = std::byte{'X'};
  EXPECT_TRUE(contains(failure(file), "expected a GGUF file"));
  GgufBuilder builder = small_model();
  builder.version = 1;
  EXPECT_TRUE(contains(failure(builder.build(), ErrorCode::kUnsupported), "version 1"));
  builder.version = 0x03000000;
  EXPECT_TRUE(contains(failure(builder.build(), ErrorCode::kUnsupported), "big-endian"));
}

TEST(Gguf, RejectsHostileCountsBeforeAllocating) {
  for (const size_t at : {8u, 16u}) {  // tensor count, metadata count
    std::vector<std::byte> file = small_model().build();
    std::fill_n(file.begin() + static_cast<std::ptrdiff_t>(at), 7, std::byte{0xff});
    EXPECT_TRUE(contains(failure(file), "the header claims")) << at;
  }
  GgufBuilder array;
  array.array<uint32_t>("numbers", GgufValueType::kU32, {1, 2, 3});
  std::vector<std::byte> file = array.build();
  const size_t count_at = 24 + 8 + 7 + 4 + 4;
  file[count_at + 6] = std::byte{1};
  EXPECT_TRUE(contains(failure(file), "claims 281474976710659 items"));
  GgufBuilder text;
  text.string("text", "abc");
  file = text.build();
  file[24 + 8 + 4 + 4 + 7] = std::byte{0x80};
  EXPECT_TRUE(contains(failure(file), "bytes, but"));
}

TEST(Gguf, RejectsInconsistentEntries) {
  GgufBuilder twice;
  twice.u32("key", 1).u32("key", 2);
  EXPECT_TRUE(contains(failure(twice.build()), "\"key\" appears twice"));

  GgufBuilder nested;
  nested.array<uint32_t>("deep", GgufValueType::kArray, {4, 0, 0});
  EXPECT_TRUE(contains(failure(nested.build(), ErrorCode::kUnsupported), "array of arrays"));

  GgufBuilder unknown;
  unknown.scalar("key", static_cast<GgufValueType>(13), uint32_t{0});
  EXPECT_TRUE(contains(failure(unknown.build()), "unknown type 13"));

  for (const uint32_t alignment : {0u, 4u, 24u}) {
    GgufBuilder misaligned;
    misaligned.u32("general.alignment", alignment);
    EXPECT_TRUE(contains(failure(misaligned.build()), "power of two")) << alignment;
  }

  const std::vector<std::byte> weights = plain_weights(WeightType::kF32, {1, 2});
  GgufBuilder same_name;
  same_name.tensor("t", WeightType::kF32, {2}, weights).tensor("t", WeightType::kF32, {2}, weights);
  EXPECT_TRUE(contains(failure(same_name.build()), "\"t\" appears twice"));

  GgufBuilder iq4;
  iq4.tensor("t", static_cast<WeightType>(20), {2}, weights);
  EXPECT_TRUE(contains(failure(iq4.build(), ErrorCode::kUnsupported), "IQ4_NL (20)"));

  GgufBuilder ragged;
  ragged.tensor("t", WeightType::kQ4_0, {33}, weights);
  EXPECT_TRUE(contains(failure(ragged.build()), "not a multiple of the 32"));

  for (const std::vector<int64_t>& dims : std::vector<std::vector<int64_t>>{
           {0}, {-1}, {int64_t{1} << 32, int64_t{1} << 32}, {int64_t{1} << 62}}) {
    GgufBuilder huge;
    huge.tensor("t", WeightType::kF32, dims, weights);
    EXPECT_TRUE(contains(failure(huge.build()), "impossible size"));
  }
  GgufBuilder five;
  five.tensor("t", WeightType::kF32, {1, 1, 1, 1, 1}, weights);
  EXPECT_TRUE(contains(failure(five.build()), "5 dimensions"));

  GgufBuilder beyond;
  beyond.tensor("t", WeightType::kF32, {1000}, weights);
  EXPECT_TRUE(contains(failure(beyond.build()), "needs 4000 bytes"));

  GgufBuilder control;
  control.u32("bad\nkey", 1);
  EXPECT_TRUE(contains(failure(control.build()), "control character"));
}

TEST(Gguf, HonoursAlignment) {
  GgufBuilder builder;
  builder.alignment = 64;
  builder.u32("general.alignment", 64)
      .tensor("a", WeightType::kF32, {1}, plain_weights(WeightType::kF32, {1}))
      .tensor("b", WeightType::kF32, {1}, plain_weights(WeightType::kF32, {2}));
  const std::vector<std::byte> file = builder.build();
  const Result<Gguf> gguf = Gguf::parse(file, "test");
  ASSERT_TRUE(gguf) << gguf.error().message();
  EXPECT_EQ(gguf->tensors()[1].bytes.data() - gguf->tensors()[0].bytes.data(), 64);
  EXPECT_EQ(gguf->tensors()[1].bytes[3], std::byte{0x40});

  GgufBuilder misplaced;  // offsets are multiples of 8, the file asks for 64
  misplaced.alignment = 8;
  misplaced.u32("general.alignment", 64)
      .tensor("a", WeightType::kF32, {1}, plain_weights(WeightType::kF32, {1}))
      .tensor("b", WeightType::kF32, {1}, plain_weights(WeightType::kF32, {2}));
  EXPECT_TRUE(contains(failure(misplaced.build()), "multiple of the alignment 64"));
}

// Every getter on every key, and every byte of every tensor: nothing may fault, whatever it
// answers.
void read_everything(const Gguf& gguf) {
  for (const std::string_view key : gguf.keys()) {
    (void)gguf.i64(key);
    (void)gguf.f32(key);
    (void)gguf.boolean(key);
    (void)gguf.string(key);
    (void)gguf.u32_array(key);
    (void)gguf.f32_array(key);
    (void)gguf.boolean_array(key);
    (void)gguf.string_array(key);
    (void)gguf.u32_per_layer(key, 2);
  }
  for (const GgufTensor& tensor : gguf.tensors()) {
    std::vector<float> row(static_cast<size_t>(tensor.num_elements()));
    formats::dequantize_row(tensor.type, tensor.bytes.data(), tensor.num_elements(), row.data());
  }
}

TEST(Gguf, EveryTruncationIsAnError) {
  const std::vector<std::byte> file = small_model().build();
  for (size_t size = 0; size < file.size(); ++size) {
    const std::vector<std::byte> part(file.begin(),
                                      file.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_NE(failure(part), "") << size;
  }
}

TEST(Gguf, SurvivesFlippedBits) {
  const std::vector<std::byte> file = small_model().build();
  int accepted = 0;
  for (size_t bit = 0; bit < 8 * file.size(); ++bit) {
    std::vector<std::byte> damaged = file;
    damaged[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    const Result<Gguf> gguf = Gguf::parse(damaged, "test");
    if (!gguf) continue;
    ++accepted;
    read_everything(*gguf);
  }
  EXPECT_GT(accepted, 0);  // flips in the data are not seen here
  std::mt19937 random(7);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::byte> damaged = file;
    for (int i = 0; i < 4; ++i) damaged[random() % damaged.size()] = std::byte(random() >> 24);
    const Result<Gguf> gguf = Gguf::parse(damaged, "test");
    if (gguf) read_everything(*gguf);
  }
}

}  // namespace
}  // namespace kvant::model
