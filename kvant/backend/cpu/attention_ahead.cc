// Which parts of the cache a task of attention asks for while it reads others.
#include <algorithm>

#include "kvant/backend/cpu/attention_task.h"

namespace kvant::backend::cpu {

// The unit of a page that all rows read as stored and this task reads; otherwise null.
const std::byte* Task::stored_unit(int64_t page) const {
  const int64_t boundary = (page + sequence_.recent_pages + 1) * call_.view.page_tokens;
  if (boundary > first_position()) return nullptr;
  if (page * call_.view.page_tokens / attention::kSplitTokens >= end_split_) return nullptr;
  const cache::PageEntry entry = sequence_.stored[page];
  if (!entry.valid()) return nullptr;
  return call_.view.kinds[entry.kind].unit(entry, call_.args.group_layer, item_.kv_head);
}

// Puts into next_ what to fetch while `page` is read: the last quarter of the next unit, the third
// of the one after it, and so on, so that each unit is there when its turn comes.
void Task::look_ahead(int64_t page) {
  const int64_t lines =
      call_.view.kinds[cache::kKindStored].units[call_.args.group_layer].bytes / 64;
  if (page == ahead_of_ + 1) {
    std::copy(ahead_ + 1, ahead_ + kFetchStreams, ahead_);
    ahead_[kFetchStreams - 1] = stored_unit(page + kFetchStreams);
  } else if (page != ahead_of_) {
    for (int i = 0; i < kFetchStreams; ++i) ahead_[i] = stored_unit(page + 1 + i);
    fetch_missing(page, lines);
  }
  ahead_of_ = page;
  next_.lines = 0;
  if (ahead_[0] == nullptr) return;
  for (int i = 0; i < kFetchStreams; ++i) {
    const int64_t first = lines * (kFetchStreams - 1 - i) / kFetchStreams;
    // Behind the last unit, what was just asked for: that costs little.
    next_.stream[i] = ahead_[i] == nullptr
                          ? next_.stream[i - 1]
                          : reinterpret_cast<const uint8_t*>(ahead_[i]) + 64 * first;
  }
  next_.lines = static_cast<int>((lines + kFetchStreams - 1) / kFetchStreams);
}

// What would have been asked for while the pages before `page` were read.
void Task::fetch_missing(int64_t page, int64_t lines) const {
  const std::byte* unit = stored_unit(page);
  for (int i = 0; unit != nullptr && i < kFetchStreams; unit = ahead_[i], ++i) {
    for (int64_t line = 0; line < lines * (kFetchStreams - i) / kFetchStreams; ++line) {
      __builtin_prefetch(unit + 64 * line, 0, 2);
    }
  }
}

}  // namespace kvant::backend::cpu
