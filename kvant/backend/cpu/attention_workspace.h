// Scratch memory of the CPU backend's append and attention operators: one block, reserved once, cut
// up by every call. A call never allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/shared_prefixes.h"

namespace kvant::backend::cpu {

// Rows of the query tile that a task works on: (tokens of the chunk) x (query heads of a KV head).
inline constexpr int kMaxQueryRows = 128;

// One unit of work of attention: some rows of one sequence and one KV head.
struct AttentionItem {
  int32_t sequence = 0;
  int32_t kv_head = 0;
  int32_t token_begin = 0;  // relative to the sequence's first new token
  int32_t num_tokens = 0;
  int64_t first_split = 0;
  int64_t num_splits = 0;
  int64_t first_partial = 0;  // if splits run in parallel: its partial rows
};

// Consecutive splits of an item, for one thread.
struct SplitRun {
  int32_t item = 0;
  int64_t first = 0;  // relative to the item's first split
};

struct AttentionWorkspace {
  std::byte* data = nullptr;  // aligned to 64
  int64_t bytes = 0;
  std::vector<AttentionItem> items;  // keeps its capacity
  std::vector<SplitRun> runs;        // if splits run in parallel
  SharedPrefixes shared;             // of the last call
};

// Byte offsets inside the block: [shared tables][worker x num_threads][rows of shared
// prefixes][partial rows].
struct WorkspaceLayout {
  int64_t workers_at = 0;
  int64_t worker_bytes = 0;
  int64_t partials_at = 0;
};
WorkspaceLayout workspace_layout(int head_dim, int page_tokens, int num_threads);
int64_t partial_bytes(int64_t rows, int64_t width);

// With fewer items than this, attention is shared out along the keys as well.
constexpr int64_t enough_items(int num_threads) {
  return int64_t{4} * num_threads;
}

// What reserve_workspace must provide for these needs; also covers append.
int64_t attention_workspace_bytes(const WorkspaceNeeds& needs, int num_threads);

}  // namespace kvant::backend::cpu
