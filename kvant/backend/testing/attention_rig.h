// Drives append and attention over a real KvCache in tests: every query, key and value is a
// function of sequence, layer, head, position and channel, so that the same token can be computed
// in any chunk, batch and number of threads, and compared with the exact reference.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvant/attention/problem.h"
#include "kvant/backend/cpu/attention_workspace.h"
#include "kvant/base/cpu_level.h"
#include "kvant/base/thread_pool.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/formats/plan.h"

namespace kvant::backend::testing {

// Host memory that starts as 0xff bytes, NaN in every float format: reading what was never written
// shows in the result.
class PoisonedMemory final : public MemoryResource {
 public:
  explicit PoisonedMemory(bool poison) : poison_(poison) {}
  Result<void*> allocate(int64_t bytes, MemoryUse use) override;
  void deallocate(void* pointer, int64_t bytes, MemoryUse use) override;
  MemoryStats stats() const override { return memory_.stats(); }
  void copy(void* target, const void* source, int64_t bytes) override;

 private:
  const bool poison_;
  HostMemory memory_;
};

struct RigOptions {
  const char* kv = "bf16";
  int num_layers = 2;
  int num_kv_heads = 2;
  int group = 2;  // query heads per KV head
  int head_dim = 64;
  int window = 0;
  int odd_window = -1;  // window of odd layers; -1: `window`
  int mask_window =
      0;  // window that only attention knows: the cache keeps all pages; 0: the cache's
  int page_tokens = 32;
  int64_t max_tokens = 4096;
  int max_sequences = 4;
  int num_sequences = 4;  // at the start; forks add to them
  int max_step_tokens = 4096;
  int num_threads = 1;
  CpuLevel level = CpuLevel::kScalar;
  attention::AttentionParams params;  // heads and scale are filled in
  bool compare_with_reference = true;
  bool scalar_append = false;  // the oracle instead of the CPU operator
  bool poison = true;          // pages start as NaN
};

struct Chunk {
  int sequence = 0;
  int num_tokens = 0;
};

class AttentionRig {
 public:
  explicit AttentionRig(const RigOptions& options);
  ~AttentionRig();

  // One step of the cache with these chunks, all layers. Fails the current test on any error.
  void step(std::span<const Chunk> batch);
  void step(std::initializer_list<Chunk> batch) { step(std::span(batch.begin(), batch.size())); }
  // Extends one sequence to `length` in chunks of `chunk` tokens.
  void extend(int sequence, int64_t length, int chunk);
  void truncate(int sequence, int64_t length);
  // A new sequence with the content of another; returns its index.
  int fork(int sequence);
  // From now on its tokens are those of another content, which differ from any sequence's so far.
  void diverge(int sequence, int content) { content_[sequence] = content; }
  // The first pages of another rig's sequence, as page objects, into an empty sequence of the same
  // index. Its outputs of those tokens are copied. kUnsupported with +recentN.
  Status load_pages(const AttentionRig& from, int sequence, int64_t num_pages);

  int64_t length(int sequence) const { return length_[sequence]; }
  // Outputs of a sequence, [layer][position][query head][channel].
  const std::vector<float>& outputs(int sequence, int layer) const {
    return outputs_[sequence * options_.num_layers + layer];
  }
  // Largest relative L2 error of a layer's rows of one step against the reference.
  double worst_error() const { return worst_error_; }
  // Every byte of the units that the sequence's page table names, after an empty step.
  std::vector<std::byte> page_bytes(int sequence);

  cache::KvCache& cache() { return *cache_; }
  const cpu::AttentionWorkspace& workspace() const { return workspace_; }

 private:
  void run_layer(int layer, std::span<const Chunk> batch);
  void fill_rows(int layer, std::span<const Chunk> batch, int kind, int heads,
                 std::vector<float>& rows) const;

  RigOptions options_;
  PoisonedMemory memory_;
  formats::QuantPlan plan_;
  std::unique_ptr<cache::KvCache> cache_;
  std::vector<cache::SequenceId> ids_;
  std::vector<int64_t> length_;
  std::vector<int> content_;  // which sequence's values it holds: forks share
  std::vector<std::vector<float>> outputs_;
  ThreadPool pool_;
  Buffer workspace_buffer_;
  cpu::AttentionWorkspace workspace_;
  double worst_error_ = 0.0;
};

}  // namespace kvant::backend::testing
