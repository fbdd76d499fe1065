#include "kvant/backend/cpu/attention.h"

#include <algorithm>
#include <span>
#include <string>

#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_task.h"

namespace kvant::backend::cpu {

using cache::GroupView;
using cache::PageKind;
using cache::SequenceView;

namespace {

constexpr int kMaxGroup = 16;
constexpr int kRunsPerThread = 8;  // of one call: even shares although threads differ in speed

#if defined(__x86_64__)
const AttentionKernels& amx_kernels() {
  static const AttentionKernels all = [] {
    AttentionKernels kernels = avx512::kAttentionKernels;
    kernels.tiles = &amx::kTileKernels;
    kernels.bf16 = &amx::kBf16Kernels;
    return kernels;
  }();
  return all;
}
#endif

const AttentionKernels& kernels_of(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAmx) return amx_kernels();
  if (level == CpuLevel::kAvx512) {
    return cpu_traits().half_rate_512 ? avx512::kHalfRateKernels : avx512::kAttentionKernels;
  }
  if (level == CpuLevel::kAvx2) return avx2::kAttentionKernels;
#endif
  static_cast<void>(level);
  return scalar::kAttentionKernels;
}

int64_t count_items(const GroupView& view, int block_tokens) {
  int64_t count = 0;
  for (const SequenceView& seq : view.sequences) {
    count += (seq.num_new_tokens + block_tokens - 1) / block_tokens;
  }
  return count * view.num_kv_heads;
}

void list_items(const Call& call, int block_tokens, AttentionWorkspace& workspace) {
  std::vector<AttentionItem>& items = workspace.items;
  items.clear();
  const GroupView& view = call.view;
  int64_t partials = 0;
  for (size_t s = 0; s < view.sequences.size(); ++s) {
    const SequenceView& seq = view.sequences[s];
    const int blocks = (seq.num_new_tokens + block_tokens - 1) / block_tokens;
    for (int b = blocks - 1; b >= 0; --b) {  // the last rows read most: start with them
      for (int head = 0; head < view.num_kv_heads; ++head) {
        AttentionItem item;
        item.sequence = static_cast<int32_t>(s);
        item.kv_head = head;
        item.token_begin = b * block_tokens;
        item.num_tokens = std::min(block_tokens, seq.num_new_tokens - item.token_begin);
        const int64_t first = seq.first_position + item.token_begin;
        item.first_split = workspace.shared.end_split[s];
        if (view.window > 0 && call.args.params.sink_tokens == 0) {
          item.first_split =
              std::max<int64_t>(0, first - view.window + 1) / attention::kSplitTokens;
        }
        item.num_splits =
            (first + item.num_tokens - 1) / attention::kSplitTokens + 1 - item.first_split;
        item.first_partial = partials;
        partials += item.num_splits * item.num_tokens * call.group;
        items.push_back(item);
      }
    }
  }
}

Status check_view(const GroupView& view, int layer) {
  const PageKind& stored = view.kinds[cache::kKindStored];
  for (const PageKind& kind : view.kinds) {
    if (kind.layout != cache::Layout::kCpu) {
      return Error(ErrorCode::kInvalidArgument,
                   "CPU attention reads pages in the `cpu` layout; this cache has another one");
    }
    if (kind.v_format[layer].bias && stored.v_format[layer].bias &&
        kind.v_format[layer].rotate != stored.v_format[layer].rotate) {
      return Error(
          ErrorCode::kUnsupported,
          "CPU attention needs +rot on the values of all or none of a layer's page formats "
          "when they have +bias");
    }
  }
  return {};
}

WorkerMemory memory_of(const Call& call, const AttentionWorkspace& workspace,
                       const WorkspaceLayout& layout, int worker) {
  Cutter own(workspace.data + layout.workers_at + worker * layout.worker_bytes);
  return take_worker(own, call.head_dim, call.view.page_tokens);
}

// Fills workspace.shared: nothing if the rows of prefixes have no room. Returns their bytes.
int64_t find_shared(const Call& call, int num_threads, const WorkspaceLayout& layout,
                    AttentionWorkspace& workspace) {
  ShareLimits limits;
  limits.group = call.group;
  limits.max_rows = kMaxQueryRows;
  limits.min_runs_of_group = (num_threads + call.view.num_kv_heads - 1) / call.view.num_kv_heads;
  find_shared_prefixes(call.view, limits, workspace.shared);
  const int64_t bytes = partial_bytes(workspace.shared.num_rows, call.width());
  if (layout.partials_at + bytes <= workspace.bytes) return bytes;
  workspace.shared.clear(call.view.sequences.size());
  return 0;
}

// Where runs leave the rows of their members, and where the members' items take them up.
class PrefixRows {
 public:
  PrefixRows(const Call& call, const WorkspaceLayout& layout, const AttentionWorkspace& workspace)
      : call_(call), shared_(workspace.shared) {
    Cutter cutter(workspace.data + layout.partials_at);
    rows_ = take_partials(cutter, shared_.num_rows, call.width());
  }

  // Of one KV head, from a new token of the sequence on.
  PartialRows of(int32_t sequence, int kv_head, int token_begin) const {
    const int64_t tokens = call_.view.sequences[sequence].num_new_tokens;
    const int64_t token = kv_head * tokens + token_begin;
    return rows_from(rows_, shared_.first_row[sequence] + token * call_.group);
  }

  // What the item's splits are added to.
  void start(const Task& task, const AttentionItem& item, const PartialRows& total) const {
    if (shared_.end_split[item.sequence] == 0) {
      task.clear_total(total);
    } else {
      copy(total, of(item.sequence, item.kv_head, item.token_begin), task.rows());
    }
  }

  void copy(const PartialRows& to, const PartialRows& from, int rows) const {
    std::copy_n(from.max, rows, to.max);
    std::copy_n(from.sum, rows, to.sum);
    std::copy_n(from.share, rows, to.share);
    for (int r = 0; r < rows; ++r) {
      std::copy_n(from.acc + r * from.stride, call_.width(), to.acc + r * to.stride);
    }
  }

 private:
  const Call& call_;
  const SharedPrefixes& shared_;
  PartialRows rows_;
};

// One run of shared splits, for one KV head: the same operations on each row as in run_items.
void run_shared(const Call& call, const SharedRun& run, int kv_head, const PrefixRows& prefixes,
                std::span<const int32_t> members, const WorkerMemory& memory) {
  AttentionItem item;
  item.sequence = members.front();
  item.kv_head = kv_head;
  for (const int32_t s : members) item.num_tokens += call.view.sequences[s].num_new_tokens;
  Task task(call, item, members, memory);
  task.read_until(run.end_split);
  const auto for_members = [&](const auto& f) {
    int64_t row = 0;
    for (const int32_t s : members) {
      const int rows = call.view.sequences[s].num_new_tokens * call.group;
      f(rows_from(memory.total, row), prefixes.of(s, kv_head, 0), rows);
      row += rows;
    }
  };
  task.clear_total(memory.total);
  if (run.level > 0) {
    for_members([&](const PartialRows& total, const PartialRows& prefix, int rows) {
      prefixes.copy(total, prefix, rows);
    });
  }
  for (int64_t split = run.first_split; split < run.end_split; ++split) {
    task.run_split(split, memory.split);
    task.merge_split(memory.total, memory.split);
  }
  for_members([&](const PartialRows& total, const PartialRows& prefix, int rows) {
    prefixes.copy(prefix, total, rows);
  });
}

void run_shared_levels(const Call& call, ThreadPool& pool, const AttentionWorkspace& workspace,
                       const WorkspaceLayout& layout, const PrefixRows& prefixes) {
  const SharedPrefixes& shared = workspace.shared;
  const int heads = call.view.num_kv_heads;
  for (size_t begin = 0; begin < shared.runs.size();) {
    size_t end = begin + 1;
    while (end < shared.runs.size() && shared.runs[end].level == shared.runs[begin].level) ++end;
    pool.parallel_for(static_cast<int64_t>(end - begin) * heads, [&](int64_t t, int worker) {
      const SharedRun& run = shared.runs[begin + static_cast<size_t>(t / heads)];
      const WorkerMemory memory = memory_of(call, workspace, layout, worker);
      const std::span<const int32_t> all(shared.members);
      run_shared(
          call, run, static_cast<int>(t % heads), prefixes,
          all.subspan(static_cast<size_t>(run.first_member), static_cast<size_t>(run.num_members)),
          memory);
    });
    begin = end;
  }
}

void run_items(const Call& call, ThreadPool& pool, AttentionWorkspace& workspace,
               const WorkspaceLayout& layout, const PrefixRows& prefixes) {
  pool.parallel_for(static_cast<int64_t>(workspace.items.size()), [&](int64_t i, int worker) {
    const WorkerMemory memory = memory_of(call, workspace, layout, worker);
    const AttentionItem& item = workspace.items[i];
    Task task(call, item, memory);
    prefixes.start(task, item, memory.total);
    for (int64_t n = 0; n < item.num_splits; ++n) {
      task.run_split(item.first_split + n, memory.split);
      task.merge_split(memory.total, memory.split);
    }
    task.write_rows(memory.total);
  });
}

// The same operations with the splits of an item on different threads.
void run_splits(const Call& call, ThreadPool& pool, AttentionWorkspace& workspace,
                const WorkspaceLayout& layout, const PrefixRows& prefixes, int64_t partials_at) {
  const AttentionItem& last = workspace.items.back();
  const int64_t num_partials = last.first_partial + last.num_splits * last.num_tokens * call.group;
  int64_t num_splits = 0;
  for (const AttentionItem& item : workspace.items) num_splits += item.num_splits;
  Cutter partial_cutter(workspace.data + partials_at);
  const PartialRows partials = take_partials(partial_cutter, num_partials, call.width());
  const auto partial_of = [&](const AttentionItem& item, int64_t n) {
    return rows_from(partials, item.first_partial + n * item.num_tokens * call.group);
  };
  // Runs of splits: a thread that stays in a sequence has its next page fetched in time.
  const int64_t run = std::max<int64_t>(1, num_splits / (kRunsPerThread * pool.num_threads()));
  workspace.runs.clear();
  for (size_t i = 0; i < workspace.items.size(); ++i) {
    for (int64_t n = 0; n < workspace.items[i].num_splits; n += run) {
      workspace.runs.push_back({static_cast<int32_t>(i), n});
    }
  }
  pool.parallel_for(static_cast<int64_t>(workspace.runs.size()), [&](int64_t t, int worker) {
    const auto [index, begin] = workspace.runs[t];
    const AttentionItem& item = workspace.items[index];
    const int64_t end = std::min(begin + run, item.num_splits);
    const WorkerMemory memory = memory_of(call, workspace, layout, worker);
    Task task(call, item, memory);
    task.read_until(item.first_split + end);
    for (int64_t n = begin; n < end; ++n) {
      // Through memory of its own: rows of neighbouring splits share cache lines.
      task.run_split(item.first_split + n, memory.split);
      task.copy_split(partial_of(item, n), memory.split);
    }
  });
  pool.parallel_for(static_cast<int64_t>(workspace.items.size()), [&](int64_t i, int worker) {
    const AttentionItem& item = workspace.items[i];
    const WorkerMemory memory = memory_of(call, workspace, layout, worker);
    const Task task(call, item, memory);
    prefixes.start(task, item, memory.total);
    for (int64_t n = 0; n < item.num_splits; ++n) {
      task.merge_split(memory.total, partial_of(item, n));
    }
    task.write_rows(memory.total);
  });
}

}  // namespace

Status attention_supports(const formats::CacheFormat& format, int head_dim,
                          int query_heads_per_kv_head) {
  static_cast<void>(format);  // every K format with every V format
  if (head_dim < 16 || head_dim > kMaxHeadDim || head_dim % 16 != 0) {
    return Error(ErrorCode::kUnsupported, "head_dim " + std::to_string(head_dim) +
                                              ": CPU attention supports multiples of 16 up to " +
                                              std::to_string(kMaxHeadDim));
  }
  if (query_heads_per_kv_head < 1 || query_heads_per_kv_head > kMaxGroup) {
    return Error(ErrorCode::kUnsupported,
                 std::to_string(query_heads_per_kv_head) +
                     " query heads per KV head: CPU attention supports 1 to " +
                     std::to_string(kMaxGroup));
  }
  return {};
}

Status attention(const AttentionArgs& args, ThreadPool& pool, CpuLevel level,
                 AttentionWorkspace& workspace) {
  const GroupView& view = *args.view;
  KVANT_TRY(check_view(view, args.group_layer));
  const WorkspaceLayout layout =
      workspace_layout(view.head_dim, view.page_tokens, pool.num_threads());
  if (workspace.data == nullptr || layout.partials_at > workspace.bytes) {
    return Error(ErrorCode::kInvalidArgument,
                 "attention needs " + std::to_string(layout.partials_at) +
                     " bytes of workspace and has " + std::to_string(workspace.bytes) +
                     ": reserve it for this geometry");
  }

  Call call{args, view, kernels_of(level), nullptr, nullptr, 1, 0, false, false, {}};
  call.k_params = view.layers[args.group_layer].k.data();
  call.v_params = view.layers[args.group_layer].v.data();
  call.group = args.params.num_query_heads / view.num_kv_heads;
  call.head_dim = view.head_dim;
  call.pre_rope = view.kinds[cache::kKindStored].k_format[args.group_layer].pre_rope;
  for (const PageKind& kind : view.kinds) {
    call.rotated_v = call.rotated_v || kind.v_format[args.group_layer].rotate;
  }
  Cutter shared(workspace.data);
  call.rope = take_pre_rope_tables(shared, view.head_dim, view.page_tokens);
  if (call.pre_rope) fill_pre_rope_tables(args.params.rope, view.page_tokens, call.rope);

  const int64_t partials_at =
      layout.partials_at + find_shared(call, pool.num_threads(), layout, workspace);
  const PrefixRows prefixes(call, layout, workspace);
  const int64_t enough = enough_items(pool.num_threads());
  int block_tokens = std::max(1, kMaxQueryRows / call.group);
  while (block_tokens * call.group > 32 && count_items(view, block_tokens) < enough) {
    block_tokens = (block_tokens + 1) / 2;
  }
  list_items(call, block_tokens, workspace);
  if (workspace.items.empty()) return {};
  const AttentionItem& last = workspace.items.back();
  const int64_t num_items = static_cast<int64_t>(workspace.items.size());
  int64_t num_splits = 0;
  for (const AttentionItem& item : workspace.items) num_splits += item.num_splits;
  const int64_t num_partials = last.first_partial + last.num_splits * last.num_tokens * call.group;
  const bool split_keys =
      pool.num_threads() > 1 && num_items < enough && num_splits > num_items &&
      partials_at + partial_bytes(num_partials, call.width()) <= workspace.bytes;
  run_shared_levels(call, pool, workspace, layout, prefixes);
  if (split_keys) {
    run_splits(call, pool, workspace, layout, prefixes, partials_at);
  } else {
    run_items(call, pool, workspace, layout, prefixes);
  }
  return {};
}

}  // namespace kvant::backend::cpu
