// Append and close of the CPU backend: rows enter BF16 pages, full pages are encoded.
#pragma once

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/attention_workspace.h"
#include "kvant/base/cpu_level.h"
#include "kvant/base/thread_pool.h"

namespace kvant::backend::cpu {

// Rounds the new rows (fp32) to BF16 into their pages, with +strict after a pass through the codec,
// then encodes the pages of view.closes in the page layout of their kind. Counts every new value
// that is not finite once; the caller fails the step if there is one. All levels give the same
// bits.
Result<formats::EncodeStats> append(const AppendArgs& args, ThreadPool& pool, CpuLevel level,
                                    AttentionWorkspace& workspace);

}  // namespace kvant::backend::cpu
