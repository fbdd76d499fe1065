#include "kvant/formats/codec_levels.h"

#include "kvant/formats/codec_scalar.h"
#include "kvant/formats/transform.h"

namespace kvant::formats::internal {

const FormatKernels& format_kernels(FormatId id, CpuLevel) {
  return scalar_kernels(id);
}

const PageKernels& page_kernels(int, CpuLevel) {
  return scalar_page_kernels();
}

}  // namespace kvant::formats::internal
