#include "kvant/backend/cuda/prefill/prefill_plan.h"

#include <algorithm>
#include <limits>
#include <string>

#include "kvant/base/check.h"

namespace kvant::backend::cuda {

using cache::GroupView;
using cache::PageEntry;
using cache::SequenceView;

namespace {

// Pages [begin, end).
struct PageRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

// What all queries of a sequence read, in pages, and where its images are.
struct SequenceImages {
  PageRange sink;
  PageRange stored;
  PageRange bf16;
  int64_t sink_image = 0;
  int64_t stored_image = 0;
  int64_t bf16_image = 0;

  int64_t count() const { return sink.size() + stored.size() + bf16.size(); }
};

class Planner {
 public:
  Planner(const PrefillPlanArgs& args, PrefillPlan& plan)
      : args_(args),
        view_(*args.view),
        plan_(plan),
        page_tokens_(view_.page_tokens),
        tile_tokens_(std::max(1, kTileRows / (args.num_query_heads / view_.num_kv_heads))),
        slice_tokens_(
            std::min<int64_t>(page_tokens_, key_tile_tokens(view_.head_dim, args_.images))),
        sinks_(view_.window > 0 ? args.sink_tokens : 0) {}

  Status run() {
    plan_ = {};
    std::vector<SequenceImages> all;
    int64_t total = 0;
    for (const SequenceView& seq : view_.sequences) {
      all.push_back(needed_pages(seq));
      total += all.back().count();
      plan_.references.push_back(reference_page(seq, all.back()));
    }
    const int64_t capacity =
        args_.workspace_bytes / (2 * image_bytes(view_.head_dim, page_tokens_, args_.images));
    const Split split = choose_split(all, total, capacity);
    plan_.heads_per_pass = split.heads;
    if (split.ranges > 1) {
      split_sequence(all[0], split.ranges);
    } else if (total * split.heads <= capacity) {
      begin_batch();
      for (size_t s = 0; s < all.size(); ++s) add_sequence(s, all[s], all[s].stored.begin, false);
    } else {
      KVANT_TRY(plan_by_sequences(all, capacity));
    }
    make_passes();
    return {};
  }

 private:
  // What a batch has of one sequence; first_job and first_tile from the batch's first.
  struct Part {
    size_t first_job = 0, num_jobs = 0;
    size_t first_tile = 0, num_tiles = 0;
    int longest = 0;
  };

  int64_t first_visible(int64_t position) const {
    return view_.window > 0 ? std::max<int64_t>(0, position - view_.window + 1) : 0;
  }

  SequenceImages needed_pages(const SequenceView& seq) const {
    const int64_t last = seq.first_position + seq.num_new_tokens - 1;
    const int64_t first_query_page = seq.first_position / page_tokens_;
    const int64_t last_page = last / page_tokens_;
    const int64_t window_page = first_visible(seq.first_position) / page_tokens_;
    const int64_t stored_end = std::max<int64_t>(0, last_page - seq.recent_pages);
    const int64_t sink_end =
        std::min<int64_t>((sinks_ + page_tokens_ - 1) / page_tokens_, stored_end);
    SequenceImages images;
    images.sink = {0, sink_end};
    images.stored = {std::max(window_page, sink_end), stored_end};
    images.bf16 = {
        std::max<int64_t>(first_query_page - seq.recent_pages, sinks_ > 0 ? 0 : window_page),
        last_page + 1};
    return images;
  }

  ImageJob job_of(size_t sequence, int64_t page, bool bf16) const {
    const SequenceView& seq = view_.sequences[sequence];
    const PageEntry entry = bf16 ? seq.bf16[page - seq.bf16_first_page] : seq.stored[page];
    KVANT_CHECK(entry.valid(), "a page that a query reads has a slot");
    ImageJob job;
    job.slot = static_cast<int32_t>(entry.slot);
    job.page_number = static_cast<int32_t>(page);
    job.sequence = static_cast<int32_t>(sequence);
    const int64_t written = seq.first_position + seq.num_new_tokens - page * page_tokens_;
    job.num_tokens = static_cast<int16_t>(std::min<int64_t>(written, page_tokens_));
    job.kind = static_cast<uint16_t>(entry.kind);
    return job;
  }

  // A page that most queries see. Not the first of a sequence if it can be helped: the keys of
  // attention sinks are unlike the others.
  ImageJob reference_page(const SequenceView& seq, const SequenceImages& images) const {
    const size_t sequence = static_cast<size_t>(&seq - view_.sequences.data());
    if (images.stored.size() > 0) return job_of(sequence, images.stored.end - 1, false);
    return job_of(sequence, (images.bf16.begin + images.bf16.end - 1) / 2, true);
  }

  // How many KV heads at a time, and in how many ranges of pages the only sequence is read.
  struct Split {
    int heads = 1;
    int64_t ranges = 1;
  };

  // Pages of a range, all images of it.
  static int64_t range_images(const SequenceImages& images, int64_t ranges) {
    return (images.count() + ranges - 1) / ranges;
  }

  // The split with the shortest estimated time: waves of blocks times their length in key tiles.
  Split choose_split(const std::vector<SequenceImages>& all, int64_t total,
                     int64_t capacity) const {
    constexpr double kTilesToStart = 4.0;  // what a query tile costs besides its key tiles
    int64_t tiles = 0;
    for (const SequenceView& seq : view_.sequences) {
      tiles += (seq.num_new_tokens + tile_tokens_ - 1) / tile_tokens_;
    }
    const int num_heads = view_.num_kv_heads;
    Split best;
    double least = std::numeric_limits<double>::infinity();
    for (int passes = 1; passes <= num_heads; ++passes) {
      const int heads = (num_heads + passes - 1) / passes;
      const int64_t room = capacity / heads;
      int64_t ranges = 1;
      if (total > room) {
        const int64_t fixed = all[0].count() - all[0].stored.size();
        if (all.size() > 1 || fixed >= room) continue;
        ranges = (total + room - 1) / room;
        // The first range holds what is not stored, and at least one stored page.
        if (range_images(all[0], ranges) <= fixed) continue;
      }
      const auto waves =
          static_cast<double>((tiles * heads + args_.num_processors - 1) / args_.num_processors);
      const double length = static_cast<double>(total * page_tokens_) /
                            static_cast<double>(key_tile_tokens(view_.head_dim, args_.images) *
                                                static_cast<int64_t>(all.size()) * ranges);
      const double time = static_cast<double>((num_heads + heads - 1) / heads * ranges) * waves *
                          (length + kTilesToStart);
      if (time < least) {
        least = time;
        best = {heads, ranges};
      }
    }
    return best;
  }

  void begin_batch() {
    PrefillBatch batch;
    batch.first_job = plan_.jobs.size();
    batch.first_tile = plan_.tiles.size();
    plan_.batches.push_back(batch);
    parts_.emplace_back();
  }

  // Jobs from the last page to the first: the order of use.
  int64_t add_jobs(size_t sequence, PageRange pages, bool bf16) {
    PrefillBatch& batch = plan_.batches.back();
    const int64_t first = batch.images_per_head;
    for (int64_t page = pages.end - 1; page >= pages.begin; --page) {
      plan_.jobs.push_back(job_of(sequence, page, bf16));
      plan_.jobs.back().image = static_cast<int32_t>(first + page - pages.begin);
    }
    batch.images_per_head += pages.size();
    batch.num_jobs += static_cast<size_t>(pages.size());
    return first;
  }

  // Stored pages [left_begin, images.stored.begin) are for later batches.
  void add_sequence(size_t sequence, SequenceImages images, int64_t left_begin, bool resumes) {
    const SequenceView& seq = view_.sequences[sequence];
    PrefillBatch& batch = plan_.batches.back();
    Part part;
    part.first_job = batch.num_jobs;
    part.first_tile = batch.num_tiles;
    images.bf16_image = add_jobs(sequence, images.bf16, true);
    images.stored_image = add_jobs(sequence, images.stored, false);
    images.sink_image = add_jobs(sequence, images.sink, false);
    for (int token = 0; token < seq.num_new_tokens; token += tile_tokens_) {
      QueryTile tile = make_tile(sequence, images, token);
      tile.resumes = resumes ? 1 : 0;
      const int64_t last_page = (tile.position + tile.num_tokens - 1) / page_tokens_;
      const int64_t left_end = std::min(images.stored.begin, last_page - seq.recent_pages);
      tile.continues = std::max(left_begin, first_visible(tile.position) / page_tokens_) < left_end;
      if (tile.num_slices > 0) plan_.tiles.push_back(tile);
    }
    batch.num_tiles = plan_.tiles.size() - batch.first_tile;
    part.num_jobs = batch.num_jobs - part.first_job;
    part.num_tiles = batch.num_tiles - part.first_tile;
    const auto first =
        plan_.tiles.begin() + static_cast<int64_t>(batch.first_tile + part.first_tile);
    std::stable_sort(first, plan_.tiles.end(), [](const QueryTile& a, const QueryTile& b) {
      return a.num_key_tiles > b.num_key_tiles;
    });
    part.longest = part.num_tiles > 0 ? first->num_key_tiles : 0;
    parts_.back().push_back(part);
  }

  // Items and chunks of every batch for as many heads as a pass has, the last pass maybe fewer.
  void make_passes() {
    for (auto& parts : parts_) {
      std::stable_sort(parts.begin(), parts.end(),
                       [](const Part& a, const Part& b) { return a.longest > b.longest; });
    }
    std::vector<PrefillPass> made;  // [batch]: of the last pass with this many heads
    for (int first = 0; first < view_.num_kv_heads; first += plan_.heads_per_pass) {
      const int heads = std::min(plan_.heads_per_pass, view_.num_kv_heads - first);
      if (made.empty() || made[0].num_heads != heads) {
        made.clear();
        for (size_t b = 0; b < plan_.batches.size(); ++b) made.push_back(make_pass(b, heads));
      }
      for (PrefillPass& pass : made) {
        pass.first_head = first;
        if (pass.num_items > 0) plan_.passes.push_back(pass);
      }
    }
  }

  PrefillPass make_pass(size_t batch, int heads) {
    PrefillPass pass;
    pass.batch = batch;
    pass.num_heads = heads;
    pass.first_item = plan_.items.size();
    pass.first_chunk = plan_.chunks.size();
    int64_t units = 0;
    for (const Part& part : parts_[batch]) {
      const auto tiles = static_cast<int>(part.num_tiles);
      for (int head = 0; head < heads; ++head) {
        for (int t = 0; t < tiles; ++t) {
          plan_.items.push_back({static_cast<int32_t>(part.first_tile) + t, head});
        }
      }
      // As many heads side by side as run at the same time.
      const int together =
          std::clamp((args_.num_processors + tiles / 2) / std::max(1, tiles), 1, heads);
      for (int head = 0; head < heads; head += together) {
        ImageChunk chunk;
        chunk.first_unit = static_cast<int32_t>(units);
        chunk.first_job = static_cast<int32_t>(part.first_job);
        chunk.num_jobs = static_cast<int32_t>(part.num_jobs);
        chunk.first_head = head;
        chunk.num_heads = std::min(together, heads - head);
        units += 2 * static_cast<int64_t>(part.num_jobs) * chunk.num_heads;
        plan_.chunks.push_back(chunk);
      }
    }
    if (!parts_[batch].empty()) even_end(parts_[batch].back(), batch, heads);
    pass.num_items = plan_.items.size() - pass.first_item;
    pass.num_chunks = plan_.chunks.size() - pass.first_chunk;
    return pass;
  }

  // A head's tiles are longest first, so that blocks end together, if there are many. Where there
  // are fewer than blocks and they differ, the last heads of a pass are ordered together.
  void even_end(const Part& part, size_t batch, int heads) {
    const auto tiles = static_cast<int>(part.num_tiles);
    if (tiles == 0 || tiles >= args_.num_processors) return;
    const QueryTile* first = plan_.tiles.data() + plan_.batches[batch].first_tile;
    if (first[part.first_tile + part.num_tiles - 1].num_key_tiles * 2 > part.longest) return;
    const int together = std::min(heads, (2 * args_.num_processors + tiles - 1) / tiles);
    std::stable_sort(plan_.items.end() - together * tiles, plan_.items.end(),
                     [&](const WorkItem& a, const WorkItem& b) {
                       return first[a.tile].num_key_tiles > first[b.tile].num_key_tiles;
                     });
  }

  QueryTile make_tile(size_t sequence, const SequenceImages& images, int token) const {
    const SequenceView& seq = view_.sequences[sequence];
    const int64_t u = slice_tokens_;
    const int64_t slices_per_page = page_tokens_ / u;
    QueryTile tile;
    tile.row = seq.first_row + token;
    tile.num_tokens = std::min(tile_tokens_, seq.num_new_tokens - token);
    tile.sequence = static_cast<int32_t>(sequence);
    tile.recent_pages = seq.recent_pages;
    const int64_t first = seq.first_position + token;
    const int64_t last = first + tile.num_tokens - 1;
    tile.position = static_cast<int32_t>(first);
    const int64_t first_page = first / page_tokens_;
    const int64_t stored_end = last / page_tokens_ - seq.recent_pages;  // pages
    const int64_t window_slice = first_visible(first) / u;

    PageRange sink = {0, std::min(images.sink.end, stored_end) * slices_per_page};
    PageRange stored = {std::max(window_slice, images.stored.begin * slices_per_page),
                        std::min(images.stored.end, stored_end) * slices_per_page};
    PageRange bf16 = {
        std::max((first_page - seq.recent_pages) * slices_per_page, sinks_ > 0 ? 0 : window_slice),
        last / u + 1};
    bf16.begin = std::max(bf16.begin, images.bf16.begin * slices_per_page);
    bf16.end = std::min(bf16.end, images.bf16.end * slices_per_page);
    tile.num_sink = static_cast<int32_t>(sink.size());
    tile.num_stored = static_cast<int32_t>(stored.size());
    tile.num_slices = static_cast<int32_t>(sink.size() + stored.size() + bf16.size());
    tile.sink_place = static_cast<int32_t>(images.sink_image * slices_per_page);
    tile.stored_first = static_cast<int32_t>(stored.begin);
    tile.stored_place = static_cast<int32_t>(images.stored_image * slices_per_page + stored.begin -
                                             images.stored.begin * slices_per_page);
    tile.bf16_first = static_cast<int32_t>(bf16.begin);
    tile.bf16_place = static_cast<int32_t>(images.bf16_image * slices_per_page + bf16.begin -
                                           images.bf16.begin * slices_per_page);

    // Stored slices that every row sees whole: inside the last row's window, before the page from
    // which on the first row reads BF16.
    const int64_t whole_first = (first_visible(last) + u - 1) / u;
    const int64_t whole_last = (first_page - seq.recent_pages) * slices_per_page;
    const int64_t before = sink.size();
    const int64_t whole_begin = before + std::max(whole_first - stored.begin, int64_t{0});
    const int64_t whole_end =
        before + std::clamp<int64_t>(whole_last - stored.begin, 0, stored.size());
    const int64_t n = tile.num_slices;
    const int64_t slices_per_tile = key_tile_tokens(view_.head_dim, args_.images) / u;
    const int64_t key_tiles = (n + slices_per_tile - 1) / slices_per_tile;
    tile.num_key_tiles = static_cast<int32_t>(key_tiles);
    const int64_t begin = (n - whole_end + slices_per_tile - 1) / slices_per_tile;
    const int64_t end = std::max<int64_t>(0, n - whole_begin) / slices_per_tile;
    tile.whole_begin = static_cast<int32_t>(std::min(begin, key_tiles));
    tile.whole_end = static_cast<int32_t>(std::clamp(end, std::min(begin, key_tiles), key_tiles));
    return tile;
  }

  // One head does not fit with all sequences: as many sequences at a time as fit, and a sequence
  // that does not fit alone in ranges of its stored pages.
  Status plan_by_sequences(const std::vector<SequenceImages>& all, int64_t capacity) {
    bool open = false;
    for (size_t s = 0; s < all.size(); ++s) {
      if (all[s].count() <= capacity) {
        if (!open || plan_.batches.back().images_per_head + all[s].count() > capacity) {
          begin_batch();
        }
        open = true;
        add_sequence(s, all[s], all[s].stored.begin, false);
        continue;
      }
      open = false;
      const int64_t fixed = all[s].count() - all[s].stored.size();
      int64_t ranges = (all[s].count() + capacity - 1) / capacity;
      if (fixed >= capacity) return too_small(s, fixed, capacity);
      if (range_images(all[s], ranges) <= fixed) ranges = 0;  // fill the first one
      split_sequence(all[s], ranges, s, capacity);
    }
    return {};
  }

  Error too_small(size_t sequence, int64_t fixed, int64_t capacity) const {
    const int64_t unit = 2 * image_bytes(view_.head_dim, page_tokens_, args_.images);
    return Error(ErrorCode::kResourceExhausted,
                 "the prefill workspace holds " + std::to_string(capacity * unit) +
                     " bytes of images, but the BF16 pages of " +
                     std::to_string(view_.sequences[sequence].num_new_tokens) +
                     " new tokens of one KV head take " + std::to_string((fixed + 1) * unit) +
                     "; make it larger or the chunk smaller");
  }

  // Batches with `ranges` equal parts of a sequence's images (0: parts of `capacity`), from its
  // end.
  void split_sequence(const SequenceImages& whole, int64_t ranges, size_t sequence = 0,
                      int64_t capacity = 0) {
    const int64_t size = ranges == 0 ? capacity : range_images(whole, ranges);
    const int64_t fixed = whole.count() - whole.stored.size();
    SequenceImages part = whole;
    part.stored.begin = std::max(whole.stored.begin, whole.stored.end - (size - fixed));
    bool resumes = false;
    while (true) {
      begin_batch();
      add_sequence(sequence, part, whole.stored.begin, resumes);
      if (part.stored.begin == whole.stored.begin) return;
      resumes = true;
      part.sink = part.bf16 = {};
      part.stored.end = part.stored.begin;
      part.stored.begin = std::max(whole.stored.begin, part.stored.end - size);
    }
  }

  const PrefillPlanArgs& args_;
  const GroupView& view_;
  PrefillPlan& plan_;
  const int64_t page_tokens_;
  const int tile_tokens_;
  const int64_t slice_tokens_;
  const int64_t sinks_;
  std::vector<std::vector<Part>> parts_;  // [batch]
};

}  // namespace

Status make_prefill_plan(const PrefillPlanArgs& args, PrefillPlan& plan) {
  return Planner(args, plan).run();
}

}  // namespace kvant::backend::cuda
