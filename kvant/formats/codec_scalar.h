// The scalar codec of every format, made from its header: the oracle. Internal to formats/.
#pragma once

#include "kvant/formats/codec_kernels.h"
#include "kvant/formats/format.h"

namespace kvant::formats::internal {

const FormatKernels& scalar_kernels(FormatId id);
const PageKernels& scalar_page_kernels();
// FormatInfo-like fact that needs the type: see max_magnitude in format_concept.h.
float max_magnitude(FormatId id, float global_scale);

// Rotation for any dim and block (a power of two that divides dim).
void rotate_scalar(float* x, int64_t rows, int64_t dim, int64_t block, float scale);

}  // namespace kvant::formats::internal
