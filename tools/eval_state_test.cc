#include "tools/eval_state.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

namespace kvant::tools {
namespace {

constexpr int64_t kScored = 3;

class EvalStateFile : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = (std::filesystem::temp_directory_path() / "kvant_eval_state_test").string();
    std::filesystem::remove(path_);
    identity_.facts = {{"ctx", 8}, {"kv", {"bf16", "4bit"}}};
    identity_.num_formats = 2;
    identity_.scored_per_chunk = kScored;
    identity_.num_chunks = 3;
  }
  void TearDown() override { std::filesystem::remove(path_); }

  static model::TokenScores scores(double value) {
    // Values without a short decimal form: they must come back to the bit.
    return {{value / 3, value / 7, value * 1e-9},
            {-value / 3, 0, value},
            {static_cast<float>(value) / 3, 1e-20f, 0},
            {1, 0, 1}};
  }
  static std::vector<model::TokenScores> chunk(double value) {
    return {scores(value), scores(value + 1)};
  }
  std::string read() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const std::string& text) const { std::ofstream(path_, std::ios::binary) << text; }
  void write_two_chunks() const {
    auto state = EvalState::open(path_, identity_);
    ASSERT_TRUE(state) << state.error().message();
    ASSERT_TRUE((*state)->add_chunk(0, chunk(1), std::vector{16.0, 4.7}));
    ASSERT_TRUE((*state)->add_chunk(1, chunk(2), std::vector{16.0, 4.6}));
    ASSERT_TRUE((*state)->add_layer(1, {5, 1.0 / 3, -0.25}));
  }
  Error error() const {
    const auto state = EvalState::open(path_, identity_);
    EXPECT_FALSE(state);
    return state ? Error(ErrorCode::kInternal, "none") : state.error();
  }

  std::string path_;
  EvalIdentity identity_;
};

TEST_F(EvalStateFile, ComesBackToTheBit) {
  write_two_chunks();
  const auto state = EvalState::open(path_, identity_);
  ASSERT_TRUE(state) << state.error().message();
  const EvalStateData& data = (*state)->data();
  EXPECT_EQ(data.chunks, 2);
  EXPECT_EQ(data.bits_per_value, (std::vector{16.0, 4.6}));
  for (size_t i = 0; i < 2; ++i) {
    model::TokenScores want = chunk(1)[i];
    append(want, chunk(2)[i]);
    EXPECT_EQ(data.scores[i].nll, want.nll);
    EXPECT_EQ(data.scores[i].delta_nll, want.delta_nll);
    EXPECT_EQ(data.scores[i].kl, want.kl);
    EXPECT_EQ(data.scores[i].same_top, want.same_top);
  }
  ASSERT_TRUE((*state)->layer(1, 5));
  EXPECT_EQ((*state)->layer(1, 5)->kl_mean, 1.0 / 3);
  EXPECT_FALSE((*state)->layer(0, 5));
  EXPECT_FALSE((*state)->layer(1, 4));
}

TEST_F(EvalStateFile, DropsALineThatWasCutOff) {
  write_two_chunks();
  const std::string whole = read();
  const size_t last = whole.rfind('\n', whole.size() - 2);  // before the layer
  const size_t second = whole.rfind('\n', last - 1);
  for (const size_t size : {whole.size() - 1, last + 1, last, second + 10}) {
    write(whole.substr(0, size));
    {
      const auto state = EvalState::open(path_, identity_);
      ASSERT_TRUE(state) << state.error().message();
      EXPECT_EQ((*state)->data().chunks, size > last ? 2 : 1) << size;
      ASSERT_TRUE((*state)->add_layer(0, {1, 2, 3}));
    }
    const auto again = EvalState::open(path_, identity_);
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_TRUE((*again)->layer(0, 1)) << size;
  }
  write("{\"kvant_eval");
  ASSERT_TRUE(EvalState::open(path_, identity_));
  EXPECT_TRUE(read().ends_with("}\n"));
}

TEST_F(EvalStateFile, RefusesAnotherEvaluation) {
  write_two_chunks();
  const std::string before = read();
  identity_.facts["ctx"] = 16;
  EXPECT_EQ(error().code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(error().message().find("its ctx is 8, now it is 16"), std::string::npos)
      << error().message();
  EXPECT_EQ(read(), before);
}

TEST_F(EvalStateFile, RefusesDamage) {
  write_two_chunks();
  const std::string whole = read();
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string text = whole;
    const size_t at = text.find(from);
    EXPECT_NE(at, text.npos) << from;
    return text.replace(at, from.size(), to);
  };
  for (const std::string& text :
       {std::string("no state"), std::string("{}\n"), std::string("[1]\n"),
        replaced("\"chunk\":1", "\"chunk\":2"), replaced("\"101\"", "\"10\""),
        replaced("\"101\"", "\"1x1\""), replaced("[16.0,4.7]", "[16.0]"),
        replaced("\"nll\":[", "\"nll\":[1,"), replaced("\"nll\":[", "\"nll\":[\"1\"],\"x\":["),
        replaced("\"nll\":[", "\"nll\":[1e999],\"x\":["), replaced("\"layer\":5", "\"layer\":-5"),
        replaced("\"format\":1", "\"format\":2"), replaced("{\"layer\"", "x{\"layer\"")}) {
    write(text);
    EXPECT_EQ(error().code(), ErrorCode::kCorruptData) << text.substr(0, 200);
  }
  write(replaced("\"kvant_eval_state\":1", "\"kvant_eval_state\":2"));
  EXPECT_EQ(error().code(), ErrorCode::kUnsupported);
  identity_.num_chunks = 1;
  write(whole);
  EXPECT_EQ(error().code(), ErrorCode::kCorruptData);
}

TEST_F(EvalStateFile, SaysWhatCannotBeWritten) {
  path_ = "/dev/full";
  EXPECT_EQ(error().code(), ErrorCode::kIoError);
  path_ = "/nonexistent/state";
  EXPECT_EQ(error().code(), ErrorCode::kIoError);
  path_ = "";
}

}  // namespace
}  // namespace kvant::tools
