// The producer: walks a worker's pages and keeps its ring full. One lane per team.
#pragma once

#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/decode/ring.cuh"
#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

// `kPreRope`: a page's angles follow its keys, at the end of their slot.
template <bool kPreRope>
class Producer {
 public:
  __device__ Producer(const DecodeParams& params, const Ring& ring, int worker, int head_dim)
      : params_(params),
        ring_(ring),
        head_dim_(head_dim),
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

  // Starts the copy of the next step.
  __device__ void issue() {
    const Slot slot = ring_.take();
    const bool values = (part_ & 1) != 0;
    const std::byte* source = unit_;
    uint32_t bytes;
    if (by_tile_) {
      bytes = static_cast<uint32_t>(16 * head_dim_ * 2);
      source += (part_ >> 1) * static_cast<int64_t>(bytes);
      if (values) source += static_cast<int64_t>(params_.page_tokens) * head_dim_ * 2;
    } else {
      bytes = static_cast<uint32_t>(values ? params_.stored.v_bytes : params_.stored.k_bytes);
      if (values) source += params_.stored.v_start;
    }
    if (!values) ring_.info(slot) = info();
    if constexpr (kPreRope) {
      const auto row = static_cast<uint32_t>(values ? 0 : params_.pre_rope.row_bytes);
      ptx::begin_copies(ring_.full(slot), bytes + row);
      if (row > 0)
        ptx::bulk_copy(ptx::shared_address(ring_.data(slot)) + params_.slot_bytes - row,
                       reinterpret_cast<const std::byte*>(params_.pre_rope.pages) +
                           position_ / params_.page_tokens * static_cast<int64_t>(row),
                       row, ring_.full(slot), ptx::policy_evict_last());
    } else {
      ptx::begin_copies(ring_.full(slot), bytes);
    }
    ptx::bulk_copy(ptx::shared_address(ring_.data(slot)), source, bytes, ring_.full(slot),
                   ptx::policy_evict_first());
    ptx::end_copies(ring_.full(slot));
    if (++part_ == num_parts_) next_page();
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

  __device__ void enter_segment() {
    index_ = segment_->page_begin;
    next_entry_ = entry(index_);
    enter_page();
  }

  __device__ void next_page() {
    if (++index_ < segment_->page_end) {
      enter_page();
    } else if (--segments_left_ > 0) {
      segment_ = segment_ == &start_->segment ? params_.segments + start_->first_segment + 1
                                              : segment_ + 1;
      enter_segment();
    }
  }

  // Reads the following page's entry early: the copy must not wait for the table.
  __device__ void enter_page() {
    const uint32_t entry_now = next_entry_;
    if (index_ + 1 < segment_->page_end) next_entry_ = entry(index_ + 1);
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
    by_tile_ = !stored || params_.stored_by_tile;
    is_f16_ = stored && params_.stored_is_f16;
    part_ = 0;
    num_parts_ = 2;
    if (by_tile_) {
      const int last_query = segment_->first_position + segment_->num_tokens - 1;
      num_parts_ = min(params_.page_tokens, (last_query - position_) / 16 * 16 + 16) / 8;
    }
  }

  __device__ SlotInfo info() const {
    const int tokens = by_tile_ ? 16 : params_.page_tokens;
    const int first = position_ + (by_tile_ ? (part_ >> 1) * 16 : 0);
    const int last_query = segment_->first_position + segment_->num_tokens - 1;
    int flags =
        (by_tile_ ? kStepIsTile : 0) | (is_f16_ ? kStepIsF16 : 0) | (part_ >> 1) << kStepTileShift;
    if (first + tokens - 1 > segment_->first_position ||
        (params_.window > 0 && first <= last_query - params_.window))
      flags |= kStepIsMasked;
    if (index_ + 1 == segment_->page_end && part_ + 2 == num_parts_) flags |= kStepIsLast;
    return {flags, first};
  }

  const DecodeParams& params_;
  Ring ring_;
  const int head_dim_;
  const WorkerStart* start_;
  const Segment* segment_;
  int segments_left_;
  const std::byte* unit_ = nullptr;
  uint32_t next_entry_ = 0;
  int index_ = 0;
  int position_ = 0;
  int part_ = 0;
  int num_parts_ = 0;
  bool by_tile_ = false;
  bool is_f16_ = false;
  bool waited_ = false;
};

}  // namespace kvant::backend::cuda
