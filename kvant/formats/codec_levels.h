// Which inner loops a codec uses at a CPU level. Internal to formats/.
#pragma once

#include "kvant/base/cpu_level.h"
#include "kvant/formats/codec_kernels.h"
#include "kvant/formats/format.h"

namespace kvant::formats::internal {

// SIMD kernels of a format, or the scalar ones where the level has none: a new format works at
// every level without a line here. A SIMD version is a row in codec_levels.cc.
const FormatKernels& format_kernels(FormatId id, CpuLevel level);
// For rows of `dim` values.
const PageKernels& page_kernels(int dim, CpuLevel level);

}  // namespace kvant::formats::internal
