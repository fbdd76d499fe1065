// The paged KV cache of one engine: sequences, their pages, steps.
//
// Who calls it: the engine thread only (single-thread). It owns every page; kernels see it through
// GroupView (view.h) for the length of one step. A step is a transaction: begin_step reserves all
// it needs or fails and changes nothing; commit publishes closed pages; abort gives everything
// back.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/memory.h"
#include "kvant/base/result.h"
#include "kvant/cache/view.h"
#include "kvant/formats/plan.h"
#include "kvant/formats/spec.h"

namespace kvant::cache {

// What one layer stores per token.
struct LayerGeometry {
  int num_kv_heads = 0;
  int head_dim = 0;
  int window = 0;  // 0: full attention

  bool operator==(const LayerGeometry&) const = default;
};

// A set of layers with equal window and geometry: one page table per sequence (codecs.md section
// 5).
struct LayerGroup {
  LayerGeometry geometry;
  std::vector<int> layers;  // model layer indices, ascending
};

// Groups in order of their first layer.
std::vector<LayerGroup> make_layer_groups(std::span<const LayerGeometry> layers);

struct CacheConfig {
  std::vector<LayerGeometry> layers;
  formats::CacheFormat format;
  std::vector<formats::CacheFormat> layer_formats;  // optional: per layer; else `format` for all
  const formats::QuantPlan* plan = nullptr;         // copied from; may be null
  int page_tokens = 64;                             // 16, 32, 64 or 128
  Layout layout = Layout::kCpu;
  int64_t max_tokens = 0;  // tokens of context that all sequences together may hold
  int max_sequences = 1;
  int max_step_tokens = 512;  // new tokens of one step, all sequences together
  uint8_t fingerprint_model[32] =
      {};  // weights_id and what else of the model enters the fingerprint
};

using SequenceId = int32_t;

struct StepSequence {
  SequenceId id = 0;
  int32_t num_new_tokens = 0;
};

// Bytes by purpose; `*_now` counts pages in use, the rest what is reserved. Sums are exact: they
// are the plan that the allocator's high-water mark is compared with.
struct CacheBytes {
  int64_t stored_pages_reserved = 0, stored_pages_now = 0;
  int64_t bf16_pages_reserved = 0, bf16_pages_now = 0;  // open, sink and recent pages
  int64_t staging = 0;
  int64_t tables = 0;      // page tables, counts and lists of the pool, vectors of the plan
  int64_t tokens_now = 0;  // sum of sequence lengths
  // Values stored: every K and V element of every token that is still held, per sequence.
  int64_t values_now = 0;
  // Pages in use now over values_now: closed, open and sink pages with their side data and padding.
  double bits_per_value() const;
  // Of MemoryUse::kPages and of all uses.
  int64_t pages_reserved() const { return stored_pages_reserved + bf16_pages_reserved + staging; }
  int64_t total_reserved() const { return pages_reserved() + tables; }
};

// What create() would reserve, without reserving it: the planner's source.
Result<CacheBytes> plan_cache_bytes(const CacheConfig& config);

// The pages of one layer group in that plan; sizes of one page in bytes, all its layers together.
struct GroupBytes {
  LayerGroup group;
  int64_t stored_pages = 0, stored_page_bytes = 0;          // none if closed pages are plain BF16
  int64_t code_bytes = 0, scale_bytes = 0, mean_bytes = 0;  // of a stored page
  int64_t bf16_pages = 0, bf16_page_bytes = 0;              // open, sink and recent pages

  int64_t padding_bytes() const {
    return stored_page_bytes - code_bytes - scale_bytes - mean_bytes;
  }
};
Result<std::vector<GroupBytes>> plan_group_bytes(const CacheConfig& config);

class KvCache {
 public:
  static Result<std::unique_ptr<KvCache>> create(const CacheConfig& config, MemoryResource& memory);
  ~KvCache();

  Result<SequenceId> add_sequence();
  // A second sequence with the same content: closed pages are shared, the open page is copied when
  // either writes to it.
  Result<SequenceId> fork(SequenceId id);
  void remove_sequence(SequenceId id);
  int64_t length(SequenceId id) const;
  // Shortens to at most `length` tokens and returns how many remain: truncation into a closed page
  // drops that page (its tokens must be recomputed: codecs.md section 1). Where pages that the rest
  // needs have left a window, or are encoded and +recentN would read them in BF16, fewer remain,
  // down to none. Within the open page truncation is always exact.
  Result<int64_t> truncate(SequenceId id, int64_t length);

  // Reserves what the new tokens need. Between begin and commit/abort no other call changes the
  // cache.
  Status begin_step(std::span<const StepSequence> sequences);
  int num_groups() const;
  const LayerGroup& group(int index) const;
  // Which group a layer is in, and its index there.
  struct LayerPlace {
    int group = 0;
    int index = 0;
  };
  LayerPlace place(int layer) const;
  // Valid until commit or abort.
  const GroupView& view(int group) const;
  void commit_step();
  void abort_step();

  CacheBytes bytes() const;
  const CacheConfig& config() const;
  // Every page is referenced as often as tables say, free lists are disjoint, lengths fit:
  // kInternal names the first violation.
  Status check_integrity() const;

  // First 16 bytes of SHA-256 over canonical JSON (codecs.md section 5).
  std::span<const uint8_t, 16> fingerprint() const;

  // A closed page as a stored page object (planar layout), and back: the page file of disk, remote
  // and `kvant inspect`. import_page appends the page to a sequence whose length is at its first
  // position.
  struct PageIdentity {
    uint8_t key[32];
    uint8_t parent_key[32];
    std::span<const uint32_t> token_ids;
  };
  Result<std::vector<std::byte>> export_page(SequenceId id, int group, int64_t page,
                                             const PageIdentity& identity) const;
  // All groups' objects of one page index; a window group's may be empty where no later query reads
  // it (begin_step fails if one does). kCorruptData or kInvalidArgument if one does not match,
  // kUnsupported with +recentN, kResourceExhausted without free pages; the cache is unchanged then.
  Status import_page(SequenceId id, std::span<const std::span<const std::byte>> objects);

 private:
  KvCache() = default;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::cache
