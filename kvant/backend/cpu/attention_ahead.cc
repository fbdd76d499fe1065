// Which parts of the cache a task of attention asks for while it reads others.
#include <algorithm>

#include "kvant/backend/cpu/attention_task.h"

namespace kvant::backend::cpu {

// Streams that are a multiple of it apart alias (AttentionKernels::streams_alias).
constexpr int64_t kAliasBytes = 2048;

// The unit of a page that all rows read as stored and this task reads; otherwise null.
const std::byte* Task::stored_unit(int64_t page) const {
  if (page >= end_page_ || boundary_of(page) > first_position()) return nullptr;
  const cache::PageEntry entry = sequence_.stored[page];
  if (!entry.valid()) return nullptr;
  return call_.view.kinds[entry.kind].unit(entry, call_.args.group_layer, item_.kv_head);
}

void Task::read_until(int64_t split) {
  end_page_ = split * attention::kSplitTokens / call_.view.page_tokens;
}

// Puts into next_ what to fetch while `page` is read: the last quarter of the next unit, the third
// of the one after it, and so on, so that each unit is there when its turn comes.
void Task::look_ahead(int64_t page) {
  if (call_.kernels.streams_alias && unit_lines_ % (kFetchStreams * kAliasBytes / 64) == 0) {
    return look_ahead_near(page);
  }
  if (page == ahead_of_ + 1) {
    std::copy(ahead_ + 1, ahead_ + kFetchStreams, ahead_);
    ahead_[kFetchStreams - 1] = stored_unit(page + kFetchStreams);
  } else if (page != ahead_of_) {
    for (int i = 0; i < kFetchStreams; ++i) ahead_[i] = stored_unit(page + 1 + i);
    fetch_missing(page);
  }
  ahead_of_ = page;
  next_.lines = 0;
  if (ahead_[0] == nullptr) return;
  for (int i = 0; i < kFetchStreams; ++i) {
    const auto first = static_cast<uint64_t>(unit_lines_) * (kFetchStreams - 1 - i) / kFetchStreams;
    // Behind the last unit, what was just asked for: that costs little.
    next_.stream[i] = ahead_[i] == nullptr
                          ? next_.stream[i - 1]
                          : reinterpret_cast<const uint8_t*>(ahead_[i]) + 64 * first;
  }
  next_.lines = static_cast<int>((unit_lines_ + kFetchStreams - 1) / kFetchStreams);
}

// The next unit from its beginning to its end, four neighbouring lines at a time: where the four
// streams would alias.
void Task::look_ahead_near(int64_t page) {
  if (page != ahead_of_ && page != ahead_of_ + 1) fetch_lines(stored_unit(page), unit_lines_);
  ahead_of_ = page;
  ahead_[0] = stored_unit(page + 1);
  next_.lines = 0;
  if (ahead_[0] == nullptr) return;
  next_.step = 64 * kFetchStreams;
  for (int i = 0; i < kFetchStreams; ++i) {
    next_.stream[i] = reinterpret_cast<const uint8_t*>(ahead_[0]) + 64 * i;
  }
  next_.lines = static_cast<int>(unit_lines_ / kFetchStreams);
}

void Task::fetch_lines(const std::byte* unit, int64_t lines) {
  for (int64_t line = 0; unit != nullptr && line < lines; ++line) {
    __builtin_prefetch(unit + 64 * line, 0, 2);
  }
}

// What would have been asked for while the pages before `page` were read.
void Task::fetch_missing(int64_t page) const {
  const std::byte* unit = stored_unit(page);
  for (int i = 0; unit != nullptr && i < kFetchStreams; unit = ahead_[i], ++i) {
    fetch_lines(unit, unit_lines_ * (kFetchStreams - i) / kFetchStreams);
  }
}

}  // namespace kvant::backend::cpu
