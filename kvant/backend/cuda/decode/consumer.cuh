// The consumers: warps of a team that score, weigh and add the pages of a segment.
#pragma once

#include "kvant/backend/cuda/decode/pre_rope_keys.cuh"
#include "kvant/backend/cuda/decode/ring.cuh"
#include "kvant/backend/cuda/decode/shape.cuh"
#include "kvant/backend/cuda/decode/values.cuh"

namespace kvant::backend::cuda {

template <typename Shape>
class Consumer {
  static constexpr int kHeadDim = Shape::kHeadDim;
  static constexpr int kNTiles = Shape::kNTiles;
  static constexpr int kTeam = Shape::kTeam;
  static constexpr int kSteps = Shape::kSteps;
  static constexpr int kTiles = Shape::kTiles;

 public:
  using TeamRing = Ring<Shape::kSlotsTakeSteps>;

  __device__ __forceinline__ Consumer(const DecodeParams& params, const TeamRing& ring,
                                      std::byte* team_memory, BlockResult<Shape>* results, int team,
                                      int team_warp, int lane)
      : params_(params),
        ring_(ring),
        results_(results),
        team_(team),
        warp_(team_warp),
        lane_(lane) {
    bf16_queries_ = reinterpret_cast<uint4*>(team_memory);
    std::byte* exchange = team_memory + Shape::kExchangeStart;
    exchange_ = reinterpret_cast<float*>(exchange);
    f16_queries_ = reinterpret_cast<uint2*>(
        Shape::kF16QueryBytes > 0 ? team_memory + Shape::kBf16QueryBytes : exchange);
    states_ = reinterpret_cast<float2*>(exchange + Shape::kExchangeBytes);
    now_ = reinterpret_cast<TeamSegment*>(team_memory + Shape::kTeamBytes - sizeof(TeamSegment));
  }

  // Before the first segment, without waiting for other kernels.
  __device__ __forceinline__ void clear_queries() {
    constexpr int kPlaces = kNTiles * kSteps * 32;
    for (int i = warp_ * 32 + lane_; i < kPlaces; i += kTeam * 32) {
      bf16_queries_[i] = {0, 0, 0, 0};
      if constexpr (!Shape::kPreRope) f16_queries_[i] = {0, 0};
    }
  }

  // What the segment's work needs of tables: without waiting for other kernels. `word`: this lane's
  // word of the segment (lanes below 16).
  __device__ __forceinline__ void enter_segment(uint32_t word) {
    sync_team();  // the team has finished the segment before
    if (warp_ == 0) {
      const int head = static_cast<int>(__shfl_sync(~0u, word, offsetof(Segment, kv_head) / 4));
      if (lane_ < 16) reinterpret_cast<uint32_t*>(&now_->segment)[lane_] = word;
      if (lane_ == 0) now_->factors = params_.factors[head];
    }
    sync_team();
  }

  // The segment entered; `leaves`: its sums go to the block's merge as they are, which only a
  // team's last segment may.
  __device__ __forceinline__ void run_segment(int worker, bool leaves) {
    begin(now_->segment);
    int flags;
    do {
      const Slot k = ring_.take();
      const Slot v = ring_.take_values(k);
      ring_.wait(k);
      const SlotInfo info = ring_.info(k);
      flags = info.flags;
      const int position = info.position;
      if (Shape::kStoredByTile || (flags & kStepIsTile) != 0) {
        run_tile(k, v, flags, position);
      } else {
        run_page(k, v, flags, position);
      }
    } while ((flags & kStepIsLast) == 0);
    if constexpr (Shape::kNeedsZeros) {
      if (!Shape::kAny || params_.value_kernel == ValueKernel::kInt4)
        join_zeros<kHeadDim, kNTiles>(lane_, zeros_, sum_);
    }
    if (leaves) {
      leave_result(now_->segment);
    } else {
      finish(now_->segment, worker);
    }
  }

 private:
  __device__ __forceinline__ void sync_team() const {
    if constexpr (kTeam == 1) {
      __syncwarp();
    } else {
      ptx::named_barrier(1 + team_, kTeam * 32);
    }
  }

  // ---- queries ----

  __device__ __forceinline__ void begin(const Segment& segment) {
    if (params_.q_bias != nullptr && warp_ == 0 && lane_ < segment.num_rows) {
      const QueryRow at = query_row(params_, segment.first_row, segment.kv_head, lane_);
      now_->biases[lane_] = __ldcg(params_.q_bias + at.row * params_.num_query_heads + at.head);
    }
    stage_queries(segment);
    sync_team();
#pragma unroll
    for (int n = 0; n < (Shape::kPreRope ? 0 : kNTiles); ++n) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint2 q = f16_queries_[staged(step, n * 8 + lane_ / 4, lane_ % 4)];
        q_.b[n][step][0] = q.x;
        q_.b[n][step][1] = q.y;
      }
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      reference_[n][0] = reference_[n][1] = kNoReference;
      weight_[n][0] = weight_[n][1] = 0.0f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        sum_.o[n][s][0] = sum_.o[n][s][1] = sum_.o[n][s][2] = sum_.o[n][s][3] = 0.0f;
      zeros_[n][0] = zeros_[n][1] = zeros_[n][2] = zeros_[n][3] = 0.0f;
    }
  }

  // Place of channels (2 t, 2 t + 1) and (2 t + 8, 2 t + 9) of a step and query row among the
  // staged fragments: neighbouring steps of a row lie in different banks.
  __device__ __forceinline__ static int staged(int step, int r, int t) {
    return (r / 8 * kSteps + step) * 32 + (r ^ step) % 8 * 4 + t;
  }

  // The rows of the tile become B fragments in shared memory: fp16 for stored pages, BF16 and rest
  // for others. A warp reads a whole row at a time: all teams of a unit read the same rows at once,
  // and what they ask of the L2 cache adds up. Rows beyond num_rows keep what they hold (zeros, or
  // what an earlier segment left, its exchange too): their columns touch no other's.
  __device__ __forceinline__ void stage_queries(const Segment& segment) {
    constexpr int kBatch = kTeam == 1 ? 4 : Shape::kRows / kTeam;  // loads on their way
    const bool same = params_.stored_q == params_.q;
#pragma unroll 1
    for (int first = warp_; first < segment.num_rows; first += kBatch * kTeam) {
#pragma unroll
      for (int channel = lane_ * 4; channel < kHeadDim; channel += 128) {
        float4 stored[kBatch];
        const float4* plain[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int r = min(first + i * kTeam, segment.num_rows - 1);
          const QueryRow at = query_row(params_, segment.first_row, segment.kv_head, r);
          const int64_t offset = (at.row * params_.num_query_heads + at.head) * kHeadDim + channel;
          stored[i] = *reinterpret_cast<const float4*>(params_.stored_q + offset);
          plain[i] = reinterpret_cast<const float4*>(params_.q + offset);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int r = min(first + i * kTeam, segment.num_rows - 1);
          const float4 x = stored[i];
          const float4 y = same ? x : *plain[i];
          stage_pair(r, channel, {x.x, x.y}, {y.x, y.y});
          stage_pair(r, channel + 2, {x.z, x.w}, {y.z, y.w});
        }
      }
    }
  }

  __device__ __forceinline__ void stage_pair(int r, int channel, float2 stored, float2 plain) {
    const int place = staged(channel / 16, r, channel % 8 / 2);
    const int half = channel % 16 / 8;
    if constexpr (Shape::kPreRope) {
      reinterpret_cast<float2*>(bf16_queries_ + place)[half] = plain;
      return;
    }
    reinterpret_cast<uint32_t*>(f16_queries_ + place)[half] = ptx::f16x2_of_f32(stored.x, stored.y);
    const uint2 split = split_bf16(plain.x, plain.y);
    reinterpret_cast<uint32_t*>(bf16_queries_ + place)[half] = split.x;
    reinterpret_cast<uint32_t*>(bf16_queries_ + place)[2 + half] = split.y;
  }

  // Two values as BF16 pairs: rounded, and the rest.
  __device__ __forceinline__ static uint2 split_bf16(float a, float b) {
    const uint32_t high = ptx::bf16x2_of_f32(a, b);
    return {high, ptx::bf16x2_of_f32(a - __uint_as_float(high << 16),
                                     b - __uint_as_float(high & 0xffff0000u))};
  }

  // ---- pages ----

  __device__ __forceinline__ void run_page(Slot k, Slot v, int flags, int position) {
    const StoredSections& stored = params_.stored;
    const KeyPage keys = {ring_.data(k), stored.k_scales, stored.k_mean};
    const std::byte* codes = ring_.values(v, params_.stored.k_bytes);
    if constexpr (Shape::kPreRope) rotate_page_queries(k);
    if constexpr (!Shape::kAny) {  // a page is one round of the team
      run_round(keys, codes, k, v, flags, position, warp_ * kTiles, true, true);
    } else {
      const int tiles = params_.page_tokens / 16;
      for (int first = warp_ * kTiles; first < tiles; first += kTeam * kTiles)
        run_round(keys, codes, k, v, flags, position, first, first == warp_ * kTiles,
                  first + kTeam * kTiles >= tiles);
      if (warp_ * kTiles >= tiles) {  // fewer tiles than warps: nothing to do here
        ring_.release_keys(k, lane_);
        ring_.wait_values(v);
      }
    }
    ring_.release(v, lane_);
  }

  // kTiles tiles of a page, from tile `first`.
  __device__ __forceinline__ void run_round(const KeyPage& keys, const std::byte* codes, Slot k,
                                            Slot v, int flags, int position, int first,
                                            bool is_first, bool is_last) {
    float s[kTiles][kNTiles][4];
    ScoreOffsets<kNTiles> offsets;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      offsets.at[n][0] = offsets.at[n][1] = 0.0f;
      if (!Shape::kPreRope && params_.q_bias != nullptr) {
        offsets.at[n][0] = now_->biases[n * 8 + lane_ % 4 * 2];
        offsets.at[n][1] = now_->biases[n * 8 + lane_ % 4 * 2 + 1];
      }
    }
    if constexpr (Shape::kPreRope) {
      const float unit = params_.scale_log2 * pre_rope_scores(keys, first, s);
      if (is_last) ring_.release_keys(k, lane_);
      weigh<kTiles>(s, offsets, flags, position + first * 16, unit, unit);
    } else {
      stored_scores(keys, first, s, offsets);
      if (is_last) ring_.release_keys(k, lane_);
      const float unit = params_.scale_log2 * now_->factors.key;
      weigh<kTiles>(s, offsets, flags, position + first * 16,
                    unit * (Shape::kAny ? 1.0f : key_unit(Shape::kKey, 0)),
                    unit * (Shape::kAny ? 1.0f : key_unit(Shape::kKey, 1)));
    }
    WeightFragments<kNTiles> p[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) pack_f16(s[i], p[i]);
    if (is_first) ring_.wait_values(v);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) add_stored(codes, first + i, p[i]);
  }

  // ---- keys before RoPE ----

  // Calls use(octets) with the number of octets of pairs that rotate as a constant.
  template <typename Use>
  __device__ __forceinline__ void with_octets(const Use& use) const;

  // The queries of the page (or the tile's page) in slot `k` become fragments.
  __device__ __forceinline__ void rotate_page_queries(Slot k) {
    const std::byte* row = ring_.data(k) + params_.slot_bytes - params_.pre_rope.row_bytes;
    const auto query = [this](int n, int octet) {
      const uint4* at = bf16_queries_ + staged(octet / 2, n * 8 + lane_ / 4, lane_ % 4);
      return reinterpret_cast<const float2*>(at)[octet % 2];
    };
    with_octets([&](auto octets) { rotate_queries<octets.value>(row, lane_, query, q_); });
  }

  __device__ __forceinline__ void rotate_tile_keys(int tile, KeyFragments<kHeadDim>& keys) const {
    with_octets([&](auto octets) {
      rotate_keys<octets.value>(params_.pre_rope.tokens, tile, lane_, keys);
    });
  }

  // Raw scores of kTiles tiles; returns their unit.
  __device__ __forceinline__ float pre_rope_scores(const KeyPage& page, int first,
                                                   float (&s)[kTiles][kNTiles][4]) const {
    float unit = 1.0f;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (Shape::kAny) {
        KeyFragments<kHeadDim> keys;
        unit = now_->factors.key * decode_any_keys(page, first + i, keys);
        undo_options(page, unit, keys);
        rotate_tile_keys(first + i, keys);
        fragment_scores(keys, q_, s[i]);
      } else {
        unit = now_->factors.key * pre_rope_unit(Shape::kKey);
        rotated_scores<Shape::kKey>(page, params_.pre_rope.tokens, first + i, lane_, q_, s[i]);
      }
    }
    return unit;
  }

  // A tile of keys in the format of the launch, and their unit.
  __device__ __forceinline__ float decode_any_keys(const KeyPage& page, int tile,
                                                   KeyFragments<kHeadDim>& keys) const;
  // +mean or +bias, +rot and +smooth, in the order of decoding; updates the keys' unit.
  __device__ __forceinline__ void undo_options(const KeyPage& page, float& unit,
                                               KeyFragments<kHeadDim>& keys) const;

  // ---- keys after RoPE ----

  __device__ __forceinline__ void stored_scores(const KeyPage& keys, int first,
                                                float (&s)[kTiles][kNTiles][4],
                                                ScoreOffsets<kNTiles>& offsets) const {
    if constexpr (!Shape::kAny) {
      if constexpr (!is_16_bit(Shape::kKey)) scores_of<Shape::kKey>(keys, first, s, offsets);
    } else {
      switch (params_.key_kernel) {
#define KVANT_CASE(kernel) \
  case KeyKernel::kernel: scores_of<KeyKernel::kernel>(keys, first, s, offsets); break;
        KVANT_CASE(kNvfp4)
        KVANT_CASE(kMxfp4)
        KVANT_CASE(kE4m3)
        KVANT_CASE(kE4m3Token)
        KVANT_CASE(kE5m2)
        KVANT_CASE(kMxfp8)
        KVANT_CASE(kInt8)
        KVANT_CASE(kInt4)
        KVANT_CASE(kInt4Channel)
        KVANT_CASE(kInt3Channel)
        KVANT_CASE(kInt2Channel)
#undef KVANT_CASE
        default: {
          const bool is_f16 = params_.key_kernel == KeyKernel::kF16;
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            tile_scores(keys.codes + (first + i) * kHeadDim * 32, is_f16, s[i]);
        }
      }
    }
    if constexpr (!is_channel(Shape::kKey)) {  // they have a zero per channel instead
      if (keys.mean != 0) mean_offsets(keys, lane_, q_, offsets);
    }
  }

  template <KeyKernel kKernel>
  __device__ __forceinline__ void scores_of(const KeyPage& keys, int first,
                                            float (&s)[kTiles][kNTiles][4],
                                            ScoreOffsets<kNTiles>& offsets) const {
    const auto queries = [this](int n, int step) {
      return f16_queries_[staged(step, n * 8 + lane_ / 4, lane_ % 4)];
    };
    page_scores<kKernel>(keys, first, lane_, q_, queries, Shape::kAny, s, offsets);
  }

  __device__ __forceinline__ void add_stored(const std::byte* codes, int tile,
                                             const WeightFragments<kNTiles>& p) {
    const std::byte* scales = codes + params_.stored.v_scales;
    if constexpr (!Shape::kAny) {
      if constexpr (!is_16_bit(Shape::kValue))
        add_values<Shape::kValue>(codes, scales, tile, lane_, p, sum_, zeros_);
    } else {
      switch (params_.value_kernel) {
#define KVANT_CASE(kernel)                                                        \
  case ValueKernel::kernel:                                                       \
    add_values<ValueKernel::kernel>(codes, scales, tile, lane_, p, sum_, zeros_); \
    break;
        KVANT_CASE(kNvfp4)
        KVANT_CASE(kMxfp4)
        KVANT_CASE(kE4m3)
        KVANT_CASE(kE4m3Token)
        KVANT_CASE(kE5m2)
        KVANT_CASE(kMxfp8)
        KVANT_CASE(kInt8)
        KVANT_CASE(kInt4)
        KVANT_CASE(kF16)
#undef KVANT_CASE
        case ValueKernel::kBf16: add_bf16_page_tile(codes + tile * kHeadDim * 32, p); break;
        default: break;
      }
    }
  }

  // BF16 values under keys of another kind: weights were packed as fp16 already, and are exact as
  // two BF16 numbers.
  __device__ __forceinline__ void add_bf16_page_tile(const std::byte* tile,
                                                     const WeightFragments<kNTiles>& p) {
    uint32_t weights[kNTiles][2][2];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 pair = ptx::f32_of_f16x2(p.b[n][h]);
        const uint2 split = split_bf16(pair.x, pair.y);
        weights[n][0][h] = split.x;
        weights[n][1][h] = split.y;
      }
    }
    add_bf16(tile, weights, ~0u, ~0u);
  }

  // ---- tiles of 16-bit pages ----

  __device__ __forceinline__ void run_tile(Slot k, Slot v, int flags, int position) {
    if ((flags >> kStepTileShift) % kTeam != warp_) {
      ring_.release_keys(k, lane_);
      ring_.wait_values(v);
      ring_.release(v, lane_);
      return;
    }
    const bool is_f16 = Shape::kMayBeF16 && (flags & kStepIsF16) != 0;
    float s[1][kNTiles][4];
    if constexpr (Shape::kPreRope) {
      rotate_page_queries(k);
      KeyFragments<kHeadDim> keys;
      decode_16_bit_keys(ring_.data(k), is_f16, lane_, keys);
      rotate_tile_keys(flags >> kStepTileShift, keys);
      fragment_scores(keys, q_, s[0]);
    } else {
      tile_scores(ring_.data(k), is_f16, s[0]);
    }
    ring_.release_keys(k, lane_);
    ScoreOffsets<kNTiles> offsets;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) offsets.at[n][0] = offsets.at[n][1] = 0.0f;
    weigh<1>(s, offsets, flags, position, params_.scale_log2, params_.scale_log2);
    ring_.wait_values(v);
    const std::byte* values = ring_.values(v, 16 * kHeadDim * 2);
    if (is_f16) {
      WeightFragments<kNTiles> p;
      pack_f16(s[0], p);
      add_values<ValueKernel::kF16>(values, values, 0, lane_, p, sum_, zeros_);
    } else {
      uint32_t weights[kNTiles][2][2];
      pack_bf16(s[0], weights);
      // Tokens beyond the last query hold whatever was there before; 0 times NaN is NaN.
      uint32_t keep[2] = {~0u, ~0u};
      if ((flags & kStepIsMasked) != 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = position + h * 8 + lane_ % 4 * 2;
          keep[h] = (token <= last_position() ? 0xffffu : 0u) |
                    (token + 1 <= last_position() ? 0xffff0000u : 0u);
        }
      }
      add_bf16(values, weights, keep[0], keep[1]);
    }
    ring_.release(v, lane_);
  }

  __device__ __forceinline__ int last_position() const {
    return now_->segment.first_position + now_->segment.num_tokens - 1;
  }

  __device__ __forceinline__ void tile_scores(const std::byte* tile, bool is_f16,
                                              float (&s)[kNTiles][4]) const {
    clear<kHeadDim>(s);
    TileReader<Codes::k16Bit, kHeadDim> reader(tile, lane_);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      reader.fragment(step, a);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        if (is_f16) {
          ptx::mma_f16(s[n], a, q_.b[n][step][0], q_.b[n][step][1]);
        } else {
          const uint4 q = bf16_queries_[staged(step, n * 8 + lane_ / 4, lane_ % 4)];
          ptx::mma_bf16(s[n], a, q.x, q.y);
          ptx::mma_bf16(s[n], a, q.z, q.w);
        }
      }
    }
  }

  // `weights`: [n-tile][rounded, rest][tokens 2 t .., 2 t + 8 ..]; `keep0`, `keep1` mask the
  // tokens.
  __device__ __forceinline__ void add_bf16(const std::byte* tile,
                                           const uint32_t (&weights)[kNTiles][2][2], uint32_t keep0,
                                           uint32_t keep1) {
    TileReader<Codes::k16Bit, kHeadDim> reader(tile, lane_);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      reader.fragment(step, a);
      a[0] &= keep0, a[1] &= keep0, a[2] &= keep1, a[3] &= keep1;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        ptx::mma_bf16(sum_.o[n][step], a, weights[n][0][0], weights[n][0][1]);
        ptx::mma_bf16(sum_.o[n][step], a, weights[n][1][0], weights[n][1][1]);
      }
    }
  }

  // ---- softmax ----

  // Raw scores become weights exp2(score - reference). Scores of rows 0-7 count `low` times, those
  // of rows 8-15 `high` times (log2 units); offsets are q . k units.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount][kNTiles][4],
                                        const ScoreOffsets<kNTiles>& offsets, int flags,
                                        int position, float low, float high) {
    float base[kNTiles][2];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
      base[n][0] = offsets.at[n][0] * params_.scale_log2,
      base[n][1] = offsets.at[n][1] * params_.scale_log2;
    if ((flags & kStepIsMasked) != 0 || params_.softcap != 0.0f) {
      finish_scores<kCount>(s, base, flags, position, low, high);
      low = high = 1.0f;
    }
    raise_reference<kCount>(s, base, low, high);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float minus[2] = {base[n][0] - reference_[n][0], base[n][1] - reference_[n][1]};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          s[i][n][k] = ptx::exp2_approx(fmaf(s[i][n][k], k < 2 ? low : high, minus[k % 2]));
        weight_[n][0] += s[i][n][0] + s[i][n][2];
        weight_[n][1] += s[i][n][1] + s[i][n][3];
      }
    }
  }

  // Softcap and masks, where there are any: scores in log2 units, offsets included.
  template <int kCount>
  __device__ __forceinline__ void finish_scores(float (&s)[kCount][kNTiles][4],
                                                float (&base)[kNTiles][2], int flags, int position,
                                                float low, float high) const {
    const float cap = params_.softcap * kLog2E;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = n * 8 + lane_ % 4 * 2 + k % 2;
        const int query = now_->segment.first_position + r / params_.group;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          float x = fmaf(s[i][n][k], k < 2 ? low : high, base[n][k % 2]);
          if (params_.softcap != 0.0f) x = cap * tanhf(x / cap);
          const int key = position + i * 16 + lane_ / 4 + k / 2 * 8;
          const bool seen = key <= query && (params_.window == 0 || key > query - params_.window ||
                                             key < params_.sink_tokens);
          if ((flags & kStepIsMasked) != 0 && !seen) x = -INFINITY;
          s[i][n][k] = x;
        }
      }
      base[n][0] = base[n][1] = 0.0f;
    }
  }

  // The reference follows the maximum only when some score exceeds it: most pages skip all but the
  // vote.
  template <int kCount>
  __device__ __forceinline__ void raise_reference(const float (&s)[kCount][kNTiles][4],
                                                  const float (&base)[kNTiles][2], float low,
                                                  float high) {
    float top[kNTiles][2];
    bool above = false;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float first = s[0][n][c], second = s[0][n][c + 2];
#pragma unroll
        for (int i = 1; i < kCount; ++i)
          first = fmaxf(first, s[i][n][c]), second = fmaxf(second, s[i][n][c + 2]);
        top[n][c] = fmaxf(first * low, second * high) + base[n][c] - kWeightShift;
        above = above || top[n][c] > reference_[n][c];
      }
    }
    if (!__any_sync(~0u, above)) return;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      float factor[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          top[n][c] = fmaxf(top[n][c], __shfl_xor_sync(~0u, top[n][c], distance));
        const float reference = fmaxf(reference_[n][c], top[n][c]);
        factor[c] = ptx::exp2_approx(reference_[n][c] - reference);
        reference_[n][c] = reference;
        weight_[n][c] *= factor[c];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) sum_.o[n][step][k] *= factor[k % 2];
        if constexpr (Shape::kNeedsZeros) zeros_[n][k] *= factor[k % 2];
      }
    }
  }

  // Weights of tokens g, g + 8 become B fragments.
  __device__ __forceinline__ static void pack_f16(const float (&w)[kNTiles][4],
                                                  WeightFragments<kNTiles>& p) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      p.b[n][0] = ptx::movmatrix(ptx::f16x2_of_f32(w[n][0], w[n][1]));
      p.b[n][1] = ptx::movmatrix(ptx::f16x2_of_f32(w[n][2], w[n][3]));
    }
  }
  // The same as BF16 and rest, in the unit of the stored values' sums.
  __device__ __forceinline__ void pack_bf16(const float (&w)[kNTiles][4],
                                            uint32_t (&weights)[kNTiles][2][2]) const {
    const float unit = 1.0f / now_->factors.value;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint2 split = split_bf16(w[n][2 * h] * unit, w[n][2 * h + 1] * unit);
        weights[n][0][h] = ptx::movmatrix(split.x);
        weights[n][1][h] = ptx::movmatrix(split.y);
      }
    }
  }

  // ---- end of a segment ----

  // References and sums of weights of this warp's tokens, by query row.
  __device__ __forceinline__ void put_states(float2* states) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          weight_[n][c] += __shfl_xor_sync(~0u, weight_[n][c], distance);
        if (lane_ < 4) states[n * 8 + lane_ * 2 + c] = {reference_[n][c], weight_[n][c]};
      }
    }
  }

  __device__ __forceinline__ std::byte* team_memory() const {
    return reinterpret_cast<std::byte*>(bf16_queries_);
  }

  __device__ __forceinline__ void describe(BlockResult<Shape>& result,
                                           const Segment& segment) const {
    result.unit = segment.unit;
    result.partial = segment.partial;
    result.first_row = segment.first_row;
    result.num_rows = segment.num_rows;
    result.kv_head = segment.kv_head;
  }

  // The team's last segment: each warp leaves its sums as they are to the block's merge.
  __device__ __forceinline__ void leave_result(const Segment& segment) {
    BlockResult<Shape>& result = results_[1];
    put_states(result.states[warp_]);
    if (warp_ == 0 && lane_ == 0) {
      describe(result, segment);
      result.factor = now_->factors.value;
    }
    float* sums = left_sums<Shape>(ring_.slots, team_memory(), warp_);
    sync_team();  // no warp of the team reads the ring any more
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int r = n * 8 + lane_ % 4 * 2 + c;
        if (r >= segment.num_rows) continue;
        float* out = sums + r * Shape::kRowStride + lane_ / 4;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          out[step * 16] = sum_.o[n][step][c];
          out[step * 16 + 8] = sum_.o[n][step][c + 2];
        }
      }
    }
  }

  // An earlier segment: the warps exchange their sums through shared memory; each finishes a part
  // of the channels.
  __device__ __forceinline__ void finish(const Segment& segment, int worker) {
    float reference[kNTiles][2], weight[kNTiles][2], factor[kTeam][kNTiles][2];
    put_states(states_ + warp_ * kNTiles * 8);
    // The exchange may lie where the fp16 queries were staged. In a segment that the ring holds as
    // a whole, nothing else keeps a warp from being here while another still reads its queries.
    if constexpr (Shape::kF16QueryBytes == 0) sync_team();
    send();
    sync_team();
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float2 state[kTeam];
        reference[n][c] = kNoReference;
        weight[n][c] = 0.0f;
#pragma unroll
        for (int w = 0; w < kTeam; ++w) {
          state[w] = states_[(w * kNTiles + n) * 8 + lane_ % 4 * 2 + c];
          reference[n][c] = fmaxf(reference[n][c], state[w].x);
        }
#pragma unroll
        for (int w = 0; w < kTeam; ++w) {
          factor[w][n][c] = ptx::exp2_approx(state[w].x - reference[n][c]);
          weight[n][c] = fmaf(state[w].y, factor[w][n][c], weight[n][c]);
        }
      }
    }
    receive(factor);
    write(segment, worker, reference, weight);
  }

  __device__ __forceinline__ static constexpr int owner(int step) {
    return step * kTeam / kSteps;
  }
  __device__ __forceinline__ float* exchange(int source, int step, int n) const {
    return exchange_ + ((source * kSteps + step) * kNTiles + n) * 128 + lane_ * 4;
  }

  __device__ __forceinline__ void send() const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (owner(step) == warp_) continue;
      const int source = warp_ < owner(step) ? warp_ : warp_ - 1;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const float(&o)[4] = sum_.o[n][step];
        *reinterpret_cast<float4*>(exchange(source, step, n)) = {o[0], o[1], o[2], o[3]};
      }
    }
  }

  __device__ __forceinline__ void receive(const float (&factor)[kTeam][kNTiles][2]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (owner(step) != warp_) continue;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        float total[4];
        const int own = owner(step);
#pragma unroll
        for (int k = 0; k < 4; ++k) total[k] = sum_.o[n][step][k] * factor[own][n][k % 2];
#pragma unroll
        for (int w = 0; w < kTeam; ++w) {
          if (w == own) continue;
          const float4 o = *reinterpret_cast<const float4*>(exchange(w < own ? w : w - 1, step, n));
          total[0] = fmaf(o.x, factor[w][n][0], total[0]);
          total[1] = fmaf(o.y, factor[w][n][1], total[1]);
          total[2] = fmaf(o.z, factor[w][n][0], total[2]);
          total[3] = fmaf(o.w, factor[w][n][1], total[3]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) sum_.o[n][step][k] = total[k] * now_->factors.value;
      }
    }
  }

  // To the output if the unit is complete; to the block if other teams add to it; else to the
  // partial results of blocks.
  __device__ __forceinline__ void write(const Segment& segment, int worker,
                                        const float (&reference)[kNTiles][2],
                                        const float (&weight)[kNTiles][2]) const {
    BlockResult<Shape>& result = results_[0];
    float* sums = params_.worker_sums + static_cast<int64_t>(worker) * params_.max_rows * kHeadDim;
    if (segment.is_shared != 0 && warp_ == 0 && lane_ == 0) {
      describe(result, segment);
      result.factor = 1.0f;
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int r = n * 8 + lane_ % 4 * 2 + c;
        if (r >= segment.num_rows) continue;
        float* out;
        float factor = 1.0f;
        const float2 state = {reference[n][c], weight[n][c]};
        if (segment.is_shared != 0) {
          out = sums + r * kHeadDim;
          if (warp_ == 0 && lane_ < 4) result.states[0][r] = state;
        } else if (segment.partial >= 0) {
          const int64_t at = static_cast<int64_t>(segment.partial) * params_.max_rows + r;
          out = params_.partial_sums + at * kHeadDim;
          if (warp_ == 0 && lane_ < 4) params_.partial_states[at] = state;
        } else {
          const QueryRow at = query_row(params_, segment.first_row, segment.kv_head, r);
          out = params_.out + (at.row * params_.num_query_heads + at.head) * kHeadDim;
          factor = finish_row(params_, at, state, warp_ == 0 && lane_ < 4);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (owner(step) != warp_) continue;
          out[step * 16 + lane_ / 4] = sum_.o[n][step][c] * factor;
          out[step * 16 + lane_ / 4 + 8] = sum_.o[n][step][c + 2] * factor;
        }
      }
    }
  }

  const DecodeParams& params_;
  TeamRing ring_;
  BlockResult<Shape>* results_;  // of the team: first and last segment
  const int team_;
  const int warp_;  // of the team
  const int lane_;
  // [staged()]: channels 2t.., 2t + 8.., rounded, then the rest; kPreRope: the four in fp32.
  uint4* bf16_queries_;
  uint2* f16_queries_;  // [staged()]; where the exchange is, unless keys scale them page by page
  float* exchange_;     // [source][step][n-tile][lane][4]
  float2* states_;      // [warp][query row]
  TeamSegment* now_;

  QueryFragments<kHeadDim, kNTiles> q_;
  Accumulators<kHeadDim, kNTiles> sum_;
  float zeros_[kNTiles][4];
  float reference_[kNTiles][2];
  float weight_[kNTiles][2];
};

}  // namespace kvant::backend::cuda

#include "kvant/backend/cuda/decode/consumer_pre_rope.cuh"
