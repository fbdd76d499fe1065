// Attention of many query rows over pages that their sequences share (cuda-shared-prefix.md).
//
// A block walks its items of the plan page by page. A lane keeps a ring of pages as stored full;
// producer warps turn each page into FP16 images in shared memory; two consumer warpgroups with 64
// query rows each run wgmma on them: S = Q K^T with Q in registers, softmax in registers, O += P V.
// Scores of a page and the product of the page before are under way together. Sums, references and
// weights are those of the decode kernel, which runs on the other multiprocessors meanwhile and
// whose merge takes them.
#pragma once

#include "kvant/backend/cuda/shared/consumer.cuh"
#include "kvant/backend/cuda/shared/producer.cuh"

namespace kvant::backend::cuda {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    shared_kernel(const __grid_constant__ SharedParams params) {
  extern __shared__ std::byte memory[];
  const uint32_t offset = (0u - ptx::shared_address(memory)) & 1023u;
  std::byte* shared = memory + offset;
  if (threadIdx.x == 0) {
    const uint32_t bars = ptx::shared_address(shared) + Shape::kBarriers;
    for (int i = 0; i < kMaxSharedSlots; ++i) {
      ptx::mbarrier_init(bars + 8 * (kRawFull + i), 1);
      ptx::mbarrier_init(bars + 8 * (kRawEmpty + i), Shape::kProducers);
    }
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::mbarrier_init(bars + 8 * (kSharedKeysFull + i), Shape::kProducers);
      ptx::mbarrier_init(bars + 8 * (kSharedKeysEmpty + i), 8);
      ptx::mbarrier_init(bars + 8 * (kSharedValuesFull + i), Shape::kProducers);
      ptx::mbarrier_init(bars + 8 * (kSharedValuesEmpty + i), 8);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 8) {
    ptx::decrease_registers<Shape::kProducerRegisters>();
    produce_images<Shape>(params, shared, warp - 8, static_cast<int>(threadIdx.x) % 32);
  } else {
    ptx::increase_registers<Shape::kConsumerRegisters>();
    SharedConsumer<Shape> consumer(params, ptx::shared_address(shared), warp / 4);
    ptx::wait_prerequisites();  // queries, and partial results that the merge before still reads
    ptx::launch_dependents();   // decode, on the other multiprocessors: it does not wait for us
    consumer.run();
  }
}

}  // namespace kvant::backend::cuda
