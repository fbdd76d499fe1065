// Which sequences of a batch have their first pages in common, so that attention reads such pages
// once for all of them.
//
// Works in splits of some number of pages. Sequences that name the same pages in a split, and in
// all splits before it, are read together; where they part, each part that is still a group goes
// on as a run of the next level.
#pragma once

#include <cstdint>
#include <vector>

#include "kvant/attention/problem.h"
#include "kvant/cache/view.h"

namespace kvant::backend {

// Splits [first_split, end_split) of all members. The members' results of the splits before come
// from runs of the levels before.
struct SharedRun {
  int32_t level = 0;
  int32_t first_member = 0;  // index into SharedPrefixes::members
  int32_t num_members = 0;
  int64_t first_split = 0;
  int64_t end_split = 0;
};

struct ShareLimits {
  int group = 1;              // query rows of a new token and KV head (G)
  int max_rows = 0;           // of the members of a run together, per KV head
  int min_runs_of_group = 1;  // a group is cut into at least so many runs, one for each thread
  int split_tokens = attention::kSplitTokens;  // a multiple of the page
};

// Vectors keep their capacity from call to call.
struct SharedPrefixes {
  std::vector<int32_t> members;    // sequences, of one run after the other
  std::vector<SharedRun> runs;     // by level
  std::vector<int64_t> end_split;  // [sequence]: splits before it belong to runs
  std::vector<int64_t> first_row;  // [sequence]: its place among the rows that runs leave behind,
                                   // [KV head][new token][G]
  int64_t num_rows = 0;

  void clear(size_t num_sequences);

  struct Group {
    int32_t begin = 0;  // of `order`
    int32_t end = 0;
    int32_t level = 0;
    int64_t split = 0;
  };
  std::vector<int32_t> order;  // memory of find_shared_prefixes
  std::vector<Group> groups;
};

// Only splits that every new token of a sequence reads whole and as stored are shared; nothing is
// in a group with a window, and no sequence with rows for more than half a run.
void find_shared_prefixes(const cache::GroupView& view, const ShareLimits& limits,
                          SharedPrefixes& result);

}  // namespace kvant::backend
