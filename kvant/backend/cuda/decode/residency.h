// What a step's decode kernel gets of the device: how many blocks and teams, and how much lies in
// shared memory for them. The numbers behind it are measured (docs/kernels/cuda-decode.md).
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/decode/plan.h"
#include "kvant/backend/cuda/decode/variants.h"

namespace kvant::backend::cuda {

// A change of units takes a team about three microseconds, merging the results of blocks takes the
// device as much: what could be read meanwhile, for PlanShape.
inline constexpr int kChangeBytes = 16 << 10;
inline constexpr int kMergeBytes = 64 << 10;

inline constexpr int kReservedShared = 1024;  // bytes of each block's shared memory, by the system

// What a kernel is made for, less where a GPU has too little shared memory: blocks of a
// multiprocessor, teams of a block, slots of a team's ring. Nothing fits: all 0.
struct Residency {
  int blocks = 0;
  int teams = 0;
  int slots = 0;
  int slot_bytes = 0;
  int spare_slots = 0;  // of `slots`, those that are filled in the ring's first turn only
};
// `slot_bytes`: of a page or tile of 16-bit values, keys and values, or of the larger of both.
Residency residency_of(const DecodeVariant& variant, int slot_bytes);

// VariantQuery::fast_pages of a step.
int64_t fast_pages_of(const cache::GroupView& view);

// PlanShape::spare_blocks of so many blocks.
int spare_blocks_of(const DecodeVariant& variant, int num_blocks);

// Blocks of so many that a step had better leave without work; `group`: query heads per KV head.
int blocks_to_leave(const cache::GroupView& view, const DecodeVariant& variant, int group,
                    int num_blocks);

// Whether so many teams have so few pages each that the ring's first turn is a large part: then it
// keeps its spare slot.
bool has_few_pages(const DecodePlan& plan, int num_workers);

}  // namespace kvant::backend::cuda
