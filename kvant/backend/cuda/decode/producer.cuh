// The producer: walks a worker's pages and keeps its ring full. One thread per team.
#pragma once

#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/decode/ring.cuh"
#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

// With Shape::kPreRope a page's angles lie at the end of the slot of its keys.
template <typename Shape>
class Producer {
  static constexpr bool kTakesSteps = Shape::kSlotsTakeSteps;
  static constexpr uint32_t kTileBytes = 16 * Shape::kHeadDim * 2;  // of keys or of values

 public:
  __device__ Producer(const DecodeParams& params, const Ring<kTakesSteps>& ring, int worker)
      : params_(params),
        ring_(ring),
        start_(params.workers + worker),
        segment_(&start_->segment),
        segments_left_(start_->num_segments) {
    if (active()) enter_segment();
  }

  __device__ bool active() const { return segments_left_ > 0; }

  // The next slot is empty: every warp of the team has read it, or it is used the first time.
  __device__ bool slot_is_empty() const {
    return ptx::mbarrier_test_wait(ring_.empty(ring_.next), ring_.next.parity ^ 1);
  }

  // Until the next slot is empty, with `spare_slots` = 1 the one after it, too.
  __device__ void wait_for_slot(int spare_slots) const {
    const Slot slot = spare_slots == 0 ? ring_.next : ring_.after_next();
    ptx::mbarrier_wait(ring_.empty(slot), slot.parity ^ 1);
  }

  // Starts the copies of the next slot.
  __device__ void issue() {
    const Slot slot = ring_.take();
    const bool keys = kTakesSteps || !values_are_next_;
    const bool values = kTakesSteps || values_are_next_;
    const uint32_t k_bytes = by_tile_ ? kTileBytes : params_.stored.k_bytes;
    const uint32_t v_bytes = by_tile_ ? kTileBytes : params_.stored.v_bytes;
    const int v_start =
        by_tile_ ? params_.page_tokens * Shape::kHeadDim * 2 : params_.stored.v_start;
    const std::byte* source = unit_;
    if (by_tile_) source += tile_ * static_cast<int64_t>(kTileBytes);
    const uint32_t target = ptx::shared_address(ring_.data(slot));
    const uint32_t barrier = ring_.full(slot);
    uint32_t bytes = (keys ? k_bytes : 0) + (values ? v_bytes : 0);
    if (keys) ring_.info(slot) = info();
    if constexpr (Shape::kPreRope) {
      const uint32_t row = keys ? params_.pre_rope.row_bytes : 0;
      bytes += row;
      ptx::begin_copies(barrier, bytes);
      if (keys)
        ptx::bulk_copy(target + params_.slot_bytes - row,
                       reinterpret_cast<const std::byte*>(params_.pre_rope.pages) +
                           position_ / params_.page_tokens * static_cast<int64_t>(row),
                       row, barrier, ptx::policy_evict_last());
    } else {
      ptx::begin_copies(barrier, bytes);
    }
    if (kTakesSteps && v_start == static_cast<int>(k_bytes)) {
      ptx::bulk_copy(target, source, k_bytes + v_bytes, barrier, ptx::policy_evict_first());
    } else {
      if (keys) ptx::bulk_copy(target, source, k_bytes, barrier, ptx::policy_evict_first());
      if (values)
        ptx::bulk_copy(target + (keys ? k_bytes : 0), source + v_start, v_bytes, barrier,
                       ptx::policy_evict_first());
    }
    ptx::end_copies(barrier);
    if constexpr (!kTakesSteps) {
      values_are_next_ = !values_are_next_;
      if (values_are_next_) return;
    }
    if (++tile_ == num_tiles_) next_page();
  }

 private:
  __device__ int page_number(int index) const {
    return index < segment_->num_sink_pages
               ? index
               : segment_->first_page + index - segment_->num_sink_pages;
  }
  __device__ uint32_t entry(int index) const {
    const int nth = index - segment_->page_begin;
    if (segment_ == &start_->segment && nth < kStartEntries) return start_->entries[nth];
    const int page = page_number(index);
    const int base =
        page >= segment_->first_bf16_page ? segment_->bf16_entries : segment_->stored_entries;
    return params_.entries[base + page];
  }

  // Pages of a run need no look at the segment: up to run_end_ its list has consecutive stored
  // pages, old, seen by every query, and not the last. From run_begin_ on their entries are read
  // from the table, before that from the worker's record.
  __device__ void enter_segment() {
    index_ = segment_->page_begin;
    run_begin_ = index_ + (segment_ == &start_->segment ? kStartEntries : 0);
    run_end_ = 0;
    if (segment_->num_sink_pages == 0 && params_.window == 0 && !params_.stored_by_tile) {
      const int first = segment_->first_page;
      run_end_ = min(segment_->page_end - 1,
                     min(segment_->first_bf16_page, segment_->first_new_page) - first);
      run_entries_ = params_.entries + segment_->stored_entries + first;
      const PageSlab& slab = params_.slabs[cache::kKindStored];
      run_base_ = slab.base + segment_->kv_head * slab.unit_bytes;
    }
    next_entry_ = entry(index_);
    after_next_ = index_ + 1 < segment_->page_end ? entry(index_ + 1) : 0;
    enter_page();
  }

  __device__ void next_page() {
    ++index_;
    if (index_ < run_end_ && (next_entry_ & 0xff) == cache::kKindStored) {
      enter_page_of_run();
    } else if (index_ < segment_->page_end) {
      enter_page();
    } else if (--segments_left_ > 0) {
      segment_ = segment_ == &start_->segment ? params_.segments + start_->first_segment + 1
                                              : segment_ + 1;
      enter_segment();
    }
  }

  // Reads the entry of the page after the next: no copy must wait for the table.
  __device__ uint32_t take_entry() {
    const uint32_t entry_now = next_entry_;
    next_entry_ = after_next_;
    const int index = index_ + 2;
    if (index >= run_begin_ && index < run_end_) {
      after_next_ = run_entries_[index];
    } else if (index < segment_->page_end) {
      after_next_ = entry(index);
    }
    return entry_now;
  }

  __device__ void enter_page_of_run() {
    unit_ = run_base_ +
            static_cast<int64_t>(take_entry() >> 8) * params_.slabs[cache::kKindStored].page_bytes;
    position_ += params_.page_tokens;
    in_run_ = true;
    by_tile_ = is_f16_ = false;
    tile_ = 0;
    num_tiles_ = 1;
  }

  __device__ void enter_page() {
    const uint32_t entry_now = take_entry();
    const int page = page_number(index_);
    if (page >= segment_->first_new_page && !waited_ &&
        !params_.beside_shared) {  // written by the kernels before this one
      ptx::wait_prerequisites();
      waited_ = true;
    }
    const uint32_t kind = entry_now & 0xff;
    const PageSlab& slab = params_.slabs[kind];
    unit_ = slab.base + static_cast<int64_t>(entry_now >> 8) * slab.page_bytes +
            segment_->kv_head * slab.unit_bytes;
    const bool stored = kind == cache::kKindStored;
    position_ = page * params_.page_tokens;
    in_run_ = false;
    by_tile_ = !stored || params_.stored_by_tile;
    is_f16_ = stored && params_.stored_is_f16;
    tile_ = 0;
    num_tiles_ = 1;
    if (by_tile_) {
      const int last_query = segment_->first_position + segment_->num_tokens - 1;
      num_tiles_ = (min(params_.page_tokens - 1, last_query - position_) + 16) / 16;
    }
  }

  __device__ SlotInfo info() const {
    if (in_run_) return {0, position_};
    const int tokens = by_tile_ ? 16 : params_.page_tokens;
    const int first = position_ + (by_tile_ ? tile_ * 16 : 0);
    const int last_query = segment_->first_position + segment_->num_tokens - 1;
    int flags = (by_tile_ ? kStepIsTile : 0) | (is_f16_ ? kStepIsF16 : 0) | tile_ << kStepTileShift;
    if (first + tokens - 1 > segment_->first_position ||
        (params_.window > 0 && first <= last_query - params_.window))
      flags |= kStepIsMasked;
    if (index_ + 1 == segment_->page_end && tile_ + 1 == num_tiles_) flags |= kStepIsLast;
    return {flags, first};
  }

  const DecodeParams& params_;
  Ring<kTakesSteps> ring_;
  const WorkerStart* start_;
  const Segment* segment_;
  int segments_left_;
  const std::byte* unit_ = nullptr;
  const uint32_t* run_entries_ = nullptr;
  const std::byte* run_base_ = nullptr;
  uint32_t next_entry_ = 0;
  uint32_t after_next_ = 0;
  int index_ = 0;
  int run_begin_ = 0;
  int run_end_ = 0;
  int position_ = 0;
  int tile_ = 0;
  int num_tiles_ = 0;  // 1 for a page that is read as a whole
  bool values_are_next_ = false;
  bool in_run_ = false;
  bool by_tile_ = false;
  bool is_f16_ = false;
  bool waited_ = false;
};

}  // namespace kvant::backend::cuda
