// Prefill attention by mma.sync, for GPUs without wgmma: compute capability 8.0 and later, with as
// little shared memory as they have (99 KiB a block).
//
// A block has the 128 rows of a query tile, a warp 16 of one half or, where registers allow, 16 of
// each: what it loads of keys and values then serves twice as many products. It reads the same
// images and plan as the Hopper kernel and shares its masks, softmax and outputs
// (attention_rows.cuh): a thread of mma.m16n8k16 has the rows and columns that one of wgmma has.
// Images come by cp.async into a ring of sides, some keys at a time: keys, their values, the next
// keys and so on.
#include <algorithm>
#include <string>

#include "kvant/backend/cuda/prefill/attention_rows.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

template <int kHeadDim>
struct GenericShape {
  static constexpr int kHalves = kHeadDim > 128 ? 1 : 2;  // of the tile's rows, of a warp
  static constexpr int kThreads = 256 / kHalves;
  static constexpr int kStep = kHeadDim > 128 ? 32 : 64;                // keys at a time
  static constexpr int kSteps = PrefillShape<kHeadDim>::kKeys / kStep;  // of a key tile
  static constexpr int kParts = PrefillShape<kHeadDim>::kParts;
  static constexpr int kQueryPart = PrefillShape<kHeadDim>::kQueryPart;
  static constexpr int kPart = kStep * 128;  // bytes of 64 channels of a side
  static constexpr int kSide = kParts * kPart;
  static constexpr int kBuffers = kHeadDim > 192 ? 2 : 4;
  static constexpr int kBlocks = kHalves;  // on a multiprocessor, if its shared memory allows
  // Shared memory from a 1024-byte boundary on.
  static constexpr int kSides = kParts * kQueryPart;
  static constexpr int kShifts = kSides + kBuffers * kSide;
  static constexpr int kBytes = kShifts + 2 * kTileRows * 4 + 1024;
  static_assert(kBytes <= 99 * 1024, "what a block has on every GPU");
};

// One item's sides in the order of use, 2 n the keys and 2 n + 1 the values of step n; steps go
// from the end of the tile's list to its begin.
template <int kHeadDim>
class Sides {
 public:
  using Shape = GenericShape<kHeadDim>;

  __device__ Sides(const PrefillKernelArgs& args, const QueryTile& tile, int head, uint32_t ring)
      : args_(args),
        tile_(tile),
        head_(args.images + head * args.head_stride),
        ring_(ring),
        num_sides_(2 * Shape::kSteps * tile.num_key_tiles) {
#pragma unroll
    for (int i = 0; i < Shape::kBuffers - 1; ++i) start_next();
  }

  // Starts the copy of one more side; an empty one after the last keeps the count of groups.
  __device__ void start_next() {
    if (next_ < num_sides_) copy(next_);
    ptx::copies_commit();
    ++next_;
  }

  // The next side, for all threads; the one before it has been read by all, and its place is
  // filled.
  __device__ uint32_t take() {
    ptx::copies_wait<Shape::kBuffers - 2>();
    __syncthreads();
    const uint32_t at = ring_ + taken_++ % Shape::kBuffers * Shape::kSide;
    start_next();
    return at;
  }

 private:
  // A thread 16 bytes of some keys in each part.
  __device__ void copy(int side) {
    const int step = side / 2;
    const int slices = PrefillShape<kHeadDim>::kKeys >> args_.slice_shift;
    const int first_slice = tile_.num_slices - (step / Shape::kSteps + 1) * slices;
    const int slices_shift = args_.page_shift - args_.slice_shift;
    const int64_t part_bytes = int64_t{args_.page_tokens} * 128;
    const uint32_t buffer = ring_ + side % Shape::kBuffers * Shape::kSide;
#pragma unroll
    for (int i = 0; i < Shape::kStep * 8 / Shape::kThreads; ++i) {
      const int chunk = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      const int key = step % Shape::kSteps * Shape::kStep + chunk / 8;  // in the key tile
      // Slices before the list's begin are masked: any image will do.
      const int place = slice_place(tile_, max(first_slice + (key >> args_.slice_shift), 0));
      const int token = ((place & ((1 << slices_shift) - 1)) << args_.slice_shift) +
                        (key & ((1 << args_.slice_shift) - 1));
      const std::byte* source =
          head_ + ((place >> slices_shift) * 2 + side % 2) * (Shape::kParts * part_bytes) +
          token * 128 + chunk % 8 * 16;
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part)
        ptx::copy_16(buffer + part * Shape::kPart + chunk * 16, source + part * part_bytes);
    }
  }

  const PrefillKernelArgs& args_;
  const QueryTile& tile_;
  const std::byte* head_;
  const uint32_t ring_;
  const int num_sides_;
  int next_ = 0;
  int taken_ = 0;
};

// 16-byte chunk `chunk` of row `row` of a part, as images are swizzled.
__device__ __forceinline__ uint32_t swizzled(uint32_t part, int row, int chunk) {
  return part + row * 128 + ((chunk ^ (row % 8)) << 4);
}

// Of a warp's rows of one half of the tile.
template <int kHeadDim>
struct HalfTile {
  RowState<kHeadDim> state;
  float shift[2];
  float s[GenericShape<kHeadDim>::kStep / 2];  // scores, then weights
};
template <int kHeadDim>
using Halves = HalfTile<kHeadDim>[GenericShape<kHeadDim>::kHalves];

// The half of the tile that a thread's h-th rows are of.
template <int kHeadDim>
__device__ __forceinline__ int half_of(int h) {
  return GenericShape<kHeadDim>::kHalves == 1 ? static_cast<int>(threadIdx.x) / 128 : h;
}

// Scores of a warp's rows with the keys of a step.
template <int kHeadDim>
__device__ __forceinline__ void make_scores(uint32_t queries, uint32_t keys,
                                            Halves<kHeadDim>& halves) {
  using Shape = GenericShape<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane % 16;
  const int key = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (HalfTile<kHeadDim>& half : halves) {
#pragma unroll
    for (float& score : half.s) score = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[Shape::kHalves][4];
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h) {
      load_matrices<false>(swizzled(queries + step / 4 * Shape::kQueryPart,
                                    half_of<kHeadDim>(h) * 64 + row, step % 4 * 2 + lane / 16),
                           a[h]);
    }
#pragma unroll
    for (int n = 0; n < Shape::kStep / 16; ++n) {
      uint32_t b[4];
      load_matrices<false>(
          swizzled(keys + step / 4 * Shape::kPart, n * 16 + key, step % 4 * 2 + lane / 8 % 2), b);
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h) {
        float* const s = halves[h].s + 8 * n;
        ptx::mma_f16(*reinterpret_cast<float(*)[4]>(s), a[h], b[0], b[1]);
        ptx::mma_f16(*reinterpret_cast<float(*)[4]>(s + 4), a[h], b[2], b[3]);
      }
    }
  }
}

// Adds weights times the values of a step.
template <int kHeadDim>
__device__ __forceinline__ void add_values(uint32_t values, Halves<kHeadDim>& halves) {
  using Shape = GenericShape<kHeadDim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < Shape::kStep / 16; ++step) {
    uint32_t p[Shape::kHalves][4];
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h) {
      const float* const weights = halves[h].s + 8 * step;
#pragma unroll
      for (int i = 0; i < 4; ++i) p[h][i] = ptx::f16x2_of_f32(weights[2 * i], weights[2 * i + 1]);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      load_matrices<true>(
          swizzled(values + n / 4 * Shape::kPart, step * 16 + lane % 16, n % 4 * 2 + lane / 16), b);
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h) {
        float* const out = halves[h].state.out + 8 * n;
        ptx::mma_f16(*reinterpret_cast<float(*)[4]>(out), p[h], b[0], b[1]);
        ptx::mma_f16(*reinterpret_cast<float(*)[4]>(out + 4), p[h], b[2], b[3]);
      }
    }
  }
}

// Scores of step n become weights; sums so far shrink.
template <int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void weigh(const PrefillKernelArgs& args, const QueryTile& tile, int n,
                                      int number, HalfTile<kHeadDim>& half) {
  using Shape = GenericShape<kHeadDim>;
  constexpr int kStep = Shape::kStep;
  const int key_tile = n / Shape::kSteps;
  if constexpr (kSoftcap) {
#pragma unroll
    for (int j = 0; j < kStep / 2; ++j)
      half.s[j] = capped(half.s[j], half.shift[j / 2 % 2], args.cap);
  }
  if (key_tile < tile.whole_begin || key_tile >= tile.whole_end || key_tile == 0) {
    const int slices = PrefillShape<kHeadDim>::kKeys >> args.slice_shift;
    mask_scores<kStep>(half.s, args, tile, tile.num_slices - (key_tile + 1) * slices,
                       n % Shape::kSteps * kStep, place_rows(args, tile, 0, number).position);
  }
  float factor[2];
  softmax_tile<kStep, true>(half.s, half.state.max, half.state.sum, factor);
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    half.state.out[4 * j] *= factor[0];
    half.state.out[4 * j + 1] *= factor[0];
    half.state.out[4 * j + 2] *= factor[1];
    half.state.out[4 * j + 3] *= factor[1];
  }
}

template <int kHeadDim, bool kSoftcap>
__device__ __forceinline__ void run_item(const PrefillKernelArgs& args, const WorkItem& work,
                                         uint32_t base) {
  using Shape = GenericShape<kHeadDim>;
  const QueryTile& tile = args.tiles[work.tile];
  const int kv_head = args.first_head + work.head;
  const float* value_scales = args.references +
                              (static_cast<int64_t>(tile.sequence) * args.num_kv_heads + kv_head) *
                                  reference_floats(kHeadDim) +
                              kHeadDim;
  const bool shifted = kSoftcap || args.sink_logits != nullptr || args.lse != nullptr;
  Sides<kHeadDim> sides(args, tile, work.head, base + Shape::kSides);
  Halves<kHeadDim> halves;
#pragma unroll
  for (int h = 0; h < Shape::kHalves; ++h) {
    const int number = half_of<kHeadDim>(h);
    load_queries<kHeadDim>(args, tile, kv_head, number, base);
    if (shifted) load_shifts<kHeadDim>(args, tile, kv_head, number, base + Shape::kShifts);
    HalfTile<kHeadDim>& half = halves[h];
    RowState<kHeadDim>& state = half.state;
    state.max[0] = state.max[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0.0f;
    half.shift[0] = half.shift[1] = 0.0f;
#pragma unroll
    for (float& out : state.out) out = 0.0f;
    if (tile.resumes == 0) continue;
    const RowPlace place = place_rows(args, tile, kv_head, number);
    resume_rows<kHeadDim>(args, place, value_scales[0], 0.0f, state);
  }

  const int steps = Shape::kSteps * tile.num_key_tiles;
#pragma unroll 1
  for (int n = 0; n < steps; ++n) {
    const uint32_t keys = sides.take();
    if (n == 0 && shifted) {  // all threads have passed a barrier since they were written
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h) {
        const RowPlace place = place_rows(args, tile, kv_head, half_of<kHeadDim>(h));
        halves[h].shift[0] = shift_of(base + Shape::kShifts, place.row[0]);
        halves[h].shift[1] = shift_of(base + Shape::kShifts, place.row[1]);
      }
    }
    make_scores<kHeadDim>(base, keys, halves);
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h)
      weigh<kHeadDim, kSoftcap>(args, tile, n, half_of<kHeadDim>(h), halves[h]);
    add_values<kHeadDim>(sides.take(), halves);
  }
#pragma unroll
  for (int h = 0; h < Shape::kHalves; ++h) {
    HalfTile<kHeadDim>& half = halves[h];
    if constexpr (kSoftcap) half.shift[0] = half.shift[1] = 0.0f;  // already in the scores
    const RowPlace place = place_rows(args, tile, kv_head, half_of<kHeadDim>(h));
    store_rows<kHeadDim>(args, tile, place, half.shift, value_scales[1], half.state);
  }
  __syncthreads();  // everything is read before the next item's is written
}

template <int kHeadDim, bool kSoftcap>
__global__ __launch_bounds__(
    GenericShape<kHeadDim>::kThreads,
    GenericShape<kHeadDim>::kBlocks) void attention_generic(const __grid_constant__
                                                                PrefillKernelArgs args) {
  extern __shared__ uint8_t shared[];
  const uint32_t base = (ptx::shared_address(shared) + 1023u) & ~1023u;
  for (int i = static_cast<int>(blockIdx.x); i < args.num_items; i += static_cast<int>(gridDim.x))
    run_item<kHeadDim, kSoftcap>(args, args.items[i], base);
}

template <int kHeadDim>
Status launch(const PrefillKernelArgs& args, int num_processors, cudaStream_t stream) {
  using Shape = GenericShape<kHeadDim>;
  const auto kernel =
      args.cap > 0.0f ? attention_generic<kHeadDim, true> : attention_generic<kHeadDim, false>;
  KVANT_TRY(cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes),
      "asking for shared memory of prefill attention"));
  const int blocks = std::min(args.num_items, num_processors * Shape::kBlocks);
  kernel<<<blocks, Shape::kThreads, Shape::kBytes, stream>>>(args);
  return launch_status("prefill attention without wgmma, head_dim " + std::to_string(kHeadDim));
}

}  // namespace

Status launch_prefill_attention_generic(int head_dim, const PrefillKernelArgs& args,
                                        int num_processors, cudaStream_t stream) {
  return for_head_dim(head_dim, [&](auto dim) {
    return launch<decltype(dim)::value>(args, num_processors, stream);
  });
}

}  // namespace kvant::backend::cuda
