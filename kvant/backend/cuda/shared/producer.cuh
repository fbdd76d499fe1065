// The producers of the shared-prefix kernel: a lane that copies pages as stored to a ring, warps
// that turn each into FP16 images.
#pragma once

#include "kvant/backend/cuda/shared/dequantise.cuh"
#include "kvant/backend/cuda/shared/shape.cuh"

namespace kvant::backend::cuda {

// Walks the block's pages and starts their copies; one lane.
class SharedCopies {
 public:
  __device__ SharedCopies(const SharedParams& params, uint32_t barriers, uint32_t ring)
      : params_(params),
        start_(params.starts[blockIdx.x]),
        barriers_(barriers),
        ring_(ring),
        items_left_(start_.num_items) {
    if (!active()) return;
    enter(start_.item);
    next_entry_ = start_.entries[0];
  }
  __device__ bool active() const { return items_left_ > 0; }

  __device__ void issue() {
    const uint32_t entry = next_entry_;
    const std::byte* unit = params_.stored.base +
                            static_cast<int64_t>(entry >> 8) * params_.stored.page_bytes +
                            kv_head_ * params_.stored.unit_bytes;
    next_page();  // reads the next entry: it arrives while this page is copied
    ptx::mbarrier_wait(barriers_ + 8 * (kRawEmpty + slot_.index), slot_.parity ^ 1);
    const uint32_t full = barriers_ + 8 * (kRawFull + slot_.index);
    const auto bytes = static_cast<uint32_t>(params_.page_bytes);
    ptx::begin_copies(full, bytes);
    bulk_copy(ring_ + slot_.index * params_.page_bytes, unit, params_.page_bytes, full);
    slot_.advance(params_.num_slots);
  }

 private:
  __device__ void enter(const SharedItem& item) {
    kv_head_ = item.kv_head;
    entry_ = item.first_entry;
    pages_left_ = item.num_pages;
  }
  __device__ void next_page() {
    ++entry_;
    ++nth_;
    if (--pages_left_ == 0) {
      if (--items_left_ == 0) return;
      enter(params_.items[start_.first_item + start_.num_items - items_left_]);
      nth_ = kSharedStartEntries;
    }
    next_entry_ = nth_ < kSharedStartEntries ? start_.entries[nth_] : params_.entries[entry_];
  }

  const SharedParams& params_;
  const SharedStart& start_;
  const uint32_t barriers_;
  const uint32_t ring_;
  int items_left_;
  int kv_head_ = 0;
  int entry_ = 0;
  int nth_ = 0;  // page of the block's first item
  int pages_left_ = 0;
  uint32_t next_entry_ = 0;
  SharedSlot slot_;
};

__device__ __forceinline__ int pages_of_item(const SharedParams& params, const SharedStart& start,
                                             int i) {
  return i == 0 ? start.item.num_pages : params.items[start.first_item + i].num_pages;
}

template <typename Shape>
__device__ __forceinline__ void produce_images(const SharedParams& params, std::byte* shared,
                                               int warp, int lane) {
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t bars = base + Shape::kBarriers;
  const SharedStart& start = params.starts[blockIdx.x];
  SharedCopies copies(params, bars, base + Shape::kRing);
  const bool is_copier = warp == 0 && lane == 0;
  if (is_copier) {
    for (int i = 0; i < params.num_slots && copies.active(); ++i) copies.issue();
  }
  std::byte* reference = shared + Shape::kReferences + warp * Shape::kHeadDim * 4;
  const auto arrive = [&](int barrier) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(bars + 8 * barrier);
  };
  SharedSlot slot, stage;
  bool is_first = true;
  for (int i = 0; i < start.num_items; ++i) {
    const int num_pages = pages_of_item(params, start, i);
    for (int page = 0; page < num_pages; ++page) {
      const std::byte* unit = shared + Shape::kRing + slot.index * params.page_bytes;
      const uint32_t images = base + stage.index * (2 * Shape::kSideBytes);
      __syncwarp();
      ptx::mbarrier_wait(bars + 8 * (kRawFull + slot.index), slot.parity);
      if constexpr (is_channel(Shape::kKey)) {
        if (page == 0) {
          for (int at = lane * 16; at < Shape::kHeadDim * 4; at += 512) {
            *reinterpret_cast<uint4*>(reference + at) =
                *reinterpret_cast<const uint4*>(unit + params.sections.k_scales + at);
          }
          __syncwarp();
        }
      }
      KeyTile<Shape::kKey, Shape::kHeadDim> keys;
      keys.load(unit, params.sections, reference, warp, lane);
      ptx::mbarrier_wait(bars + 8 * (kSharedKeysEmpty + stage.index), stage.parity ^ 1);
      keys.write(TileTarget<true>(images, warp, lane));
      fence_async_shared();
      arrive(kSharedKeysFull + stage.index);
      ValueTile<Shape::kValue, Shape::kHeadDim> values;
      values.load(unit + params.sections.v_start, params.sections, warp, lane);
      arrive(kRawEmpty + slot.index);
      ptx::mbarrier_wait(bars + 8 * (kSharedValuesEmpty + stage.index), stage.parity ^ 1);
      values.write(TileTarget<false>(images + Shape::kSideBytes, warp, lane));
      fence_async_shared();
      arrive(kSharedValuesFull + stage.index);
      slot.advance(params.num_slots);
      stage.advance(Shape::kStages);
      // A page late, so that the other warps need not be waited for.
      if (is_copier && !is_first && copies.active()) copies.issue();
      is_first = false;
    }
  }
}

}  // namespace kvant::backend::cuda
