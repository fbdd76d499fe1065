#include "kvant/model/random_rows.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "kvant/base/check.h"

namespace kvant::model {
namespace {

constexpr int64_t kPieceValues = int64_t{1} << 20;  // generated and uploaded at once

// Box and Muller 1958: two normal values of two uniform ones.
void fill_normal(SplitMix64& random, std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - random.uniform()));
    const double angle = 2.0 * std::numbers::pi * random.uniform();
    values[i] = static_cast<float>(radius * std::cos(angle));
    if (i + 1 < values.size()) values[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

}  // namespace

Result<RandomRows> RandomRows::create(backend::Backend& backend, std::span<std::byte> scratch,
                                      const Options& options) {
  const backend::ActivationType type = backend.info().activation_type;
  const int64_t row_bytes = backend::activation_bytes(type, options.width);
  const int64_t num_rows =
      std::min(options.num_rows, static_cast<int64_t>(scratch.size()) / row_bytes);
  const int64_t num_values = num_rows * options.width;
  SplitMix64 random(options.seed);
  std::vector<float> piece;
  for (int64_t done = 0; done < num_values;) {
    const int64_t count = std::min(kPieceValues, num_values - done);
    piece.resize(static_cast<size_t>(count));
    fill_normal(random, piece);
    std::byte* const target = scratch.data() + backend::activation_bytes(type, done);
    KVANT_TRY(backend.upload_f32(piece.data(), count, target));
    done += count;
  }
  return RandomRows(scratch.data(), row_bytes, num_rows, random.next());
}

const void* RandomRows::take(int64_t num_rows) {
  KVANT_CHECK(num_rows <= num_rows_, "a run of rows fits among them");
  const auto places = static_cast<uint64_t>(num_rows_ - num_rows + 1);
  return rows_ + static_cast<int64_t>(random_.next() % places) * row_bytes_;
}

}  // namespace kvant::model
