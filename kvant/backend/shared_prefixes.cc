#include "kvant/backend/shared_prefixes.h"

#include <algorithm>

namespace kvant::backend {

using cache::GroupView;
using cache::PageEntry;
using cache::SequenceView;

namespace {

class Finder {
 public:
  Finder(const GroupView& view, const ShareLimits& limits, SharedPrefixes& result)
      : view_(view),
        limits_(limits),
        result_(result),
        split_pages_(limits.split_tokens / view.page_tokens) {}

  void run() {
    const auto num_sequences = static_cast<int32_t>(view_.sequences.size());
    result_.order.resize(view_.sequences.size());
    for (int32_t s = 0; s < num_sequences; ++s) result_.order[s] = s;
    result_.groups.clear();
    refine({0, num_sequences, -1, 0});
    // Groups grow at the end: a level is complete before the next.
    for (size_t i = 0; i < result_.groups.size(); ++i) {
      SharedPrefixes::Group group = result_.groups[i];
      const int64_t first_split = group.split;
      while (stays_together(group)) ++group.split;
      add_runs(group, first_split);
      refine(group);
    }
  }

 private:
  const SequenceView& sequence(int32_t order) const {
    return view_.sequences[result_.order[order]];
  }
  int rows(const SequenceView& seq) const { return seq.num_new_tokens * limits_.group; }

  bool can_share(const SequenceView& seq, int64_t split) const {
    const int64_t last_page = (split + 1) * split_pages_ - 1;
    return seq.num_new_tokens > 0 && rows(seq) <= limits_.max_rows / 2 &&
           (last_page + seq.recent_pages + 1) * view_.page_tokens <= seq.first_position;
  }

  bool same_pages(const SequenceView& a, const SequenceView& b, int64_t split) const {
    const int64_t first = split * split_pages_;
    return std::equal(a.stored + first, a.stored + first + split_pages_, b.stored + first);
  }

  bool stays_together(const SharedPrefixes::Group& group) const {
    const SequenceView& leader = sequence(group.begin);
    for (int32_t i = group.begin; i < group.end; ++i) {
      if (!can_share(sequence(i), group.split)) return false;
      if (i > group.begin && !same_pages(leader, sequence(i), group.split)) return false;
    }
    return true;
  }

  // What a split's last page is, or a value apart for sequences that do not share it.
  uint64_t key(const SequenceView& seq, int64_t split) const {
    if (!can_share(seq, split)) return ~uint64_t{0};
    const PageEntry last = seq.stored[(split + 1) * split_pages_ - 1];
    return uint64_t{last.kind} << 32 | last.slot;
  }

  // Groups of sequences that go on together from the split where `group` parts.
  void refine(const SharedPrefixes::Group& group) {
    const int64_t split = group.split;
    const auto begin = result_.order.begin() + group.begin;
    const auto end = result_.order.begin() + group.end;
    // Equal keys in the order of the batch, so that runs do not depend on the sort.
    std::sort(begin, end, [&](int32_t a, int32_t b) {
      const uint64_t key_a = key(view_.sequences[a], split);
      const uint64_t key_b = key(view_.sequences[b], split);
      return key_a != key_b ? key_a < key_b : a < b;
    });
    for (int32_t first = group.begin; first < group.end;) {
      const SequenceView& leader = sequence(first);
      if (!can_share(leader, split)) break;  // so are all that follow
      int32_t last = first + 1;
      while (last < group.end && can_share(sequence(last), split) &&
             same_pages(leader, sequence(last), split)) {
        ++last;
      }
      if (last - first >= 2 * limits_.min_runs_of_group) {
        result_.groups.push_back({first, last, group.level + 1, split});
      }
      first = last;
    }
  }

  // Cuts the group into runs of about equal numbers of rows.
  void add_runs(const SharedPrefixes::Group& group, int64_t first_split) {
    int total = 0;
    for (int32_t i = group.begin; i < group.end; ++i) total += rows(sequence(i));
    const int num_runs =
        std::max(limits_.min_runs_of_group, (total + limits_.max_rows - 1) / limits_.max_rows);
    const int wanted = (total + num_runs - 1) / num_runs;
    int run_rows = 0;
    for (int32_t i = group.begin; i < group.end; ++i) {
      const int more = rows(sequence(i));
      if (i == group.begin || run_rows >= wanted || run_rows + more > limits_.max_rows) {
        const auto member = static_cast<int32_t>(result_.members.size());
        result_.runs.push_back({group.level, member, 0, first_split, group.split});
        run_rows = 0;
      }
      run_rows += more;
      ++result_.runs.back().num_members;
      const int32_t s = result_.order[i];
      result_.members.push_back(s);
      if (result_.end_split[s] == 0) {
        result_.first_row[s] = result_.num_rows;
        result_.num_rows += int64_t{more} * view_.num_kv_heads;
      }
      result_.end_split[s] = group.split;
    }
  }

  const GroupView& view_;
  const ShareLimits& limits_;
  SharedPrefixes& result_;
  const int64_t split_pages_;
};

}  // namespace

void SharedPrefixes::clear(size_t num_sequences) {
  members.clear();
  runs.clear();
  end_split.assign(num_sequences, 0);
  first_row.assign(num_sequences, 0);
  num_rows = 0;
}

void find_shared_prefixes(const GroupView& view, const ShareLimits& limits,
                          SharedPrefixes& result) {
  result.clear(view.sequences.size());
  if (view.sequences.size() < 2 || view.window > 0) return;
  Finder(view, limits, result).run();
}

}  // namespace kvant::backend
