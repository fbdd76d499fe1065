#include "kvant/backend/cuda/shared/plan.h"

#include <algorithm>

#include "kvant/backend/shared_prefixes.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

using cache::GroupView;
using cache::SequenceView;

constexpr int kLeastPartPages = 4;  // of an item, where there is a choice

int num_results(const SharedRunPages& run) {
  return run.num_rows <= kSharedHalfRows ? 2 : 1;
}

class Planner {
 public:
  Planner(const GroupView& view, const SharedPlanShape& shape) : view_(view), shape_(shape) {}

  SharedPlan make() {
    if (view_.window > 0 || view_.sequences.size() < 2) return {};
    ShareLimits limits;
    limits.group = shape_.group;
    limits.max_rows = kSharedRows;
    limits.split_tokens = view_.page_tokens;
    find_shared_prefixes(view_, limits, found_);
    if (found_.runs.empty()) return {};
    plan_.sequences.resize(view_.sequences.size());
    for (const SharedRun& run : found_.runs) add_run(run);
    if (plan_.runs.empty() || !divide_multiprocessors()) return {};
    cut();
    number_parts();
    start_blocks();
    return std::move(plan_);
  }

 private:
  int num_blocks() const { return static_cast<int>(plan_.starts.size()); }
  double page_cost(int rows) const {
    return shape_.page_factor *
           (rows <= kSharedHalfRows ? shape_.costs.half_page : shape_.costs.page);
  }

  // Takes the run if it pays.
  void add_run(const SharedRun& found) {
    SharedRunPages run;
    run.members.assign(found_.members.begin() + found.first_member,
                       found_.members.begin() + found.first_member + found.num_members);
    const SequenceView& leader = view_.sequences[run.members[0]];
    run.first_page = static_cast<int>(found.first_split);
    run.end_page = static_cast<int>(found.end_split);
    // A first page in BF16 (a sink) is read by each sequence.
    const bool sink = run.first_page == 0 && leader.stored[0].kind != shape_.kind;
    if (sink) run.first_page = 1;
    for (int page = run.first_page; page < run.end_page; ++page) {
      if (leader.stored[page].kind == shape_.kind) continue;
      run.end_page = page;
    }
    if (run.first_page >= run.end_page) return;
    // What comes before must be shared too: decode reads from one page on.
    for (const int32_t s : run.members) {
      run.num_rows += view_.sequences[s].num_new_tokens * shape_.group;
      if (found.first_split > 0 && plan_.sequences[s].first_page != run.first_page) return;
    }
    const double unshared = static_cast<double>(run.members.size()) *
                            static_cast<double>(shape_.stored_bytes) * shape_.num_multiprocessors /
                            shape_.costs.alone_bytes;
    if (!shape_.always && unshared <= page_cost(run.num_rows)) return;
    for (const int32_t s : run.members) {
      ReadElsewhere& sequence = plan_.sequences[s];
      if (found.first_split == 0) sequence.num_sink_pages = sink ? 1 : 0;
      sequence.first_page = run.end_page;
    }
    plan_.runs.push_back(std::move(run));
  }

  // Of the work `total`, what the busiest of n blocks gets from cut(): a single run's units come in
  // whole parts, those of several even each other out.
  double busiest_share(int n, double total) const {
    if (plan_.runs.size() > 1 || n < view_.num_kv_heads) return total / n;
    const SharedRunPages& run = plan_.runs[0];
    const int64_t parts =
        std::clamp<int64_t>(num_pages(run) / kLeastPartPages, 1, n / view_.num_kv_heads);
    const int64_t pages = (num_pages(run) + parts - 1) / parts;
    return static_cast<double>(pages) * page_cost(run.num_rows);
  }

  // The two kernels run side by side: so many blocks for this one that both end together. False
  // if decode alone would end first.
  bool divide_multiprocessors() {
    const SharedCosts& costs = shape_.costs;
    double shared = 0.0;
    for (const SharedRunPages& run : plan_.runs)
      shared += static_cast<double>(num_pages(run) * view_.num_kv_heads) * page_cost(run.num_rows);
    int64_t all_bytes = 0, bytes = 0;
    for (size_t i = 0; i < view_.sequences.size(); ++i) {
      const SequenceView& sequence = view_.sequences[i];
      if (sequence.num_new_tokens == 0) continue;
      const ReadElsewhere& elsewhere = plan_.sequences[i];
      const int64_t end = sequence.first_position + sequence.num_new_tokens;
      const int64_t stored_end =
          std::max<int64_t>(0, (end - 1) / view_.page_tokens - sequence.recent_pages);
      // Of the open page, tiles of 16 tokens.
      const int64_t tiles = (end - stored_end * view_.page_tokens + 15) / 16;
      const int64_t bf16 = tiles * shape_.bf16_bytes * 16 / view_.page_tokens;
      all_bytes += bf16 + stored_end * shape_.stored_bytes;
      bytes += bf16 + (stored_end - elsewhere.first_page) * shape_.stored_bytes +
               elsewhere.num_sink_pages * shape_.bf16_bytes;
    }
    const int all = shape_.num_multiprocessors;
    const auto decode_bytes = static_cast<double>(bytes * view_.num_kv_heads);
    int blocks = 1;
    double time = 0.0;
    for (int n = 1; n < std::max(2, all); ++n) {
      const double rate = std::min(costs.bytes_per_ns * std::max(1, all - n), costs.device_bytes);
      const double both = std::max(costs.start + busiest_share(n, shared),
                                   costs.decode_start + decode_bytes / rate);
      if (n == 1 || both < time) blocks = n, time = both;
    }
    if (shape_.blocks > 0) blocks = shape_.blocks;
    plan_.starts.resize(static_cast<size_t>(blocks));
    const double alone =
        costs.alone_start + static_cast<double>(all_bytes * view_.num_kv_heads) / costs.alone_bytes;
    return shape_.always || time < alone;
  }

  int64_t num_pages(const SharedRunPages& run) const { return run.end_page - run.first_page; }

  // Every unit for itself in equal parts, or all pages in a row in equal shares: an item costs its
  // block about two pages besides its own.
  void cut() {
    double total = 0.0;
    for (const SharedRunPages& run : plan_.runs)
      total += static_cast<double>(num_pages(run) * view_.num_kv_heads) * page_cost(run.num_rows);
    const double in_a_row = total / num_blocks() + 2.0 * shape_.costs.page;
    const std::vector<int> parts = parts_of_runs();
    double longest = 0.0;
    for (size_t r = 0; r < parts.size(); ++r) {
      const int64_t most = (num_pages(plan_.runs[r]) + parts[r] - 1) / parts[r];
      longest = std::max(longest, static_cast<double>(most) * page_cost(plan_.runs[r].num_rows));
    }
    if (!parts.empty() && longest <= in_a_row) {
      cut_units(parts);
    } else {
      cut_in_a_row(total);
    }
  }

  // Parts of each run's units so that the longest part is shortest; empty if there are more units
  // than blocks.
  std::vector<int> parts_of_runs() const {
    const int heads = view_.num_kv_heads;
    int left = num_blocks() / heads - static_cast<int>(plan_.runs.size());
    if (left < 0) return {};
    std::vector<int> parts(plan_.runs.size(), 1);
    for (; left > 0; --left) {
      size_t longest = parts.size();
      double most = 0.0;
      for (size_t r = 0; r < parts.size(); ++r) {
        const int64_t pages = num_pages(plan_.runs[r]);
        if (pages < static_cast<int64_t>(parts[r] + 1) * kLeastPartPages) continue;
        const double cost =
            static_cast<double>(pages) * page_cost(plan_.runs[r].num_rows) / parts[r];
        if (cost > most) longest = r, most = cost;
      }
      if (longest == parts.size()) break;
      ++parts[longest];
    }
    return parts;
  }

  void add_item(size_t run, int kv_head, int64_t begin, int64_t end, int block) {
    SharedItem item{};
    item.queries = static_cast<int32_t>(run) * kSharedRows;
    item.partial_rows = (static_cast<int32_t>(run) * view_.num_kv_heads + kv_head) * kSharedRows;
    item.kv_head = kv_head;
    item.first_entry = first_entries_[run] + static_cast<int32_t>(begin);
    item.num_pages = static_cast<int32_t>(end - begin);
    item.alternates = num_results(plan_.runs[run]) == 2 ? 1 : 0;
    int32_t& results = results_[run * view_.num_kv_heads + kv_head];
    item.part = results;
    results += num_results(plan_.runs[run]);
    plan_.items.push_back(item);
    blocks_.push_back(block);
  }

  void add_entries() {
    for (const SharedRunPages& run : plan_.runs) {
      first_entries_.push_back(static_cast<int32_t>(plan_.entries.size()));
      const SequenceView& leader = view_.sequences[run.members[0]];
      for (int page = run.first_page; page < run.end_page; ++page)
        plan_.entries.push_back(uint32_t{leader.stored[page].slot} << 8 | shape_.kind);
    }
    results_.assign(plan_.runs.size() * view_.num_kv_heads, 0);
  }

  // Parts of the same pages side by side: runs of one group read the same pages at the same time.
  void cut_units(const std::vector<int>& parts) {
    add_entries();
    int block = 0;
    for (int head = 0; head < view_.num_kv_heads; ++head) {
      for (size_t run = 0; run < plan_.runs.size(); ++run) {
        const int64_t pages = num_pages(plan_.runs[run]);
        for (int i = 0; i < parts[run]; ++i)
          add_item(run, head, pages * i / parts[run], pages * (i + 1) / parts[run], block++);
      }
    }
  }

  void cut_in_a_row(double total) {
    add_entries();
    double done = 0.0;
    int block = 0;
    for (int head = 0; head < view_.num_kv_heads; ++head) {
      for (size_t run = 0; run < plan_.runs.size(); ++run) {
        const int64_t pages = num_pages(plan_.runs[run]);
        const double cost = page_cost(plan_.runs[run].num_rows);
        for (int64_t page = 0; page < pages;) {
          const bool last = block + 1 == num_blocks();
          const double share = total * (block + 1) / num_blocks();
          const auto until = static_cast<int64_t>((share - done) / cost + 0.5);
          const int64_t end = last ? pages : std::clamp(until, page, pages);
          if (end > page) add_item(run, head, page, end, block);
          page = end;
          if (page < pages) ++block;
        }
        done += cost * static_cast<double>(pages);
      }
    }
  }

  // Results of a sequence's runs follow each other in the order of their pages.
  void number_parts() {
    const int heads = view_.num_kv_heads;
    plan_.num_parts.assign(plan_.sequences.size() * heads, 0);
    for (size_t r = 0; r < plan_.runs.size(); ++r) {
      SharedRunPages& run = plan_.runs[r];
      for (const int32_t s : run.members) {
        for (int head = 0; head < heads; ++head) {
          int32_t& parts = plan_.num_parts[static_cast<size_t>(s) * heads + head];
          run.first_part.push_back(parts);
          parts += results_[r * heads + head];
        }
      }
    }
    for (size_t s = 0; s < plan_.sequences.size(); ++s)
      plan_.sequences[s].num_partials = plan_.num_parts.data() + s * heads;
  }

  void start_blocks() {
    for (size_t i = 0; i < plan_.items.size(); ++i) {
      SharedStart& start = plan_.starts[blocks_[i]];
      if (start.num_items++ > 0) continue;
      start.item = plan_.items[i];
      start.first_item = static_cast<int32_t>(i);
      for (int k = 0; k < std::min(kSharedStartEntries, start.item.num_pages); ++k)
        start.entries[k] = plan_.entries[start.item.first_entry + k];
    }
  }

  const GroupView& view_;
  const SharedPlanShape& shape_;
  SharedPrefixes found_;
  SharedPlan plan_;
  std::vector<int32_t> first_entries_;  // [run]
  std::vector<int32_t> results_;        // [run][kv_head]: so far
  std::vector<int> blocks_;             // [item]
};

}  // namespace

SharedPlan make_shared_plan(const GroupView& view, const SharedPlanShape& shape) {
  return Planner(view, shape).make();
}

void place_shared_rows(const GroupView& view, const PlanShape& shape, const DecodePlan& decode,
                       int num_query_heads, SharedPlan& plan) {
  const int heads = view.num_kv_heads;
  plan.queries.assign(plan.runs.size() * kSharedRows, -1);
  plan.partial_rows.assign(plan.runs.size() * heads * kSharedRows, -1);
  std::vector<size_t> first_tile(view.sequences.size() + 1, decode.tiles.size());
  for (size_t t = decode.tiles.size(); t-- > 0;) first_tile[decode.tiles[t].sequence] = t;
  for (size_t r = 0; r < plan.runs.size(); ++r) {
    const SharedRunPages& run = plan.runs[r];
    int row = 0;
    for (size_t m = 0; m < run.members.size(); ++m) {
      const int32_t s = run.members[m];
      for (size_t t = first_tile[s]; t < decode.tiles.size() && decode.tiles[t].sequence == s;
           ++t) {
        const PlannedTile& tile = decode.tiles[t];
        for (int i = 0; i < tile.num_rows; ++i, ++row) {
          KVANT_CHECK(row < kSharedRows, "a run has at most kSharedRows rows");
          plan.queries[r * kSharedRows + row] =
              (tile.first_row + i / shape.group) * num_query_heads + i % shape.group;
          for (int head = 0; head < heads; ++head) {
            const int32_t partial =
                decode.first_partials[tile.first_unit + head] + run.first_part[m * heads + head];
            plan.partial_rows[(r * heads + head) * kSharedRows + row] =
                partial * shape.max_rows + i;
          }
        }
      }
    }
  }
}

}  // namespace kvant::backend::cuda
