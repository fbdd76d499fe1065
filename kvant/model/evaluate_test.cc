#include "kvant/model/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

namespace kvant::model {
namespace {

constexpr int32_t kVocab = 7;

// Predicts from the last two tokens and the position, so that a wrong row, order or BOS shows.
class FakeSource final : public LogitsSource {
 public:
  explicit FakeSource(float error = 0) : error_(error) {}
  Status restart() override {
    seen_.clear();
    ++restarts;
    return {};
  }
  Status extend(std::span<const int32_t> tokens, int64_t first_logits, int64_t num_logits,
                std::span<float> logits) override {
    EXPECT_EQ(logits.size(), static_cast<size_t>(num_logits * kVocab));
    for (size_t i = 0; i < tokens.size(); ++i) {
      seen_.push_back(tokens[i]);
      const int64_t row = static_cast<int64_t>(i) - first_logits;
      if (row < 0 || row >= num_logits) continue;
      for (int32_t v = 0; v < kVocab; ++v) {
        logits[static_cast<size_t>(row * kVocab + v)] =
            predict(seen_, v) + (v == 2 ? error_ : 0.0f);
      }
    }
    longest = std::max(longest, seen_.size());
    return {};
  }
  static float predict(const std::vector<int32_t>& seen, int32_t v) {
    const auto n = static_cast<float>(seen.size());
    return std::sin(static_cast<float>(v) * 1.7f + static_cast<float>(seen.back()) + 0.3f * n) +
           static_cast<float>(seen.front() == 6 ? v : 0);
  }
  int restarts = 0;
  size_t longest = 0;

 private:
  float error_;
  std::vector<int32_t> seen_;
};

std::vector<int32_t> text(size_t n) {
  std::vector<int32_t> tokens(n);
  for (size_t i = 0; i < n; ++i) tokens[i] = static_cast<int32_t>((i * i + 3 * i) % 6);
  return tokens;
}

// The protocol written out.
double expected_nll(const std::vector<int32_t>& tokens, int64_t ctx, int32_t bos) {
  double sum = 0;
  int64_t count = 0;
  for (size_t chunk = 0; chunk + static_cast<size_t>(ctx) <= tokens.size();
       chunk += static_cast<size_t>(ctx)) {
    std::vector<int32_t> seen;
    for (int64_t i = 0; i < ctx - 1; ++i) {
      seen.push_back(i == 0 && bos >= 0 ? bos : tokens[chunk + static_cast<size_t>(i)]);
      if (i < ctx / 2) continue;
      double total = 0;
      for (int32_t v = 0; v < kVocab; ++v)
        total += std::exp(static_cast<double>(FakeSource::predict(seen, v)));
      sum += std::log(total) - static_cast<double>(FakeSource::predict(
                                   seen, tokens[chunk + static_cast<size_t>(i) + 1]));
      ++count;
    }
  }
  return sum / static_cast<double>(count);
}

class Evaluate : public ::testing::TestWithParam<int64_t> {
 protected:
  ThreadPool pool_{2};
  EvalRequest request(std::span<const int32_t> tokens, int64_t ctx, int32_t bos,
                      std::span<LogitsSource* const> sources) {
    EvalRequest request;
    request.tokens = tokens;
    request.ctx = ctx;
    request.bos = bos;
    request.vocab = kVocab;
    request.sources = sources;
    request.pool = &pool_;
    return request;
  }
};

TEST_P(Evaluate, ScoresTheSecondHalfOfEachChunk) {
  const int64_t ctx = GetParam();  // odd, small, and longer than one step of rows
  const std::vector<int32_t> tokens = text(static_cast<size_t>(2 * ctx + ctx / 2));
  for (const int32_t bos : {-1, 6}) {
    FakeSource source;
    std::vector<LogitsSource*> sources = {&source};
    const auto whole = whole_chunks(tokens, ctx, 0);
    ASSERT_TRUE(whole);
    EXPECT_EQ(whole->size(), static_cast<size_t>(2 * ctx));
    const auto result = evaluate(request(*whole, ctx, bos, sources));
    ASSERT_TRUE(result) << result.error().message();
    const EvalSummary& summary = result->summaries[0];
    EXPECT_EQ(summary.num_tokens, 2 * (ctx - 1 - ctx / 2));
    EXPECT_NEAR(summary.nll, expected_nll(tokens, ctx, bos), 1e-6);
    EXPECT_EQ(summary.kl_mean, 0);
    EXPECT_EQ(summary.top1, 1);
    EXPECT_EQ(source.restarts, 2);
    EXPECT_EQ(source.longest, static_cast<size_t>(ctx));  // the last token is in the cache as well
  }
}
INSTANTIATE_TEST_SUITE_P(Contexts, Evaluate, ::testing::Values(4, 5, 64, 1101));

TEST_F(Evaluate, ComparesWithTheFirstSource) {
  const std::vector<int32_t> tokens = text(400);
  FakeSource exact;
  FakeSource close(0.05f);
  FakeSource far(0.5f);
  std::vector<LogitsSource*> sources = {&exact, &close, &exact, &far};
  const auto result = evaluate(request(tokens, 100, -1, sources));
  ASSERT_TRUE(result);
  EXPECT_GT(result->summaries[1].kl_mean, 1e-5);
  EXPECT_LT(result->summaries[1].kl_mean, result->summaries[3].kl_mean);
  EXPECT_LT(result->summaries[3].top1, 1);
  EXPECT_NEAR(result->summaries[3].delta_nll, result->summaries[3].nll - result->summaries[0].nll,
              1e-12);
}

TEST_F(Evaluate, ASavedBaseGivesTheSameComparison) {
  const std::vector<int32_t> tokens = text(700);
  const std::string path =
      (std::filesystem::temp_directory_path() / "kvant_evaluate_base").string();
  const LogitsFileHeader header = {.ctx = 100, .vocab = kVocab, .chunks = 7};
  FakeSource exact;
  FakeSource far(0.5f);
  {
    std::vector<LogitsSource*> sources = {&exact};
    auto writer = LogitsFileWriter::create(path, header, tokens);
    ASSERT_TRUE(writer);
    EvalRequest saving = request(tokens, 100, -1, sources);
    saving.save = writer->get();
    ASSERT_TRUE(evaluate(saving));
    ASSERT_TRUE((*writer)->finish());
  }
  std::vector<LogitsSource*> both = {&exact, &far};
  const auto direct = evaluate(request(tokens, 100, -1, both));
  const auto base = LogitsFile::open(path);
  ASSERT_TRUE(base) << base.error().message();
  EvalRequest from_file = request(base->tokens(), 100, -1, both);
  from_file.base = &*base;
  const auto compared = evaluate(from_file);
  ASSERT_TRUE(direct && compared);
  EXPECT_NEAR(compared->summaries[0].kl_mean, 0, 5e-6);
  EXPECT_NEAR(compared->summaries[0].delta_nll, 0, 1e-4);
  EXPECT_NEAR(compared->summaries[1].kl_mean, direct->summaries[1].kl_mean, 1e-5);
  EXPECT_NEAR(compared->summaries[1].kl_p99, direct->summaries[1].kl_p99, 1e-4);
  EXPECT_NEAR(compared->summaries[1].delta_nll, direct->summaries[1].delta_nll, 1e-4);
  EXPECT_EQ(compared->summaries[1].top1, direct->summaries[1].top1);
  std::filesystem::remove(path);
}

TEST_F(Evaluate, ReportsProgressAndStopsWhenAsked) {
  const std::vector<int32_t> tokens = text(400);
  FakeSource source;
  std::vector<LogitsSource*> sources = {&source};
  EvalRequest stopping = request(tokens, 100, -1, sources);
  int calls = 0;
  stopping.on_progress = [&](const EvalProgress& progress) -> Status {
    EXPECT_EQ(progress.tokens_total, 400);
    if (++calls < 4) return {};
    EXPECT_EQ(progress.tokens_done, 200);
    EXPECT_GT(progress.first_ppl, 1);
    return Error(ErrorCode::kCancelled, "stop");
  };
  const auto result = evaluate(stopping);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), ErrorCode::kCancelled);
}

TEST_F(Evaluate, GoesOnAfterFinishedChunks) {
  const std::vector<int32_t> tokens = text(400);
  FakeSource exact;
  FakeSource far(0.5f);
  std::vector<LogitsSource*> sources = {&exact, &far};
  const auto whole = evaluate(request(tokens, 100, -1, sources));
  ASSERT_TRUE(whole);

  std::vector<TokenScores> done(2);
  EvalRequest interrupted = request(tokens, 100, -1, sources);
  interrupted.on_chunk = [&](int64_t chunk, std::span<const TokenScores> scores) -> Status {
    for (size_t i = 0; i < done.size(); ++i) append(done[i], scores[i]);
    return chunk < 2 ? Status() : Status(Error(ErrorCode::kCancelled, "stop"));
  };
  ASSERT_FALSE(evaluate(interrupted));
  ASSERT_EQ(done[0].nll.size(), 3u * 49);

  EvalRequest rest = request(tokens, 100, -1, sources);
  rest.done = done;
  int restarts = exact.restarts;
  int64_t first_progress = -1;
  rest.on_progress = [&](const EvalProgress& progress) -> Status {
    if (first_progress < 0) first_progress = progress.tokens_done;
    EXPECT_GT(progress.first_ppl, 1);
    return {};
  };
  const auto resumed = evaluate(rest);
  ASSERT_TRUE(resumed);
  EXPECT_EQ(exact.restarts - restarts, 1);  // only the fourth chunk
  EXPECT_EQ(first_progress, 3 * 100 * 2 + 50);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(resumed->scores[i].nll, whole->scores[i].nll);
    EXPECT_EQ(resumed->scores[i].kl, whole->scores[i].kl);
    EXPECT_EQ(resumed->scores[i].same_top, whole->scores[i].same_top);
    EXPECT_EQ(resumed->summaries[i].delta_nll_high, whole->summaries[i].delta_nll_high);
  }

  EvalRequest nothing_left = request(tokens, 100, -1, sources);
  nothing_left.done = whole->scores;
  restarts = exact.restarts;
  const auto again = evaluate(nothing_left);
  ASSERT_TRUE(again);
  EXPECT_EQ(exact.restarts, restarts);
  EXPECT_EQ(again->summaries[1].kl_mean, whole->summaries[1].kl_mean);
}

TEST_F(Evaluate, WrongInputIsAnError) {
  FakeSource source;
  std::vector<LogitsSource*> sources = {&source};
  const std::vector<int32_t> outside = {0, 1, 2, 7};
  const auto result = evaluate(request(outside, 4, -1, sources));
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), ErrorCode::kInvalidArgument);
  const auto short_text = whole_chunks(outside, 5, 0);
  ASSERT_FALSE(short_text);
  EXPECT_EQ(short_text.error().code(), ErrorCode::kInvalidArgument);
  EXPECT_EQ(whole_chunks(text(100), 10, 3)->size(), 30u);
}

}  // namespace
}  // namespace kvant::model
