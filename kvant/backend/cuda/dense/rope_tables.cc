#include "kvant/backend/cuda/dense/rope_tables.h"

#include <algorithm>

#include "kvant/backend/cuda/dense/operators.h"
#include "kvant/base/check.h"

namespace kvant::backend::cuda {
namespace {

int64_t round_up(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

bool same(const attention::RopeParams& a, const attention::RopeParams& b) {
  return a.rotary_dim == b.rotary_dim && a.base == b.base && a.position_scale == b.position_scale &&
         a.frequency_factors == b.frequency_factors && a.attention_factor == b.attention_factor;
}

}  // namespace

int64_t RopeTables::workspace_bytes(int64_t max_rows, int head_dim) {
  return kNumSlots * (round_up(max_rows * int64_t{sizeof(int64_t)}) +
                      round_up(max_rows * head_dim * int64_t{sizeof(float)}));
}

void RopeTables::set_workspace(std::byte* workspace, int64_t max_rows, int head_dim) {
  max_rows_ = max_rows;
  head_dim_ = head_dim;
  for (Slot& slot : slots_) {
    slot = Slot();
    slot.device_positions = reinterpret_cast<int64_t*>(workspace);
    workspace += round_up(max_rows * int64_t{sizeof(int64_t)});
    slot.table = reinterpret_cast<float*>(workspace);
    workspace += round_up(max_rows * head_dim * int64_t{sizeof(float)});
  }
}

Result<const float*> RopeTables::get(const attention::RopeParams& rope,
                                     std::span<const int64_t> positions, UploadRing& ring,
                                     cudaStream_t stream) {
  const auto num_rows = static_cast<int64_t>(positions.size());
  KVANT_CHECK(num_rows <= max_rows_ && rope.rotary_dim <= head_dim_ && rope.rotary_dim % 2 == 0,
              "reserve_workspace covers the rows and the head dimension of rope");
  for (Slot& slot : slots_) {
    if (same(slot.rope, rope) && std::ranges::equal(slot.positions, positions)) {
      slot.last_use = ++clock_;
      return slot.table;
    }
  }
  Slot& slot = *std::min_element(slots_, slots_ + kNumSlots, [](const Slot& a, const Slot& b) {
    return a.last_use < b.last_use;
  });
  slot.positions.clear();  // nothing holds if what follows fails
  KVANT_TRY(ring.upload(slot.device_positions, positions.data(),
                        num_rows * int64_t{sizeof(int64_t)}, stream));
  KVANT_TRY(rope_table(rope, slot.device_positions, num_rows, slot.table, stream));
  slot.rope = rope;
  slot.positions.assign(positions.begin(), positions.end());
  slot.last_use = ++clock_;
  return slot.table;
}

}  // namespace kvant::backend::cuda
