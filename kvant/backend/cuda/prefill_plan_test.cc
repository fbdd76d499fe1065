// The plan alone, on the CPU: every query reads every key that it may read exactly once, from the
// right kind of page, whatever the workspace.
#include "kvant/backend/cuda/prefill/prefill_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

namespace kvant::backend::cuda {
namespace {

using cache::GroupView;
using cache::PageEntry;
using cache::PageKind;
using cache::SequenceView;

struct Step {
  ImageType type = ImageType::kF16;
  int head_dim = 64;
  int page_tokens = 64;
  int group = 4;
  int num_kv_heads = 3;
  int window = 0;
  int sink_tokens = 0;
  int recent_pages = 0;
  int64_t images = 1000;  // that fit
  std::vector<std::pair<int, int>> sequences = {
      {200, 37}, {0, 100}, {128, 64}, {77, 1}, {333, 130}};
};

// A view whose slots say which page of which sequence they are: slot = 1000 * sequence + page.
class PlannedStep {
 public:
  explicit PlannedStep(const Step& step) : step_(step) {
    int32_t row = 0;
    units_ = {formats::unit_sections({}, {}, step.page_tokens, step.head_dim)};
    formats_ = {formats::SideFormat{}};
    for (PageKind& kind : kinds_) {
      kind.layer_offset = offsets_;
      kind.units = units_;
      kind.k_format = kind.v_format = formats_;
    }
    tables_.resize(step.sequences.size());
    for (size_t s = 0; s < step.sequences.size(); ++s) {
      const auto [history, chunk] = step.sequences[s];
      SequenceView seq;
      seq.first_row = row;
      seq.num_new_tokens = chunk;
      seq.first_position = history;
      seq.recent_pages = step.recent_pages;
      row += chunk;
      const int pages = (history + chunk + step.page_tokens - 1) / step.page_tokens;
      for (int p = 0; p < pages; ++p) {
        const auto slot = static_cast<uint32_t>(1000 * s + p);
        tables_[s].stored.push_back(PageEntry::make(cache::kKindStored, slot));
        tables_[s].bf16.push_back(PageEntry::make(cache::kKindBf16, slot));
      }
      seq.stored = tables_[s].stored.data();
      seq.bf16 = tables_[s].bf16.data();
      sequences_.push_back(seq);
    }
    view_.page_tokens = step.page_tokens;
    view_.num_kv_heads = step.num_kv_heads;
    view_.head_dim = step.head_dim;
    view_.window = step.window;
    view_.kinds = kinds_;
    view_.sequences = sequences_;
  }

  Status make() {
    PrefillPlanArgs args;
    args.view = &view_;
    args.num_query_heads = step_.group * step_.num_kv_heads;
    args.sink_tokens = step_.sink_tokens;
    args.images = step_.type;
    args.workspace_bytes =
        step_.images * 2 * image_bytes(step_.head_dim, step_.page_tokens, step_.type);
    return make_prefill_plan(args, plan_);
  }

  // Walks the plan as the kernel does and counts what every query reads.
  void check() {
    std::vector<std::vector<uint8_t>> reads;  // [row][key]: times
    for (const auto& [history, chunk] : step_.sequences) {
      for (int t = 0; t < chunk; ++t) {
        reads.emplace_back(static_cast<size_t>(history + chunk + step_.page_tokens));
      }
    }
    std::map<int, bool> finished;  // row of a tile -> no batch goes on
    for (const PrefillBatch& batch : plan_.batches) {
      EXPECT_LE(batch.images_per_head * plan_.heads_per_pass, step_.images);
      images_.clear();
      for (size_t j = batch.first_job; j < batch.first_job + batch.num_jobs; ++j) {
        images_[plan_.jobs[j].image] = &plan_.jobs[j];
      }
      EXPECT_EQ(static_cast<int64_t>(images_.size()), batch.images_per_head);
      for (size_t t = batch.first_tile; t < batch.first_tile + batch.num_tiles; ++t) {
        const QueryTile& tile = plan_.tiles[t];
        EXPECT_EQ(finished.count(tile.row) != 0, tile.resumes != 0);
        if (finished.count(tile.row) != 0) {
          EXPECT_FALSE(finished[tile.row]);
        }
        finished[tile.row] = tile.continues == 0;
        check_tile(tile, reads);
      }
    }
    for (const auto& [row, done] : finished) EXPECT_TRUE(done) << "row " << row;
    for (const SequenceView& seq : sequences_) {
      for (int t = 0; t < seq.num_new_tokens; ++t) {
        const int64_t i = seq.first_position + t;
        for (int64_t j = 0; j <= i; ++j) {
          const int expected = may_read(i, j) ? 1 : 0;
          ASSERT_EQ(reads[static_cast<size_t>(seq.first_row + t)][static_cast<size_t>(j)], expected)
              << "query at " << i << ", key at " << j;
        }
      }
    }
  }

  // Every tile for every head once; every image for every head once, in a chunk that a unit's
  // number finds.
  void check_passes() {
    std::vector<int> heads_done(plan_.batches.size());
    for (const PrefillPass& pass : plan_.passes) {
      const PrefillBatch& batch = plan_.batches[pass.batch];
      EXPECT_EQ(pass.first_head, heads_done[pass.batch]);
      heads_done[pass.batch] += pass.num_heads;
      EXPECT_LE(pass.num_heads, plan_.heads_per_pass);
      std::map<std::pair<int, int>, int> items, images;
      for (size_t i = 0; i < pass.num_items; ++i) {
        const WorkItem item = plan_.items[pass.first_item + i];
        EXPECT_LT(static_cast<size_t>(item.tile), batch.num_tiles);
        EXPECT_LT(item.head, pass.num_heads);
        EXPECT_EQ((++items[{item.tile, item.head}]), 1);
      }
      EXPECT_EQ(items.size(), batch.num_tiles * static_cast<size_t>(pass.num_heads));
      int64_t units = 0;
      for (size_t c = 0; c < pass.num_chunks; ++c) {
        const ImageChunk chunk = plan_.chunks[pass.first_chunk + c];
        EXPECT_EQ(chunk.first_unit, units);
        units += 2 * int64_t{chunk.num_jobs} * chunk.num_heads;
        for (int j = chunk.first_job; j < chunk.first_job + chunk.num_jobs; ++j) {
          for (int h = chunk.first_head; h < chunk.first_head + chunk.num_heads; ++h) {
            EXPECT_LT(h, pass.num_heads);
            EXPECT_EQ((++images[{j, h}]), 1);
          }
        }
      }
      EXPECT_EQ(images.size(), batch.num_jobs * static_cast<size_t>(pass.num_heads));
    }
    for (size_t b = 0; b < heads_done.size(); ++b) {
      if (plan_.batches[b].num_tiles > 0) {
        EXPECT_EQ(heads_done[b], step_.num_kv_heads);
      }
    }
  }

  const PrefillPlan& plan() const { return plan_; }

 private:
  struct Tables {
    std::vector<PageEntry> stored;
    std::vector<PageEntry> bf16;
  };

  bool may_read(int64_t i, int64_t j) const {
    return j <= i && (step_.window == 0 || j > i - step_.window || j < step_.sink_tokens);
  }

  void check_tile(const QueryTile& tile, std::vector<std::vector<uint8_t>>& reads) {
    const int tile_tokens = key_tile_tokens(step_.head_dim, step_.type);
    const int u = std::min(step_.page_tokens, tile_tokens);
    const int slices_per_page = step_.page_tokens / u;
    const int slices_per_tile = tile_tokens / u;
    EXPECT_EQ(tile.num_key_tiles, (tile.num_slices + slices_per_tile - 1) / slices_per_tile);
    EXPECT_GT(tile.num_key_tiles, 0);
    EXPECT_LE(tile.num_tokens * step_.group, kTileRows);
    for (int i = 0; i < tile.num_key_tiles; ++i) {
      const bool whole = i >= tile.whole_begin && i < tile.whole_end;
      for (int n = 0; n < slices_per_tile; ++n) {
        const int slice = tile.num_slices - (i + 1) * slices_per_tile + n;
        if (slice < 0) {
          EXPECT_FALSE(whole);
          continue;
        }
        const int stored = slice - tile.num_sink;
        const bool bf16 = stored >= tile.num_stored;
        const int place = stored < 0 ? tile.sink_place + slice
                          : bf16     ? tile.bf16_place + stored - tile.num_stored
                                     : tile.stored_place + stored;
        const int first = stored < 0 ? slice
                          : bf16     ? tile.bf16_first + stored - tile.num_stored
                                     : tile.stored_first + stored;
        check_slice(tile, place / slices_per_page, first, u, bf16);
        for (int token = 0; token < tile.num_tokens; ++token) {
          for (int k = first * u; k < (first + 1) * u; ++k) {
            if (!reads_key(tile, token, k, bf16)) {
              if (whole) ADD_FAILURE() << "a key of a whole tile is masked";
              continue;
            }
            ++reads[static_cast<size_t>(tile.row + token)][static_cast<size_t>(k)];
          }
        }
      }
    }
  }

  // The image is that of the page, and of the kind.
  void check_slice(const QueryTile& tile, int image, int first, int u, bool bf16) {
    ASSERT_TRUE(images_.count(image) != 0);
    const ImageJob& job = *images_[image];
    EXPECT_EQ(job.page_number, first * u / step_.page_tokens);
    EXPECT_EQ(job.sequence, tile.sequence);
    EXPECT_EQ(job.kind, bf16 ? cache::kKindBf16 : cache::kKindStored);
    EXPECT_EQ(job.slot, 1000 * tile.sequence + job.page_number);
  }

  // The kernel's mask.
  bool reads_key(const QueryTile& tile, int token, int k, bool bf16) const {
    const int i = tile.position + token;
    const int near = (i / step_.page_tokens - tile.recent_pages) * step_.page_tokens;
    const bool in_kind = bf16 ? k >= near && k <= i : k < near;
    return in_kind && may_read(i, k);
  }

  const Step step_;
  GroupView view_;
  PageKind kinds_[3];
  std::vector<int64_t> offsets_ = {0};
  std::vector<formats::UnitSections> units_;
  std::vector<formats::SideFormat> formats_;
  std::vector<Tables> tables_;
  std::vector<SequenceView> sequences_;
  PrefillPlan plan_;
  std::map<int, const ImageJob*> images_;
};

TEST(PrefillPlan, EveryKeyOnce) {
  for (int page : {16, 32, 64, 128}) {
    for (int head_dim : {64, 256}) {
      for (int group : {1, 3, 4, 16}) {
        for (int window : {0, 1, 50, 100, 300}) {
          for (int sinks : {0, 4, 70}) {
            for (int recent : {0, 1, 3}) {
              Step step;
              step.page_tokens = page;
              step.head_dim = head_dim;
              step.group = group;
              step.window = window;
              step.sink_tokens = sinks;
              step.recent_pages = recent;
              PlannedStep planned(step);
              ASSERT_TRUE(planned.make().has_value());
              planned.check();
              planned.check_passes();
              if (HasFailure()) {
                FAIL() << "page " << page << " head_dim " << head_dim << " group " << group
                       << " window " << window << " sinks " << sinks << " recent " << recent;
              }
            }
          }
        }
      }
    }
  }
}

TEST(PrefillPlan, ImagesInE4m3) {
  static_assert(2 * image_bytes(128, 64, ImageType::kE4m3) == image_bytes(128, 64, ImageType::kF16),
                "twice as many tokens fit");
  for (int page : {16, 64}) {
    for (int64_t images : {1000, 40}) {
      Step step;
      step.type = ImageType::kE4m3;
      step.page_tokens = page;
      step.head_dim = 256;
      step.images = images;
      PlannedStep planned(step);
      ASSERT_TRUE(planned.make().has_value());
      planned.check();
      planned.check_passes();
    }
  }
}

TEST(PrefillPlan, SmallWorkspacesSplitHeadsSequencesAndPages) {
  for (int64_t images : {60, 30, 20, 11, 8, 6}) {
    for (int window : {0, 250}) {
      Step step;
      step.images = images;
      step.window = window;
      step.sink_tokens = 3;
      PlannedStep planned(step);
      const Status made = planned.make();
      ASSERT_TRUE(made.has_value()) << made.error().message();
      planned.check();
      planned.check_passes();
      if (images < 20) {
        EXPECT_GT(planned.plan().batches.size(), 1u);
      }
    }
  }
}

TEST(PrefillPlan, OneSequenceInRangesOfPages) {
  for (int64_t images : {100, 30, 12, 5}) {
    for (int heads : {1, 3, 8}) {
      Step step;
      step.num_kv_heads = heads;
      step.sequences = {{2000, 70}};
      step.images = images;
      PlannedStep planned(step);
      ASSERT_TRUE(planned.make().has_value());
      planned.check();
      planned.check_passes();
    }
  }
}

TEST(PrefillPlan, SplitKeepsTheDeviceBusy) {
  Step step;
  step.num_kv_heads = 8;
  step.head_dim = 128;
  step.sequences = {{6400, 512}};  // 16 tiles a head: 128 items of all heads fill 132 processors
  const int64_t pages = 108 + 1;   // the chunk begins and ends on page boundaries
  step.images = 8 * pages / 2 + 40;
  PlannedStep few(step);
  ASSERT_TRUE(few.make().has_value());
  few.check();
  EXPECT_EQ(few.plan().heads_per_pass, 8) << "ranges of pages, not a part of the heads";
  EXPECT_EQ(few.plan().batches.size(), 2u);

  step.sequences = {{4864, 2048}};  // 64 tiles a head: half of the heads are enough
  step.images = 8 * (108 + 32) / 2 + 40;
  PlannedStep many(step);
  ASSERT_TRUE(many.make().has_value());
  many.check();
  EXPECT_EQ(many.plan().heads_per_pass, 4);
  EXPECT_EQ(many.plan().batches.size(), 1u);
}

TEST(PrefillPlan, SaysWhatAChunkNeeds) {
  Step step;
  step.images = 2;
  PlannedStep planned(step);
  const Status made = planned.make();
  ASSERT_FALSE(made.has_value());
  EXPECT_EQ(made.error().code(), ErrorCode::kResourceExhausted);
  EXPECT_NE(made.error().message().find("100 new tokens"), std::string::npos)
      << made.error().message();
}

TEST(PrefillPlan, LongestSequencesAndTilesFirst) {
  PlannedStep planned(Step{});
  ASSERT_TRUE(planned.make().has_value());
  const PrefillPlan& plan = planned.plan();
  int longest = 1 << 20;
  int sequence = -1;
  for (size_t i = 0; i < plan.passes[0].num_items; ++i) {
    const QueryTile& tile = plan.tiles[static_cast<size_t>(plan.items[i].tile)];
    if (tile.sequence == sequence) continue;
    sequence = tile.sequence;
    EXPECT_LE(tile.num_key_tiles, longest);
    longest = tile.num_key_tiles;
  }
}

// The last heads of a short prompt, of which one alone leaves blocks idle, end with short tiles.
TEST(PrefillPlan, LastHeadsEndTogether) {
  Step step;
  step.num_kv_heads = 8;
  step.sequences = {{0, 2560}};  // 80 tiles a head for 132 multiprocessors
  PlannedStep planned(step);
  ASSERT_TRUE(planned.make().has_value());
  planned.check();
  const PrefillPlan& plan = planned.plan();
  ASSERT_EQ(plan.passes.size(), 1u);
  ASSERT_EQ(plan.items.size(), 8u * 80);
  const auto length = [&](size_t i) {
    return plan.tiles[static_cast<size_t>(plan.items[i].tile)].num_key_tiles;
  };
  for (size_t i = 0; i < 4 * 80; ++i) EXPECT_EQ(plan.items[i].head, static_cast<int>(i / 80));
  int heads = 0;
  for (size_t i = 4 * 80; i < plan.items.size(); ++i) {
    if (i > 4 * 80) {
      EXPECT_LE(length(i), length(i - 1));
    }
    heads |= 1 << plan.items[i].head;
  }
  EXPECT_EQ(heads, 0xf0);
}

}  // namespace
}  // namespace kvant::backend::cuda
