// Moves the blocks of one row of a GGUF matrix into its lane of a tile; one entry per kind.
#pragma once

#include <cstdint>

#include "kvant/backend/cpu/matrix_layout.h"

namespace kvant::backend::cpu {

struct RepackFormat {
  int block_inputs;  // inputs of one block of the file (1 for floats)
  int code_bytes;    // of one block and one row, in the tile's codes
  int scale_bytes;   // likewise in its scales
  // Writes lane `lane` of the tile whose codes and scales are at the two pointers; `row` is the
  // file's, from its head on.
  void (*pack_row)(const uint8_t* row, int64_t num_blocks, int lane, uint8_t* codes,
                   uint8_t* scales);
  int row_scale_bytes = 0;  // of one row, in the tile's scales
};

const RepackFormat& repack_format(WeightKind kind);

}  // namespace kvant::backend::cpu
