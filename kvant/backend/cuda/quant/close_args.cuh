// What the kernels that append and close are given: plain data, passed by value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvant/backend/cuda/append_items.h"
#include "kvant/backend/cuda/page_map.h"
#include "kvant/formats/spec.h"

namespace kvant::backend::cuda::quant {

// formats::SideParams in device memory.
struct DeviceSideParams {
  float global_scale;
  const float* bias;    // [head_dim] or null
  const float* smooth;  // [head_dim] or null
};

// A page kind as one layer sees it.
struct DeviceKind {
  std::byte* base;  // of the layer's units in slot 0
  int64_t page_bytes;
  int64_t unit_bytes;

  __device__ std::byte* unit(uint32_t slot, int kv_head) const {
    return base + slot * page_bytes + kv_head * unit_bytes;
  }
};
inline constexpr int kNumKinds = 3;  // BF16, stored, staging

struct EncodeCounters {
  unsigned long long non_finite;
  unsigned long long saturated;
};

// One side of a layer. Offsets are bytes from the start of a unit; sections end where the next
// begins.
struct CloseSide {
  SideMap map;
  formats::SideFormat format;
  float rotation_scale;
  int source_at;  // of this side's codes in a BF16 unit
  int codes_at;
  int scales_at;
  int mean_at;
  int end_at;
  const DeviceSideParams* params;  // [num_kv_heads]
};

struct AppendRowsArgs {
  const AppendItem* items;
  int num_items;
  int num_kv_heads;
  int head_dim;
  int page_tokens;
  const float* rows[2];  // keys, values: [num_rows][num_kv_heads][head_dim]
  DeviceKind kinds[kNumKinds];
  CloseSide sides[2];  // keys, values of the stored format
  EncodeCounters* counters;
};

struct CloseArgs {
  AppendRowsArgs rows;
  const ClosedPage* pages;
};

// Where the 16 bytes of a lane of a BF16 fragment lie in shared memory: permuted within the
// fragment so that neither threads that read along lanes (K) nor along k-steps (V) meet in a bank,
// and of those that write a token's row no more than two.
__device__ __forceinline__ int source_chunk(int fragment, int lane) {
  return fragment * kLanes + (lane ^ (lane >> 3 & 3) ^ ((fragment & 1) << 2) ^ (fragment >> 1 & 3));
}

// One side of one unit: what a thread block closes.
struct CloseUnit {
  const CloseSide& side;
  DeviceSideParams params;
  uint4* source;  // BF16 codes of this side in shared memory, see source_chunk
  uint8_t* codes;
  uint8_t* scales;
  uint16_t* mean;
};

inline constexpr int kCloseThreads = 128;

}  // namespace kvant::backend::cuda::quant
