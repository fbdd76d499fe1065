#include "kvant/backend/cuda/prefill/attention_kernel.cuh"

namespace kvant::backend::cuda {

Status launch_prefill_attention_with_images(const PrefillKernelArgs& args,
                                            const BackgroundImages& images, int num_processors,
                                            cudaStream_t stream) {
  const UnitKind& stored = images.dequantise.kinds[cache::kKindStored];
  const auto launch = [&](auto pair) {
    return launch_prefill_kernel<128, false, decltype(pair)>(args, images, num_processors, stream);
  };
  switch (stored.k.format) {
    case FormatId::kNvfp4: return launch(WrittenImages<FormatId::kNvfp4, FormatId::kNvfp4>{});
    case FormatId::kInt4Channel:
      return launch(WrittenImages<FormatId::kInt4Channel, FormatId::kNvfp4>{});
    case FormatId::kInt8: return launch(WrittenImages<FormatId::kInt8, FormatId::kInt8>{});
    default: return launch(WrittenImages<FormatId::kBf16, FormatId::kBf16>{});
  }
}

}  // namespace kvant::backend::cuda
