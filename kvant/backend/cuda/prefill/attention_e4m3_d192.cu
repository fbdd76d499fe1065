#include "kvant/backend/cuda/prefill/attention_e4m3_kernel.cuh"

namespace kvant::backend::cuda {
template Status launch_prefill_attention_e4m3_of<192>(const PrefillKernelArgs&, int, cudaStream_t);
}  // namespace kvant::backend::cuda
