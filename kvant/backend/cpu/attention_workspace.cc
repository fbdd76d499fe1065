#include "kvant/backend/cpu/attention_workspace.h"

#include <algorithm>
#include <cmath>

#include "kvant/backend/cpu/attention_task.h"

namespace kvant::backend::cpu {

PartialRows take_partials(Cutter& cutter, int64_t rows, int64_t stride) {
  PartialRows p;
  p.stride = stride;
  p.acc = cutter.take<float>(rows * stride);
  p.max = cutter.take<float>(rows);
  p.sum = cutter.take<float>(rows);
  p.share = cutter.take<float>(rows);
  return p;
}

PreRopeTables take_pre_rope_tables(Cutter& cutter, int head_dim, int page_tokens) {
  const int64_t half = head_dim / 2;
  PreRopeTables t;
  t.angle = cutter.take<double>(half);
  t.page_step = cutter.take<double>(2 * half);
  t.token_cos = cutter.take<float>(half * page_tokens);
  t.token_sin = cutter.take<float>(half * page_tokens);
  return t;
}

void fill_pre_rope_tables(const attention::RopeParams& rope, int page_tokens,
                          const PreRopeTables& tables) {
  const int half = rope.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    double angle = std::pow(static_cast<double>(rope.base), -2.0 * i / rope.rotary_dim);
    if (rope.frequency_factors != nullptr) angle /= rope.frequency_factors[i];
    angle *= rope.position_scale;
    tables.angle[i] = angle;
    tables.page_step[2 * i] = std::cos(angle * page_tokens);
    tables.page_step[2 * i + 1] = std::sin(angle * page_tokens);
    const double step_c = std::cos(angle), step_s = std::sin(angle);
    double c = 1.0, s = 0.0;
    for (int t = 0; t < page_tokens; ++t) {
      tables.token_cos[i * page_tokens + t] = static_cast<float>(c);
      tables.token_sin[i * page_tokens + t] = static_cast<float>(s);
      const double next_c = c * step_c - s * step_s;
      s = s * step_c + c * step_s;
      c = next_c;
    }
  }
}

WorkerMemory take_worker(Cutter& cutter, int head_dim, int page_tokens) {
  const int64_t d = head_dim;
  WorkerMemory w;
  w.q_plain = cutter.take<float>(kMaxQueryRows * d);
  w.q_stored = cutter.take<float>(kMaxQueryRows * d);
  w.page = cutter.take<float>(page_tokens * d);
  w.scratch = cutter.take<float>(2 * std::max<int64_t>(d, page_tokens));
  w.s = cutter.take<float>(static_cast<int64_t>(kMaxQueryRows) * page_tokens);
  w.offset = cutter.take<float>(kMaxQueryRows);
  w.bias_dot = cutter.take<float>(kMaxQueryRows);
  w.dot = cutter.take<float>(kMaxQueryRows);
  w.factor = cutter.take<float>(kMaxQueryRows);
  w.row = cutter.take<float>(d);
  w.q_tiles = cutter.take<uint8_t>(query_tile_bytes(kMaxQueryRows, head_dim));
  w.q_integer.hi = cutter.take<int8_t>(query_integer_bytes(kMaxQueryRows, head_dim));
  w.q_integer.lo = w.q_integer.hi + kMaxQueryRows * d;
  w.q_integer.words = reinterpret_cast<int16_t*>(w.q_integer.hi);
  w.q_integer.scale = cutter.take<float>(kMaxQueryRows);
  w.q_integer.start = cutter.take<int32_t>(kMaxQueryRows * (d / 16));
  w.q_integer.rest = cutter.take<int32_t>(kMaxQueryRows * (d / 16));
  w.q_integer.sum = cutter.take<float>(kMaxQueryRows * (d / 16));
  w.integer_scratch = cutter.take<uint8_t>(integer_scratch_bytes(head_dim));
  const int64_t split_pages = attention::kSplitTokens / page_tokens;
  w.page_cos = cutter.take<float>(split_pages * d / 2);
  w.page_sin = cutter.take<float>(split_pages * d / 2);
  w.split = take_partials(cutter, kMaxQueryRows, 2 * d);
  w.total = take_partials(cutter, kMaxQueryRows, 2 * d);
  return w;
}

WorkspaceLayout workspace_layout(int head_dim, int page_tokens, int num_threads) {
  Cutter shared(nullptr);
  take_pre_rope_tables(shared, head_dim, page_tokens);
  Cutter worker(nullptr);
  take_worker(worker, head_dim, page_tokens);
  // Append: one side in fp32 and both sides' planar bytes, at most 4 bytes a value.
  const int64_t append_bytes = int64_t{8} * page_tokens * head_dim + 4096;
  WorkspaceLayout layout;
  layout.workers_at = shared.used();
  layout.worker_bytes = std::max(worker.used(), append_bytes);
  layout.partials_at = layout.workers_at + num_threads * layout.worker_bytes;
  return layout;
}

int64_t partial_bytes(int64_t rows, int64_t width) {
  Cutter counter(nullptr);
  take_partials(counter, rows, width);
  return counter.used();
}

int64_t attention_workspace_bytes(const WorkspaceNeeds& needs, int num_threads) {
  if (needs.num_kv_heads <= 0 || needs.head_dim <= 0 || needs.page_tokens <= 0) return 0;
  constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;
  const int64_t splits =
      (needs.max_context + attention::kSplitTokens - 1) / attention::kSplitTokens;
  const int64_t items = std::min<int64_t>(
      enough_items(num_threads), static_cast<int64_t>(needs.max_sequences) * needs.num_kv_heads);
  const int64_t group = std::max(1, needs.num_query_heads / needs.num_kv_heads);
  // A row of each sequence, if there are several that may share pages.
  const int64_t prefixes =
      needs.max_sequences < 2
          ? 0
          : std::min(kMaxPartialBytes,
                     partial_bytes(int64_t{needs.max_sequences} * needs.num_kv_heads * group,
                                   2 * needs.head_dim));
  return workspace_layout(needs.head_dim, needs.page_tokens, num_threads).partials_at + prefixes +
         std::min(kMaxPartialBytes, partial_bytes(items * group * splits, 2 * needs.head_dim));
}

}  // namespace kvant::backend::cpu
