// Where sums of products that decode weights go: from registers, or with splits through the shared
// memory of a cluster.
#pragma once

#include <cstdint>

#include "kvant/backend/cuda/dense/decoded_strips.cuh"
#include "kvant/backend/cuda/dense/gate.cuh"

namespace kvant::backend::cuda {

// What is done to the sums of an output before they are written.
struct OutputTerms {
  float scale = 1.0f;     // of the row of weights
  float up_scale = 1.0f;  // of the other matrix
  float bias = 0.0f;

  template <WeightType kType>
  __device__ static OutputTerms of(const DecodedArgs& args, const ProductTarget& target,
                                   int64_t output) {
    OutputTerms terms;
    if (output >= target.weights.rows) return terms;
    if constexpr (kRowScaled<kType>) {
      const auto scale_of = [&](const WeightTiles& weights) {
        return kOfE4m3Halves * *row_scale<kType>(weights, weights.data, output / kStripRows,
                                                 static_cast<int>(output % kStripRows));
      };
      terms.scale = scale_of(target.weights);
      if (args.gated) terms.up_scale = scale_of(args.targets[1].weights);
    }
    if (target.bias != nullptr) terms.bias = target.bias[output];
    return terms;
  }
  // `factor` of the row of x.
  __device__ float apply(const DecodedArgs& args, float factor, float sum, float up) const {
    const float value = sum * (factor * scale) + bias;
    return args.gated ? activate(args.gate, value) * (up * (factor * up_scale)) : value;
  }
};

// Sums of one strip in registers; `up_sums` those of the other matrix with a gate. What is read for
// some rows is on its way together.
template <WeightType kType, int kN>
__device__ __forceinline__ void write_strip(const DecodedArgs& args, const DecodedPart<kN>& part,
                                            int slot, const float (&sums)[kN / 2],
                                            const float (&up_sums)[kN / 2]) {
  constexpr int kPairs = kN / 8;  // of rows, eight apart
  constexpr int kBatch = kPairs < 4 ? kPairs : 4;
  const int lane = threadIdx.x % 32;
  const SlotStrip place(args, part.item, slot);
  if (!place.exists) return;
  const ProductTarget& target = args.targets[place.target];
  const int64_t stride = target.weights.rows;
  const int64_t output = int64_t{place.strip} * kStripRows + lane / 4;
  const OutputTerms terms[2] = {OutputTerms::of<kType>(args, target, output),
                                OutputTerms::of<kType>(args, target, output + 8)};
  const int there = static_cast<int>(min((stride - output + 7) / 8, int64_t{2}));  // of the two
  const int row_of_lane = lane % 4 * 2;
  float* out = target.out + (part.first_row + row_of_lane) * stride + output;
  const float* factors = args.rows.factors + part.first_row + row_of_lane;
  int left = args.num_rows - part.first_row - row_of_lane;  // of rows from here on
#pragma unroll
  for (int batch = 0; batch < kPairs; batch += kBatch) {
    float2 factor[kBatch] = {};
    float before[kBatch][4] = {};
#pragma unroll
    for (int pair = 0; pair < kBatch; ++pair) {
      if (pair * 8 < left) factor[pair] = *reinterpret_cast<const float2*>(factors + pair * 8);
      if (!target.accumulate) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = pair * 8 + i % 2;
        if (row < left && i / 2 < there) before[pair][i] = out[row * stride + i / 2 * 8];
      }
    }
#pragma unroll
    for (int pair = 0; pair < kBatch; ++pair) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = pair * 8 + i % 2;
        const int at = (batch + pair) * 4 + i;
        const float of_row = i % 2 == 0 ? factor[pair].x : factor[pair].y;
        const float value =
            before[pair][i] + terms[i / 2].apply(args, of_row, sums[at], up_sums[at]);
        if (row < left && i / 2 < there) out[row * stride + i / 2 * 8] = value;
      }
    }
    out += 8 * kBatch * stride;
    factors += 8 * kBatch;
    left -= 8 * kBatch;
    asm volatile("" : "+l"(out), "+l"(factors), "+r"(left));  // addresses are not worked out ahead
  }
}

// The sums of a whole item, from registers.
template <WeightType kType, int kN>
__device__ __forceinline__ void write_sums(const DecodedArgs& args, const DecodedPart<kN>& part,
                                           const DecodedSums<kN>& sums) {
  const int warp = threadIdx.x / 32;
  write_strip<kType, kN>(args, part, 2 * warp, sums[0], sums[1]);
  if (!args.gated) write_strip<kType, kN>(args, part, 2 * warp + 1, sums[1], sums[1]);
}

__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// Of the same place in the shared memory of another block of the cluster.
__device__ inline float4 load_of_rank(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(there)
               : "memory");
  return x;
}

// Of what lies at an address, over all blocks of the cluster.
__device__ inline float4 sum_of_ranks(uint32_t at, int splits) {
  float4 of[kMostSplits];  // all on their way together
#pragma unroll
  for (int rank = 0; rank < kMostSplits; ++rank) {
    of[rank] = rank < splits ? load_of_rank(at, rank) : float4{};
  }
  float4 sum = of[0];
#pragma unroll
  for (int rank = 1; rank < kMostSplits; ++rank) {
    sum.x += of[rank].x, sum.y += of[rank].y, sum.z += of[rank].z, sum.w += of[rank].w;
  }
  return sum;
}

// Leaves a warp's sums where other blocks of the cluster read them.
template <int kN>
__device__ __forceinline__ void leave_sums(float* parts, const DecodedSums<kN>& sums) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int output = (kStrips * warp + s) * kStripRows + lane / 4 + i % 4 / 2 * 8;
      parts[row * kPartStride + output] = sums[s][i];
    }
  }
}

// Writes the rows that are the block's among those of its cluster. A thread has four outputs, and
// reads what it needs of two rows at a time.
template <WeightType kType, int kN>
__device__ void write_joined(const DecodedArgs& args, const DecodedPart<kN>& part, uint32_t parts) {
  constexpr int kAtOnce = 2;
  const int groups = args.gated ? kOutputs / 8 : kOutputs / 4;
  const int group = static_cast<int>(threadIdx.x) % groups;
  const int slot = args.gated ? group / 4 * 2 : group / 4;
  const int in_strip = group % 4 * 4;
  const SlotStrip place(args, part.item, slot);
  if (!place.exists) return;
  const ProductTarget& target = args.targets[place.target];
  const int64_t stride = target.weights.rows;
  const int64_t output = int64_t{place.strip} * kStripRows + in_strip;
  float* const out = target.out + part.first_row * stride + output;
  const bool in_fours =
      output + 4 <= stride && stride % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  OutputTerms terms[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) terms[i] = OutputTerms::of<kType>(args, target, output + i);
  const auto sums_of = [&](int of_slot, int row) {
    return sum_of_ranks(parts + (row * kPartStride + of_slot * kStripRows + in_strip) * 4,
                        args.splits);
  };
  const int first = part.rank * (kN / args.splits);
  const int end = min(first + kN / args.splits, args.num_rows - part.first_row);
  const int step = 32 * kConsumers / groups;
  for (int base = first + static_cast<int>(threadIdx.x) / groups; base < end;
       base += kAtOnce * step) {
    float factor[kAtOnce];
    float4 before[kAtOnce] = {};
    float4 sums[kAtOnce];
    float4 ups[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = min(base + i * step, end - 1);
      factor[i] = args.rows.factors[part.first_row + row];
      if (target.accumulate && in_fours) {
        before[i] = *reinterpret_cast<const float4*>(out + row * stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = min(base + i * step, end - 1);
      sums[i] = sums_of(slot, row);
      if (args.gated) ups[i] = sums_of(slot + 1, row);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = base + i * step;
      if (row >= end) break;
      const float values[4] = {terms[0].apply(args, factor[i], sums[i].x, ups[i].x),
                               terms[1].apply(args, factor[i], sums[i].y, ups[i].y),
                               terms[2].apply(args, factor[i], sums[i].z, ups[i].z),
                               terms[3].apply(args, factor[i], sums[i].w, ups[i].w)};
      float* const at = out + row * stride;
      if (in_fours) {
        *reinterpret_cast<float4*>(at) =
            make_float4(before[i].x + values[0], before[i].y + values[1], before[i].z + values[2],
                        before[i].w + values[3]);
        continue;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (output + k < stride) at[k] = target.accumulate ? at[k] + values[k] : values[k];
      }
    }
  }
}

}  // namespace kvant::backend::cuda
