// Attention of the CPU backend: new tokens of every sequence against closed pages (read as stored)
// and BF16 pages, in the `cpu` layout.
//
// Work is shared out over (sequence, KV head, rows, split of kSplitTokens positions). A row's bits
// depend on its own keys only: splits and pages are those of absolute positions and are merged in
// order, so chunk sizes, batch neighbours and threads change nothing (ADR 0003). Splits that
// several sequences have in common come first, once for the rows of all of them
// (shared_prefixes.h).
#pragma once

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/attention_workspace.h"
#include "kvant/base/cpu_level.h"
#include "kvant/base/thread_pool.h"
#include "kvant/formats/spec.h"

namespace kvant::backend::cpu {

// kUnsupported names what the kernels lack: head_dim a multiple of 16 in [16, 256], G in [1, 16].
Status attention_supports(const formats::CacheFormat& format, int head_dim,
                          int query_heads_per_kv_head);

// Activations are fp32. kInvalidArgument if the view is not in `cpu` layout or the workspace is too
// small for it.
Status attention(const AttentionArgs& args, ThreadPool& pool, CpuLevel level,
                 AttentionWorkspace& workspace);

}  // namespace kvant::backend::cpu
