// Rows of random keys and values in a backend's memory, for caches on which only speed and memory
// are measured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/base/result.h"
#include "kvant/model/random.h"

namespace kvant::model {

// Normal values of mean 0 and variance 1, generated and uploaded once; every layer of every step
// takes a run of rows from another place among them. The same seed, sizes and calls give the same
// rows. Thread-compatible.
class RandomRows {
 public:
  struct Options {
    int64_t width = 0;     // values of a row
    int64_t num_rows = 0;  // fewer if `scratch` is smaller
    uint64_t seed = 1;
  };
  // `scratch`: memory of the backend that stays unused as long as runs are read.
  static Result<RandomRows> create(backend::Backend& backend, std::span<std::byte> scratch,
                                   const Options& options);
  // `num_rows` rows [num_rows][width], at most num_rows() of them.
  const void* take(int64_t num_rows);
  int64_t num_rows() const { return num_rows_; }

 private:
  RandomRows(std::byte* rows, int64_t row_bytes, int64_t num_rows, uint64_t seed)
      : rows_(rows), row_bytes_(row_bytes), num_rows_(num_rows), random_(seed) {}

  std::byte* rows_;
  int64_t row_bytes_;
  int64_t num_rows_;
  SplitMix64 random_;  // of the places
};

}  // namespace kvant::model
