// The consumers of the shared-prefix kernel: a warpgroup with 64 query rows. A thread has two rows,
// lane / 4 and 8 further of its warp's 16, and columns 8 j + 2 (lane % 4) and the next: wgmma's
// accumulator layout.
#pragma once

#include "kvant/backend/cuda/shared/dequantise.cuh"
#include "kvant/backend/cuda/shared/shape.cuh"
#include "kvant/backend/cuda/shared/wgmma.cuh"

namespace kvant::backend::cuda {

inline constexpr float kHeadroom = 7.0f;  // weights are at most 2^(kWeightShift + 7)
inline constexpr int kSharedOwn = 1;      // named barriers 1 and 2: a warpgroup's own

// Two numbers as BF16, and as BF16 what rounding left.
__device__ __forceinline__ uint2 split_pair(float low, float high) {
  const uint32_t rounded = ptx::bf16x2_of_f32(low, high);
  return {rounded, ptx::bf16x2_of_f32(low - __uint_as_float(rounded << 16),
                                      high - __uint_as_float(rounded & 0xffff0000u))};
}

__device__ __forceinline__ void store_word(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0],%1;" ::"r"(address), "r"(word) : "memory");
}

template <typename Shape>
class SharedConsumer {
  static constexpr int kHeadDim = Shape::kHeadDim;
  static constexpr int kSteps = Shape::kSteps;
  static constexpr bool kBf16 = Shape::kBf16;

  // A fragments of the weights.
  struct Weights {
    uint32_t rounded[kSharedPageTokens / 4];
    uint32_t rest[kBf16 ? kSharedPageTokens / 4 : 1];
  };

 public:
  __device__ __forceinline__ SharedConsumer(const SharedParams& params, uint32_t base,
                                            int warpgroup)
      : params_(params),
        bars_(base + Shape::kBarriers),
        warpgroup_(warpgroup),
        lane_(static_cast<int>(threadIdx.x) % 32),
        queries_(base + Shape::kQueries + warpgroup * kSharedHalfRows * 128),
        keys_(matrix_descriptor(base, 16, 1024)),
        values_(matrix_descriptor(base + Shape::kSideBytes, Shape::kPartBytes, 1024)) {}

  __device__ __forceinline__ void run() {
    const SharedStart& start = params_.starts[blockIdx.x];
    int first = 0;  // pages of the block's items before
    for (int i = 0; i < start.num_items; ++i) {
      const SharedItem item = i == 0 ? start.item : params_.items[start.first_item + i];
      run_item(item, first);
      first += item.num_pages;
    }
  }

 private:
  __device__ __forceinline__ void run_item(const SharedItem& item, int first) {
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const bool alternates = item.alternates != 0;
    const int row = (alternates ? 0 : warpgroup_ * kSharedHalfRows) + warp * 16 + lane_ / 4;
    const int stride = alternates ? 2 : 1;
    const int end = first + item.num_pages;
    arrivals_ = stride;
    const float score_scale =
        params_.factors[item.kv_head].key * image_key_unit(Shape::kKey) * params_.scale_log2;
    float shift[2] = {0.0f, 0.0f};
    load_queries(item, row, shift);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out_[i] = 0.0f;
    reference_[0] = reference_[1] = kNoReference;
    weight_[0] = weight_[1] = 0.0f;

    const int begin = first + (alternates ? warpgroup_ : 0);
    if (begin < end) run_pages(begin, end, stride, score_scale);
    store(item, row, shift, score_scale);
  }

  // Pages [page, end), every `stride`-th. Scores of a page and the product of the one before are
  // under way together.
  __device__ __forceinline__ void run_pages(int page, int end, int stride, float score_scale) {
    float s[kSharedPageTokens / 2];
    Weights p;
    float factor[2];
    issue_scores(s, page);
    wgmma_wait<0>();
    hold(s);
    release(kSharedKeysEmpty, page);
    weigh(s, score_scale, factor);  // nothing to shrink yet
    pack(s, p);
#pragma unroll 1
    for (page += stride; page < end; page += stride) {
      issue_scores(s, page);
      issue_outputs(p, page - stride);
      wgmma_wait<1>();
      hold(s);
      release(kSharedKeysEmpty, page);
      const bool raised = weigh(s, score_scale, factor);
      wgmma_wait<0>();
      hold(out_);
      release(kSharedValuesEmpty, page - stride);
      pack(s, p);
      if (raised) shrink(factor);
    }
    page -= stride;
    issue_outputs(p, page);
    wgmma_wait<0>();
    hold(out_);
    release(kSharedValuesEmpty, page);
  }

  __device__ __forceinline__ void shrink(const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) out_[j] *= factor[j / 2 % 2];
  }

  // A fragments of the queries: rows g and g + 8, channels 2 t .. and 2 t + 8 .. of each step.
  // `shift`: q . b of the reference key of channel formats, less what scores are scaled by.
  __device__ __forceinline__ void load_queries(const SharedItem& item, int row, float (&shift)[2]) {
    const float* q[2];
    bool valid[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = __ldg(params_.queries + item.queries + row + 8 * h);
      valid[h] = query >= 0;
      q[h] = params_.q +
             static_cast<int64_t>(max(query, 0) + item.kv_head * params_.group) * kHeadDim +
             lane_ % 4 * 2;
    }
    [[maybe_unused]] const int warp_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane_ / 4;
    // Products of the item before have read what is overwritten.
    if constexpr (kBf16) ptx::named_barrier(kSharedOwn + warpgroup_, 128);
    [[maybe_unused]] const std::byte* reference = nullptr;
    if constexpr (is_channel(Shape::kKey)) {
      const uint32_t entry = __ldg(params_.entries + item.first_entry);
      reference =
          params_.stored.base + static_cast<int64_t>(entry >> 8) * params_.stored.page_bytes +
          item.kv_head * params_.stored.unit_bytes + params_.sections.k_scales + lane_ % 4 * 16;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float2 x[2][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[h][c] = {0.0f, 0.0f};
          if (valid[h]) x[h][c] = *reinterpret_cast<const float2*>(q[h] + step * 16 + c * 8);
          const uint2 split = kBf16 ? split_pair(x[h][c].x, x[h][c].y)
                                    : uint2{ptx::f16x2_of_f32(x[h][c].x, x[h][c].y), 0};
          q_[step][2 * c + h] = split.x;
          if constexpr (kBf16) {
            const int at = warp_row + 8 * h;
            const uint32_t line = queries_ + step / 4 * Shape::kQueryPart + at * 128;
            store_word(line + (((step % 4 * 2 + c) ^ at % 8) << 4) + lane_ % 4 * 4, split.y);
          }
        }
      }
      if constexpr (is_channel(Shape::kKey)) {
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(reference + step * 64));
        const float2 zero[2] = {ptx::f32_of_f16x2(w.x), ptx::f32_of_f16x2(w.z)};
        const float2 scale[2] = {ptx::f32_of_f16x2(w.y), ptx::f32_of_f16x2(w.w)};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            shift[h] = fmaf(x[h][c].x, fmaf(8.0f, scale[c].x, zero[c].x), shift[h]);
            shift[h] = fmaf(x[h][c].y, fmaf(8.0f, scale[c].y, zero[c].y), shift[h]);
          }
        }
      }
    }
    if constexpr (is_channel(Shape::kKey)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shift[h] += __shfl_xor_sync(~0u, shift[h], 1);
        shift[h] += __shfl_xor_sync(~0u, shift[h], 2);
      }
    }
    if constexpr (kBf16) {
      fence_async_shared();
      ptx::named_barrier(kSharedOwn + warpgroup_, 128);
    }
  }

  __device__ __forceinline__ void issue_scores(float (&s)[kSharedPageTokens / 2], int nth) {
    const int stage = nth % Shape::kStages;
    ptx::mbarrier_wait(bars_ + 8 * (kSharedKeysFull + stage), (nth / Shape::kStages) & 1);
    const uint64_t keys = keys_ + stage * (2 * Shape::kSideBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t at = keys + step / 4 * (Shape::kPartBytes >> 4) + step % 4 * 2;
      wgmma_rows<kBf16>(s, q_[step], at, step > 0);
      if constexpr (kBf16) {
        const uint64_t queries =
            matrix_descriptor(queries_ + step / 4 * Shape::kQueryPart, 16, 1024) + step % 4 * 2;
        wgmma_shared_bf16(s, queries, at);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_outputs(const Weights& p, int nth) {
    const int stage = nth % Shape::kStages;
    ptx::mbarrier_wait(bars_ + 8 * (kSharedValuesFull + stage), (nth / Shape::kStages) & 1);
    const uint64_t values = values_ + stage * (2 * Shape::kSideBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSharedPageTokens / 16; ++step) {
      const uint64_t at = values + step * (16 * 128 >> 4);
      wgmma_columns<kBf16>(out_, p.rounded + 4 * step, at);
      if constexpr (kBf16) wgmma_columns<kBf16>(out_, p.rest + 4 * step, at);
    }
    wgmma_commit();
  }

  // What only this warpgroup reads counts for both.
  __device__ __forceinline__ void release(int barrier, int nth) const {
    if (lane_ != 0) return;
    const uint32_t empty = bars_ + 8 * (barrier + nth % Shape::kStages);
    ptx::mbarrier_arrive(empty);
    if (arrivals_ == 2) ptx::mbarrier_arrive(empty);
  }

  // Scores become weights exp2(score - reference). The reference is kWeightShift below the maximum
  // when it moves, and moves when that is exceeded by kHeadroom: seldom. True if it did, in this
  // warp. FP16 has room for the weights.
  __device__ __forceinline__ bool weigh(float (&s)[kSharedPageTokens / 2], float scale,
                                        float (&factor)[2]) {
    float top[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h][0] = s[2 * h];
      top[h][1] = s[2 * h + 1];
#pragma unroll
      for (int j = 1; j < kSharedPageTokens / 8; ++j) {
        top[h][0] = fmaxf(top[h][0], s[4 * j + 2 * h]);
        top[h][1] = fmaxf(top[h][1], s[4 * j + 2 * h + 1]);
      }
      top[h][0] = fmaf(fmaxf(top[h][0], top[h][1]), scale, -kWeightShift);
    }
    const bool raised = __any_sync(~0u, fmaxf(top[0][0] - reference_[0],
                                              top[1][0] - reference_[1]) > kHeadroom) != 0;
    if (raised) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = top[h][0];
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float reference = fmaxf(reference_[h], most);
        factor[h] = ptx::exp2_approx(reference_[h] - reference);
        reference_[h] = reference;
        weight_[h] *= factor[h];
      }
    }
#pragma unroll
    for (int i = 0; i < kSharedPageTokens / 2; ++i)
      s[i] = ptx::exp2_approx(fmaf(s[i], scale, -reference_[i / 2 % 2]));
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < kSharedPageTokens / 2; ++i) sum[i / 2 % 2][i % 2] += s[i];
    weight_[0] += sum[0][0] + sum[0][1];
    weight_[1] += sum[1][0] + sum[1][1];
    return raised;
  }

  __device__ __forceinline__ static void pack(const float (&s)[kSharedPageTokens / 2], Weights& p) {
#pragma unroll
    for (int i = 0; i < kSharedPageTokens / 4; ++i) {
      if constexpr (kBf16) {
        const uint2 split = split_pair(s[2 * i], s[2 * i + 1]);
        p.rounded[i] = split.x;
        p.rest[i] = split.y;
      } else {
        p.rounded[i] = ptx::f16x2_of_f32(s[2 * i], s[2 * i + 1]);
      }
    }
  }

  __device__ __forceinline__ void store(const SharedItem& item, int row, const float (&shift)[2],
                                        float scale) const {
    const int part = item.part + (item.alternates != 0 ? warpgroup_ : 0);
    const float unit = params_.factors[item.kv_head].value;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float weight = weight_[h];
      weight += __shfl_xor_sync(~0u, weight, 1);
      weight += __shfl_xor_sync(~0u, weight, 2);
      const int first = __ldg(params_.partial_rows + item.partial_rows + row + 8 * h);
      if (first < 0) continue;
      const int64_t at = first + static_cast<int64_t>(part) * params_.max_rows;
      if (lane_ % 4 == 0)
        params_.partial_states[at] = {fmaf(shift[h], scale, reference_[h]), weight};
      float* out = params_.partial_sums + at * kHeadDim + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j) = {out_[4 * j + 2 * h] * unit,
                                                   out_[4 * j + 2 * h + 1] * unit};
      }
    }
  }

  const SharedParams& params_;
  const uint32_t bars_;
  const int warpgroup_;
  const int lane_;
  const uint32_t queries_;  // the rest of this warpgroup's queries
  const uint64_t keys_;     // descriptors of stage 0
  const uint64_t values_;
  int arrivals_ = 1;
  uint32_t q_[kSteps][4];
  float out_[kHeadDim / 2];
  float reference_[2];
  float weight_[2];  // of this thread's columns
};

}  // namespace kvant::backend::cuda
