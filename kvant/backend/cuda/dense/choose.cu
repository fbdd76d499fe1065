#include "kvant/backend/cuda/dense/choose.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/ptx.cuh"
#include "kvant/base/row_weight.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kThreads = 1024;  // a warp's worth of warps
constexpr int kWarps = kThreads / 32;
constexpr int kNoIndex = 0x7fffffff;
// Of so many values at least top-p looks for its few. Twice as many have room.
constexpr int kTopPRank = kMostCandidates / 2;
constexpr int64_t kMostSharedBytes = 32768;  // for sums of blocks: four million values
static_assert(kMostCandidates == kThreads, "a thread a candidate");

struct Row {
  const float* values;
  int cols;
  bool by_fours;  // aligned to 16 bytes, and so is the next
};

__device__ Row row_of_block(const float* x, int cols, bool by_fours) {
  return {x + blockIdx.x * int64_t{cols}, cols, by_fours};
}

// take(value, index) of the thread's part of the row, in ascending order.
template <typename Take>
__device__ __forceinline__ void for_part(const Row& row, const Take& take) {
  if (row.by_fours) {
#pragma unroll 4
    for (int i = 4 * static_cast<int>(threadIdx.x); i < row.cols; i += 4 * kThreads) {
      const float4 v = *reinterpret_cast<const float4*>(row.values + i);
      take(v.x, i), take(v.y, i + 1), take(v.z, i + 2), take(v.w, i + 3);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < row.cols; i += kThreads) take(row.values[i], i);
  }
}

// The same for all threads of the block; `own`: the greatest of the thread's part.
__device__ RowMaximum find_greatest(const Row& row, float& own) {
  float value = -INFINITY;
  int index = kNoIndex;
  bool broken = false;
  for_part(row, [&](float v, int i) {
    broken |= !isfinite(v);
    if (v > value) value = v, index = i;  // indices ascend: the first of equals stays
  });
  own = value;
  const auto reduce = [&] {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, lanes);
      const int at = __shfl_xor_sync(0xffffffffu, index, lanes);
      if (other > value || (other == value && at < index)) value = other, index = at;
    }
  };
  __shared__ float values[kWarps];
  __shared__ int indices[kWarps];
  reduce();
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, indices[threadIdx.x / 32] = index;
  broken = __syncthreads_or(broken ? 1 : 0) != 0;
  value = values[threadIdx.x % 32], index = indices[threadIdx.x % 32];
  reduce();
  RowMaximum found;
  found.value = broken ? 0.0f : value;
  found.index = broken || index == kNoIndex ? -1 : index;
  return found;
}

__global__ void __launch_bounds__(kThreads)
    greatest_kernel(const float* x, int cols, bool by_fours, RowMaximum* maxima) {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
  float own;
  const RowMaximum found = find_greatest(row_of_block(x, cols, by_fours), own);
  if (threadIdx.x == 0) maxima[blockIdx.x] = found;
}

// ---- draws: the sums of row_weight.h, in its order ----

__device__ __forceinline__ float weight_of(float value, float scale, float max) {
  return exp_of_negative(fmaxf(kLeastExponent, (value - max) * scale));
}

__device__ int num_blocks(const Row& row) {
  return (row.cols + kWeightBlock - 1) / kWeightBlock;
}

// Sums of blocks of weights, to shared memory.
__device__ void weigh_blocks(const Row& row, float scale, float max, double* sums) {
  constexpr int kOfWarp = 32 / kWeightLanes;  // blocks at a time
  const int blocks = num_blocks(row);
  const int lane = static_cast<int>(threadIdx.x) % kWeightLanes;
  for (int first = static_cast<int>(threadIdx.x) / 32 * kOfWarp; first < blocks;
       first += kOfWarp * kWarps) {
    const int block = first + static_cast<int>(threadIdx.x) % 32 / kWeightLanes;
    const float* from = row.values + block * kWeightBlock;
    const int count = block < blocks ? min(kWeightBlock, row.cols - block * kWeightBlock) : 0;
    const int whole = count / kWeightLanes * kWeightLanes;
    double chain = 0;
#pragma unroll 8
    for (int i = lane; i < whole; i += kWeightLanes) {
      chain += static_cast<double>(weight_of(from[i], scale, max));
    }
    double sum = 0;
    for (int i = 0; i < kWeightLanes; ++i) {
      sum += __shfl_sync(0xffffffffu, chain, i, kWeightLanes);
    }
    if (lane != 0 || block >= blocks) continue;
    for (int i = whole; i < count; ++i) {
      sum += static_cast<double>(weight_of(from[i], scale, max));
    }
    sums[block] = sum;
  }
  __syncthreads();
}

// By one thread.
__device__ double sum_of(const double* sums, int count) {
  double total = 0;
#pragma unroll 8
  for (int i = 0; i < count; ++i) total += sums[i];
  return total;
}

// Takes steps off `target` while it stays positive or 0, the last one never; returns how many.
// As steps are not negative, eight at a time tell by the last difference.
template <typename Step>
__device__ int walk(const Step* steps, int count, double& target) {
  int at = 0;
  for (; at + 8 < count; at += 8) {
    double left = target;
#pragma unroll
    for (int i = 0; i < 8; ++i) left -= static_cast<double>(steps[at + i]);
    if (left < 0) break;
    target = left;
  }
  for (; at + 1 < count; ++at) {
    const double left = target - static_cast<double>(steps[at]);
    if (left < 0) break;
    target = left;
  }
  return at;
}

// Thread 0 gets the result.
__device__ RowChoice draw(const Row& row, const RowQuery& query, const RowMaximum& greatest,
                          double* sums) {
  __shared__ int chosen_block;
  __shared__ float weights[kWeightBlock];
  weigh_blocks(row, query.scale, greatest.value, sums);
  RowChoice choice;
  double target = 0;
  if (threadIdx.x == 0) {
    choice.total = sum_of(sums, num_blocks(row));
    target = query.uniform * choice.total;
    chosen_block = walk(sums, num_blocks(row), target);
  }
  __syncthreads();
  const int first = chosen_block * kWeightBlock;
  const int count = min(kWeightBlock, row.cols - first);
  const int own = static_cast<int>(threadIdx.x);
  if (own < count) weights[own] = weight_of(row.values[first + own], query.scale, greatest.value);
  __syncthreads();
  if (threadIdx.x != 0) return choice;
  int at = walk(weights, count, target);
  // What weighs nothing is never drawn, also where rounding leaves the target at the sum or above.
  while (at >= 0 && weights[at] == 0.0f) --at;
  choice.drawn = at < 0 ? greatest.index : first + at;
  return choice;
}

// ---- candidates ----

// Greater for greater values; zeros of both signs are equal.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// A key that at least `k` values of the row reach, mostly not many more: the k-th greatest of the
// greatest of threads. 0 where fewer threads have values.
__device__ uint32_t bound_of(uint32_t own_key, int k) {
  uint32_t bound = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t next = bound | 1u << bit;
    if (__syncthreads_count(own_key >= next ? 1 : 0) >= k) bound = next;
  }
  return bound;
}

// What reaches `bound`, greatest first, equals by index: key and complement of the index in one
// number. How many, or -1 if there is no room for them.
__device__ int gather(const Row& row, uint32_t own_key, uint32_t bound, uint64_t* list) {
  __shared__ int num_found;
  if (threadIdx.x == 0) num_found = 0;
  __syncthreads();
  if (own_key >= bound) {
    for_part(row, [&](float v, int i) {
      const uint32_t key = ordered(v);
      if (key < bound) return;
      const int at = atomicAdd(&num_found, 1);
      if (at < kMostCandidates) list[at] = uint64_t{key} << 32 | ~static_cast<uint32_t>(i);
    });
  }
  __syncthreads();
  const int count = num_found;
  if (count > kMostCandidates) return -1;
  int size = 2;
  while (size < count) size *= 2;
  const int own = static_cast<int>(threadIdx.x);
  if (own >= count && own < size) list[own] = 0;  // less than any
  __syncthreads();
  for (int part = 2; part <= size; part *= 2) {  // bitonic
    for (int stride = part / 2; stride > 0; stride /= 2) {
      const int low = 2 * own - (own & (stride - 1));
      if (low + stride < size) {
        const uint64_t a = list[low];
        const uint64_t b = list[low + stride];
        if ((a < b) == ((low & part) == 0)) list[low] = b, list[low + stride] = a;
      }
      __syncthreads();
    }
  }
  return count;
}

// How many of the sorted candidates hold the mass: 0 if all of them hold less.
__device__ int count_of_mass(const uint64_t* list, int count, const RowQuery& query, float max,
                             double mass) {
  __shared__ float weights[kMostCandidates];
  __shared__ int kept;
  const int own = static_cast<int>(threadIdx.x);
  if (own < count) {
    weights[own] = weight_of(value_of(static_cast<uint32_t>(list[own] >> 32)), query.scale, max);
  }
  __syncthreads();
  if (own == 0) {
    kept = 0;
    double held = 0;
    for (int i = 0; i < count; ++i) {
      held += static_cast<double>(weights[i]);
      if (held < mass) continue;
      kept = i + 1;
      break;
    }
  }
  __syncthreads();
  return kept;
}

// Thread 0 gets the result. `own`: the greatest of the thread's part of the row.
__device__ RowChoice find_candidates(const Row& row, const RowQuery& query,
                                     const RowMaximum& greatest, float own, double* sums,
                                     RowMaximum* candidates) {
  __shared__ uint64_t list[kMostCandidates];
  __shared__ double total;
  const uint32_t own_key = ordered(own);
  uint32_t bound;
  if (query.kind == RowQuery::Kind::kNear) {
    bound = ordered(greatest.value + query.below);
  } else {
    bound = bound_of(own_key, query.kind == RowQuery::Kind::kTopK ? query.top_k : kTopPRank);
  }
  int count = gather(row, own_key, bound, list);
  RowChoice choice;
  if (count < 0) return choice;
  if (query.kind == RowQuery::Kind::kTopK) count = min(count, query.top_k);
  if (query.kind == RowQuery::Kind::kTopP) {
    weigh_blocks(row, query.scale, greatest.value, sums);
    if (threadIdx.x == 0) total = sum_of(sums, num_blocks(row));
    __syncthreads();
    choice.total = total;
    count = count_of_mass(list, count, query, greatest.value, query.top_p * total);
  }
  const int at = static_cast<int>(threadIdx.x);
  if (at < count) {
    candidates[at].value = value_of(static_cast<uint32_t>(list[at] >> 32));
    candidates[at].index = static_cast<int32_t>(~static_cast<uint32_t>(list[at]));
  }
  choice.num_candidates = count;
  return choice;
}

__global__ void __launch_bounds__(kThreads)
    answer_kernel(const float* x, int cols, bool by_fours, const RowQuery* queries,
                  RowAnswers answers) {
  extern __shared__ double sums[];
  constexpr int kWords = sizeof(RowQuery) / sizeof(uint32_t);
  static_assert(std::is_trivially_copyable_v<RowQuery> && sizeof(RowQuery) % 4 == 0);
  __shared__ uint32_t words[kWords];
  ptx::launch_dependents();
  // The host's memory is far away: once for the block, and while the kernel before this one ends.
  if (threadIdx.x < kWords) {
    words[threadIdx.x] = reinterpret_cast<const uint32_t*>(queries + blockIdx.x)[threadIdx.x];
  }
  __syncthreads();
  RowQuery query;
  memcpy(&query, words, sizeof(query));
  ptx::wait_prerequisites();
  const Row row = row_of_block(x, cols, by_fours);
  float own;
  const RowMaximum greatest = find_greatest(row, own);
  if (threadIdx.x == 0) answers.maxima[blockIdx.x] = greatest;
  RowChoice choice;
  if (greatest.index >= 0 && query.kind != RowQuery::Kind::kGreatest) {
    choice = query.kind == RowQuery::Kind::kDraw
                 ? draw(row, query, greatest, sums)
                 : find_candidates(row, query, greatest, own, sums,
                                   answers.candidates + blockIdx.x * int64_t{kMostCandidates});
    const bool found = threadIdx.x == 0 && choice.found();
    if (__syncthreads_or(found ? 1 : 0) == 0) {
      float* const to = answers.values + blockIdx.x * int64_t{cols};
      for (int i = static_cast<int>(threadIdx.x); i < cols; i += kThreads) to[i] = row.values[i];
    }
  }
  if (threadIdx.x == 0) answers.choices[blockIdx.x] = choice;
}

bool by_fours(const float* x, int64_t num_cols) {
  return num_cols % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

}  // namespace

Status greatest_in_rows(const float* x, int64_t num_rows, int64_t num_cols, RowMaximum* maxima,
                        cudaStream_t stream) {
  if (num_rows == 0) return {};
  return launch_overlapped("greatest_in_rows", greatest_kernel,
                           {static_cast<unsigned>(num_rows), kThreads, 0, stream}, x,
                           static_cast<int>(num_cols), by_fours(x, num_cols), maxima);
}

Status answer_queries(const float* x, int64_t num_rows, int64_t num_cols, const RowQuery* queries,
                      const RowAnswers& answers, cudaStream_t stream) {
  if (num_rows == 0) return {};
  const int64_t shared = (num_cols + kWeightBlock - 1) / kWeightBlock * int64_t{sizeof(double)};
  if (shared > kMostSharedBytes) {
    return Error(ErrorCode::kUnsupported, "queries of rows of " + std::to_string(num_cols) +
                                              " values; the CUDA backend takes at most " +
                                              std::to_string(kMostSharedBytes / 8 * kWeightBlock));
  }
  return launch_overlapped(
      "answer_queries", answer_kernel,
      {static_cast<unsigned>(num_rows), kThreads, static_cast<size_t>(shared), stream}, x,
      static_cast<int>(num_cols), by_fours(x, num_cols), queries, answers);
}

}  // namespace kvant::backend::cuda
