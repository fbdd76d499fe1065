#include "kvant/backend/shared_prefixes.h"

#include <gtest/gtest.h>

#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "kvant/attention/problem.h"
#include "kvant/backend/testing/attention_rig.h"

namespace kvant::backend::cpu {
namespace {

using cache::PageEntry;
using testing::AttentionRig;
using testing::Chunk;
using testing::RigOptions;

// ---- grouping ----

constexpr int kPageTokens = 128;
constexpr int kPages = attention::kSplitTokens / kPageTokens;  // of a split

// Page tables that a test writes: split s of a sequence holds pages named by one letter.
class Batch {
 public:
  void add(const std::string& splits, int num_new_tokens = 1) {
    std::vector<PageEntry> pages;
    for (size_t n = 0; n < splits.size(); ++n) {
      for (int p = 0; p < kPages; ++p) {
        const auto slot = static_cast<uint32_t>((n * 256 + static_cast<uint8_t>(splits[n])) * 8);
        pages.push_back(PageEntry::make(cache::kKindStored, slot + static_cast<uint32_t>(p)));
      }
    }
    tables_.push_back(std::move(pages));
    cache::SequenceView seq;
    seq.num_new_tokens = num_new_tokens;
    seq.first_position = static_cast<int64_t>(splits.size()) * attention::kSplitTokens;
    sequences_.push_back(seq);
  }
  cache::SequenceView& sequence(size_t s) { return sequences_[s]; }
  PageEntry& page(size_t s, size_t p) { return tables_[s][p]; }

  // "level:[first,end) members" for each run.
  std::string find(int window = 0, const ShareLimits& limits = {4, 128, 1}) {
    for (size_t s = 0; s < sequences_.size(); ++s) sequences_[s].stored = tables_[s].data();
    cache::GroupView view;
    view.page_tokens = kPageTokens;
    view.num_kv_heads = 2;
    view.window = window;
    view.sequences = sequences_;
    find_shared_prefixes(view, limits, found_);
    std::ostringstream text;
    for (const SharedRun& run : found_.runs) {
      if (&run != found_.runs.data()) text << "; ";
      text << run.level << ":[" << run.first_split << "," << run.end_split << ")";
      for (int i = 0; i < run.num_members; ++i) text << " " << found_.members[run.first_member + i];
    }
    return text.str();
  }
  const SharedPrefixes& found() const { return found_; }

 private:
  std::vector<std::vector<PageEntry>> tables_;
  std::vector<cache::SequenceView> sequences_;
  SharedPrefixes found_;
};

TEST(SharedPrefixes, NothingIsSharedByOneSequenceOrByStrangers) {
  Batch batch;
  EXPECT_EQ(batch.find(), "");
  batch.add("abc");
  EXPECT_EQ(batch.find(), "");
  batch.add("xbc");  // the same pages behind others have other contents
  batch.add("");
  EXPECT_EQ(batch.find(), "");
  EXPECT_EQ(batch.found().end_split, (std::vector<int64_t>{0, 0, 0}));
}

TEST(SharedPrefixes, GroupsAreRefinedSplitBySplit) {
  Batch batch;
  batch.add("abcde");
  batch.add("abx");
  batch.add("zzz");
  batch.add("abcd");
  batch.add("aby");
  batch.add("abx");
  batch.add("zz");
  EXPECT_EQ(batch.find(), "0:[0,2) 0 1 3 4 5; 0:[0,2) 2 6; 1:[2,4) 0 3; 1:[2,3) 1 5");
  EXPECT_EQ(batch.found().end_split, (std::vector<int64_t>{4, 3, 2, 4, 2, 3, 2}));
  // Rows: G = 4, one new token, 2 KV heads.
  EXPECT_EQ(batch.found().num_rows, 7 * 8);
  EXPECT_EQ(batch.found().first_row, (std::vector<int64_t>{0, 8, 40, 16, 24, 32, 48}));
}

TEST(SharedPrefixes, EveryPageOfASplitCounts) {
  Batch batch;
  batch.add("ab");
  batch.add("ab");
  for (size_t p = 0; p < kPages; ++p) {
    const PageEntry kept = batch.page(1, kPages + p);
    batch.page(1, kPages + p) = PageEntry::make(cache::kKindBf16, kept.slot);
    EXPECT_EQ(batch.find(), "0:[0,1) 0 1") << p;
    batch.page(1, kPages + p) = kept;
  }
  EXPECT_EQ(batch.find(), "0:[0,2) 0 1");
}

TEST(SharedPrefixes, OnlySplitsThatAllNewTokensReadAsStored) {
  Batch batch;
  batch.add("abc");
  batch.add("abc");
  batch.sequence(1).recent_pages = 1;  // its first token reads the last page in BF16
  EXPECT_EQ(batch.find(), "0:[0,2) 0 1");
  batch.sequence(1).first_position += kPageTokens;
  EXPECT_EQ(batch.find(), "0:[0,3) 0 1");
  batch.sequence(0).first_position -= 1;
  EXPECT_EQ(batch.find(), "0:[0,2) 0 1");
  EXPECT_EQ(batch.find(100), "") << "pages that leave a window";
}

TEST(SharedPrefixes, RunsAreCutByRowsAndThreads) {
  Batch batch;
  for (int s = 0; s < 5; ++s) batch.add("a", 10);
  EXPECT_EQ(batch.find(0, {4, 128, 1}), "0:[0,1) 0 1 2; 0:[0,1) 3 4");
  EXPECT_EQ(batch.find(0, {4, 80, 1}), "0:[0,1) 0 1; 0:[0,1) 2 3; 0:[0,1) 4");
  EXPECT_EQ(batch.find(0, {4, 79, 1}), "") << "more than half a run of one sequence";
  EXPECT_EQ(batch.find(0, {1, 128, 1}), "0:[0,1) 0 1 2 3 4");
  EXPECT_EQ(batch.find(0, {1, 128, 2}), "0:[0,1) 0 1 2; 0:[0,1) 3 4");
  EXPECT_EQ(batch.find(0, {1, 128, 3}), "") << "fewer than two sequences for each thread";
}

// ---- the same bits as without sharing ----

// Sequences 0, 2 and 3 part after 1,300 tokens, 4 and 5 leave 0 after 2,300; 1 is a stranger.
void grow(AttentionRig& rig) {
  rig.extend(0, 1300, 1300);
  ASSERT_EQ(rig.fork(0), 2);
  ASSERT_EQ(rig.fork(0), 3);
  rig.diverge(2, 12);
  rig.diverge(3, 13);
  rig.extend(0, 2300, 1000);
  ASSERT_EQ(rig.fork(0), 4);
  ASSERT_EQ(rig.fork(0), 5);
  rig.diverge(4, 14);
  rig.diverge(5, 15);
  rig.extend(3, 1700, 400);
  rig.extend(1, 1100, 1100);
}

void expect_bits_without_sharing(RigOptions options, size_t num_runs) {
  options.num_layers = 1;
  options.num_sequences = 2;
  options.max_sequences = 6;
  options.max_tokens = 16384;
  options.head_dim = 48;
  options.page_tokens = 64;
  options.params.rope.rotary_dim = 48;
  options.level = detect_cpu_level();
  options.compare_with_reference = false;
  SCOPED_TRACE(std::string(options.kv) + ", " + std::to_string(options.num_threads) +
               " threads, G " + std::to_string(options.group));
  AttentionRig together(options), alone(options);
  grow(together);
  grow(alone);
  if (::testing::Test::HasFatalFailure()) return;
  const Chunk batch[] = {{5, 1}, {0, 2}, {1, 1}, {2, 2}, {3, 3}, {4, 1}};
  for (int round = 0; round < 2; ++round) {
    together.step(batch);
    EXPECT_EQ(together.workspace().shared.runs.size(), num_runs);
    for (const Chunk& chunk : batch) {
      alone.step({chunk});
      EXPECT_TRUE(alone.workspace().shared.runs.empty());
    }
  }
  if (::testing::Test::HasFatalFailure()) return;
  for (int s = 0; s < 6; ++s) {
    const std::vector<float>&a = together.outputs(s, 0), &b = alone.outputs(s, 0);
    ASSERT_EQ(a.size(), b.size());
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << "sequence " << s;
  }
}

TEST(CpuAttention, SharedPagesGiveTheSameBits) {
  for (const char* kv : {"4bit", "nvfp4", "fp8", "bf16", "k=int8+mean,v=int8+sink",
                         "k=nvfp4+rot+mean,v=nvfp4+rot+bias", "k=fp8:head+bias+prerope,v=int4+bias",
                         "k=int4:channel,v=nvfp4+recent200"}) {
    for (int threads : {1, 3}) {
      RigOptions options;
      options.kv = kv;
      options.num_kv_heads = 3;
      options.group = 2;
      options.num_threads = threads;
      expect_bits_without_sharing(options, 2);  // splits 0 and 1 of five, 2 and 3 of three
    }
  }
}

TEST(CpuAttention, SharedPagesAreCutIntoRunsForRowsAndThreads) {
  RigOptions options;
  options.kv = "nvfp4";
  options.num_kv_heads = 1;
  options.group = 4;
  options.num_threads = 2;
  expect_bits_without_sharing(options, 2);  // of five sequences, two runs; three stay apart
  options.group = 16;
  options.num_threads = 1;
  expect_bits_without_sharing(options,
                              3);  // 144 rows of five sequences are two runs, 64 of three are one
}

TEST(CpuAttention, WindowsShareNothing) {
  RigOptions options;
  options.kv = "nvfp4";
  options.num_kv_heads = 2;
  options.window = 900;
  expect_bits_without_sharing(options, 0);
}

}  // namespace
}  // namespace kvant::backend::cpu
