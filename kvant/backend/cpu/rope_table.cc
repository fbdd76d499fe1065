#include "kvant/backend/cpu/rope_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvant/base/check.h"

namespace kvant::backend::cpu {
namespace {

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

int64_t slot_bytes(int64_t max_rows, int head_dim) {
  const int64_t half = head_dim / 2;
  return round_up(half * int64_t{sizeof(double)}, 64) +
         round_up(half * int64_t{sizeof(float)}, 64) +
         round_up(max_rows * int64_t{sizeof(int64_t)}, 64) +
         round_up(max_rows * head_dim * int64_t{sizeof(float)}, 64);
}

}  // namespace

int64_t RopeTables::workspace_bytes(int64_t max_rows, int head_dim) {
  return kNumSlots * slot_bytes(max_rows, head_dim);
}

void RopeTables::set_workspace(uint8_t* workspace, int64_t max_rows, int head_dim) {
  max_rows_ = max_rows;
  head_dim_ = head_dim;
  const int64_t half = head_dim / 2;
  for (Slot& slot : slots_) {
    slot = Slot();
    slot.frequencies = reinterpret_cast<double*>(workspace);
    workspace += round_up(half * int64_t{sizeof(double)}, 64);
    slot.factors = reinterpret_cast<float*>(workspace);
    workspace += round_up(half * int64_t{sizeof(float)}, 64);
    slot.positions = reinterpret_cast<int64_t*>(workspace);
    workspace += round_up(max_rows * int64_t{sizeof(int64_t)}, 64);
    slot.table = reinterpret_cast<float*>(workspace);
    workspace += round_up(max_rows * head_dim * int64_t{sizeof(float)}, 64);
  }
}

void RopeTables::compute_frequencies(const attention::RopeParams& rope, double* frequencies) {
  for (int i = 0; i < rope.rotary_dim / 2; ++i) {
    double frequency = std::pow(static_cast<double>(rope.base), -2.0 * i / rope.rotary_dim) *
                       static_cast<double>(rope.position_scale);
    if (rope.frequency_factors != nullptr)
      frequency /= static_cast<double>(rope.frequency_factors[i]);
    frequencies[i] = frequency;
  }
}

void RopeTables::compute(const attention::RopeParams& rope, int64_t position,
                         const double* frequencies, float* cos_sin) {
  const int half = rope.rotary_dim / 2;
  const double factor = static_cast<double>(rope.attention_factor);
  for (int i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    cos_sin[i] = static_cast<float>(factor * std::cos(angle));
    cos_sin[half + i] = static_cast<float>(factor * std::sin(angle));
  }
}

bool RopeTables::same_setting(const Slot& slot, const attention::RopeParams& rope) {
  if (slot.num_rows == 0) return false;
  if (slot.rope.rotary_dim != rope.rotary_dim || slot.rope.base != rope.base ||
      slot.rope.position_scale != rope.position_scale ||
      slot.rope.attention_factor != rope.attention_factor ||
      slot.has_factors != (rope.frequency_factors != nullptr)) {
    return false;
  }
  return !slot.has_factors ||
         std::equal(slot.factors, slot.factors + rope.rotary_dim / 2, rope.frequency_factors);
}

void RopeTables::assign(Slot& slot, const attention::RopeParams& rope) {
  slot.rope = rope;
  slot.has_factors = rope.frequency_factors != nullptr;
  if (slot.has_factors) {
    std::copy_n(rope.frequency_factors, rope.rotary_dim / 2, slot.factors);
  }
  compute_frequencies(rope, slot.frequencies);
  slot.num_rows = 0;
}

const float* RopeTables::get(const attention::RopeParams& rope, const int64_t* positions,
                             int64_t num_rows) {
  KVANT_CHECK(num_rows <= max_rows_ && rope.rotary_dim <= head_dim_ && rope.rotary_dim % 2 == 0,
              "reserve_workspace covers the rows and the head dimension of rope");
  Slot* slot = nullptr;
  for (Slot& candidate : slots_) {
    if (same_setting(candidate, rope)) slot = &candidate;
  }
  if (slot == nullptr) {
    slot = std::min_element(slots_, slots_ + kNumSlots,
                            [](const Slot& a, const Slot& b) { return a.last_use < b.last_use; });
    assign(*slot, rope);
  }
  slot->last_use = ++clock_;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (row < slot->num_rows && slot->positions[row] == positions[row]) continue;
    slot->positions[row] = positions[row];
    compute(rope, positions[row], slot->frequencies, slot->table + row * rope.rotary_dim);
  }
  slot->num_rows = std::max(slot->num_rows, num_rows);
  return slot->table;
}

}  // namespace kvant::backend::cpu
