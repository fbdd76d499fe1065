// Four 32-bit words at a time, in the vector language of g++ and clang: what layout converters use
// on every processor. Internal to kvant/cache.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvant::cache::internal {

using Words = uint32_t __attribute__((vector_size(16)));

inline Words load_words(const void* p) {
  Words x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store_words(void* p, Words x) {
  std::memcpy(p, &x, sizeof(x));
}

inline Words interleave_low(Words a, Words b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
inline Words interleave_high(Words a, Words b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// x[i][j] becomes x[j][i].
inline void transpose(Words (&x)[4]) {
  const Words a = interleave_low(x[0], x[2]);
  const Words b = interleave_low(x[1], x[3]);
  const Words c = interleave_high(x[0], x[2]);
  const Words d = interleave_high(x[1], x[3]);
  x[0] = interleave_low(a, b);
  x[1] = interleave_high(a, b);
  x[2] = interleave_low(c, d);
  x[3] = interleave_high(c, d);
}

}  // namespace kvant::cache::internal
