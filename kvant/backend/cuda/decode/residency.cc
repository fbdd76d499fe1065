#include "kvant/backend/cuda/decode/residency.h"

#include <algorithm>

#include "kvant/backend/cuda/decode/kernel_params.h"
#include "kvant/backend/cuda/device.h"

namespace kvant::backend::cuda {
namespace {

// Slots of a ring whose slots take half a step. Where they take whole steps (ring.cuh): bytes of a
// multiprocessor that are on their way beside the steps in work. With more of either the
// multiprocessors drift apart, and the last one counts.
constexpr int kHalfSlots = 3;
constexpr int kBytesAhead = 36 << 10;
// Pages of a team up to which its ring keeps the slot that it has for the first turn.
constexpr int kFewPages = 16;
// Of so many blocks one may go without work where units then are not cut, or only between blocks.
constexpr int kBlocksToSpare = 16;
// With few pages and few units of more than four query rows, steps are faster if one block of so
// many has no work: each reads its queries, and leaves a result to merge, for more pages then.
constexpr int kBlocksToLeave = 11;
constexpr int kFewUnits = 32;
constexpr int kFewRows = 4;

// Whether fewer blocks than there are can keep the memory busy: on an H100, not on an H200.
bool has_blocks_to_spare() {
  return device_traits().level == DeviceLevel::kHopper && !device_traits().fast_memory;
}

int64_t num_pages_of(const cache::GroupView& view) {
  int64_t pages = 0;
  for (const cache::SequenceView& sequence : view.sequences) {
    const int64_t tokens = sequence.first_position + sequence.num_new_tokens;
    pages += (tokens + view.page_tokens - 1) / view.page_tokens - sequence.first_page;
  }
  return pages * view.num_kv_heads;
}

Residency most_teams(const DecodeVariant& variant, int slot_bytes, int wanted_slots) {
  // The ring takes a result of the team when its last segment ends.
  const int result_bytes = variant.max_rows * (variant.head_dim + 4) * 4;
  Residency best;
  best.slot_bytes = slot_bytes;
  for (int blocks = variant.blocks; blocks > 0; --blocks) {
    const int memory =
        device_traits().shared_per_sm / blocks - kReservedShared - variant.fixed_bytes;
    for (int teams = variant.teams; blocks * teams > best.blocks * best.teams; --teams) {
      const int slots = std::min(wanted_slots, (memory / teams - variant.team_bytes) / slot_bytes);
      if (slots >= 2 && slots * slot_bytes >= result_bytes) {
        best.blocks = blocks;
        best.teams = teams;
        best.slots = slots;
      }
    }
  }
  return best;
}

// Slots that are full or on their way at a time, once a ring has been full the first time.
int slots_ahead(const DecodeVariant& variant, int slot_bytes) {
  if (!variant.slots_take_steps) return kHalfSlots;
  return std::clamp(1 + kBytesAhead / (variant.blocks * variant.teams * slot_bytes), 2, kMaxSlots);
}

}  // namespace

// The first turn, which fills the ring before there are queries, has a slot more. Only Hopper's
// producers leave it empty later (kernel.cuh).
Residency residency_of(const DecodeVariant& variant, int slot_bytes) {
  const int ahead = slots_ahead(variant, slot_bytes);
  const bool has_spare = variant.slots_take_steps && device_traits().level == DeviceLevel::kHopper;
  const int wanted = std::min(ahead + (has_spare ? 1 : 0), kMaxSlots);
  Residency residency = most_teams(variant, slot_bytes, wanted);
  residency.spare_slots = std::max(residency.slots - ahead, 0);
  return residency;
}

int64_t fast_pages_of(const cache::GroupView& view) {
  return device_traits().fast_memory ? num_pages_of(view) / device_traits().num_sms : kNotFast;
}

// Not for keys of fewer than 4 bits or before RoPE: their work for each byte is so much that every
// block counts.
int spare_blocks_of(const DecodeVariant& variant, int num_blocks) {
  const bool counts = variant.pre_rope || variant.key == KeyKernel::kInt3Channel ||
                      variant.key == KeyKernel::kInt2Channel;
  return counts || !has_blocks_to_spare() ? 0 : num_blocks / kBlocksToSpare;
}

int blocks_to_leave(const cache::GroupView& view, const DecodeVariant& variant, int group,
                    int num_blocks) {
  if (variant.max_rows > 8 || !has_blocks_to_spare()) return 0;
  int tokens = 0, most = 0;
  for (const cache::SequenceView& sequence : view.sequences) {
    tokens += sequence.num_new_tokens;
    most = std::max(most, sequence.num_new_tokens);
  }
  const bool few = tokens * view.num_kv_heads <= kFewUnits &&
                   num_pages_of(view) <= int64_t{kFewPages} * num_blocks * variant.teams;
  return few && most * group > kFewRows ? num_blocks / kBlocksToLeave : 0;
}

bool has_few_pages(const DecodePlan& plan, int num_workers) {
  int64_t pages = 0;
  for (const Segment& segment : plan.segments) pages += segment.page_end - segment.page_begin;
  return pages <= int64_t{kFewPages} * num_workers;
}

}  // namespace kvant::backend::cuda
