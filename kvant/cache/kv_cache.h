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
#include <utility>
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
  int64_t max_tokens = 0;           // that all sequences and held pages together may hold
  int64_t max_sequence_tokens = 0;  // of the longest sequence; 0: max_tokens
  int max_sequences = 1;
  int max_step_tokens = 512;  // new tokens of one step, all sequences together
  // Room for pages held outside sequences (HeldPage) where sequences alone bound the number: with
  // +sink, BF16 first pages; in each window group, runs of pages that cover a whole window.
  int64_t held_sink_pages = 0;
  int64_t held_windows = 0;
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
  int64_t held_pages_now = 0, held_bytes_now = 0;  // of HeldPage, shared with sequences or not
  // Values stored: every K and V element of every token that is still held, per sequence.
  int64_t values_now = 0;
  // Pages in use now over values_now: closed, open and sink pages with their side data and padding.
  // Pages that are only held outside sequences count as bytes without values.
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

// How much room for held pages a cache of some size gets: one sink page and one window for each so
// many of its tokens.
struct HeldShares {
  int64_t tokens_per_sink_page = 2048;
  int64_t tokens_per_window = 4096;
};
// `config` with the largest max_tokens, a multiple of page_tokens, and its shares of held pages
// whose plan_cache_bytes().total_reserved() is at most `budget_bytes`. kResourceExhausted says how
// much the smallest cache of one longest sequence needs.
Result<CacheConfig> fit_cache_bytes(const CacheConfig& config, int64_t budget_bytes,
                                    const HeldShares& shares = {});

class KvCache;

// One closed page of every layer group, held outside sequences with references of its own: what the
// prefix tree owns. Gives them back when destroyed; must not outlive its cache.
class HeldPage {
 public:
  HeldPage() = default;
  HeldPage(HeldPage&& other) noexcept { swap(other); }
  HeldPage& operator=(HeldPage&& other) noexcept {
    HeldPage(std::move(other)).swap(*this);
    return *this;
  }
  ~HeldPage();

  explicit operator bool() const { return cache_ != nullptr; }
  int64_t page() const;       // its first position is page() * page_tokens
  bool has(int group) const;  // false where it had left the group's window
  // True if neither a sequence nor another HeldPage shares the group's page.
  bool sole_holder(int group) const;
  // The slab class of the group's page (KvCache::page_class).
  int page_class(int group) const;
  // Gives a window group's page back alone.
  void drop(int group);
  // Takes over window groups' pages that it lacks and `other`, the same page, has.
  void take_missing(HeldPage& other);

 private:
  friend class KvCache;
  HeldPage(KvCache* cache, int32_t index) : cache_(cache), index_(index) {}
  void swap(HeldPage& other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(index_, other.index_);
  }
  KvCache* cache_ = nullptr;
  int32_t index_ = 0;
};

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

  // ---- slab classes: pages of one size in bytes, shared by all that have it ----
  struct PageClass {
    int64_t page_bytes = 0;
    int64_t num_pages = 0;
    int64_t free_pages = 0;
  };
  int num_page_classes() const;
  PageClass page_class(int index) const;
  // The class of a group's closed page number `page` (with +sink the first one is BF16).
  int closed_page_class(int group, int64_t page) const;
  // Pages of each class [num_page_classes] that begin_step would take for these sequences; its
  // errors other than too few free pages.
  Result<std::vector<int64_t>> needed_pages(std::span<const StepSequence> sequences) const;

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

  // ---- pages held outside sequences ----

  // Closed page number `page` of a sequence; the sequence goes on sharing it. kInvalidArgument if a
  // full-attention group does not hold it closed, kUnsupported with +recentN.
  Result<HeldPage> hold_page(SequenceId id, int64_t page);
  // Adds the window groups' pages that `held` lacks and the sequence still has.
  Status complete_page(HeldPage& held, SequenceId id);
  // Appends pages to a sequence whose length is at the first one's position, by sharing: nothing is
  // copied or allocated. They must be consecutive. Where a window group lacks a page that a later
  // query reads, begin_step fails, as after import_page. The cache is unchanged on errors.
  Status attach_pages(SequenceId id, std::span<const HeldPage* const> pages);
  // The first page of a group that a query right behind `num_pages` full pages reads.
  int64_t first_needed_page(int group, int64_t num_pages) const;
  // As export_page and import_page, without a sequence. The objects say which page it is. `layout`
  // is planar, which any reader takes, or the cache's own, which costs no conversion.
  Result<std::vector<std::byte>> export_held(const HeldPage& held, int group,
                                             const PageIdentity& identity,
                                             Layout layout = Layout::kPlanar) const;
  Result<HeldPage> import_held(std::span<const std::span<const std::byte>> objects);
  // A page object of this cache in the other of these two layouts. Thread-safe.
  Result<std::vector<std::byte>> convert_object(std::span<const std::byte> object,
                                                Layout layout) const;

 private:
  friend class HeldPage;
  KvCache() = default;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::cache
