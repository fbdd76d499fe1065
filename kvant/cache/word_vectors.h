// Sixteen bytes at a time, in the vector language of g++ and clang: what layout converters use
// on every processor. Internal to kvant/cache.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvant::cache::internal {

using Words = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(16)));
using Bytes = uint8_t __attribute__((vector_size(16)));

template <typename Vector>
Vector load_vector(const void* p) {
  Vector x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline Words load_words(const void* p) {
  return load_vector<Words>(p);
}
template <typename Vector>
void store_words(void* p, Vector x) {
  std::memcpy(p, &x, sizeof(x));
}

inline Words interleave_low(Words a, Words b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
inline Words interleave_high(Words a, Words b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

inline Halves interleave_low(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Halves interleave_high(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Bytes interleave_low(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes interleave_high(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
// The low bytes of a, then of b.
inline Bytes low_bytes(Halves a, Halves b) {
  return __builtin_shufflevector((Bytes)a, (Bytes)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24,
                                 26, 28, 30);
}

// Byte j of rows[i] becomes byte i of word j.
inline void store_byte_columns(const Bytes (&rows)[4], uint8_t* words) {
  const auto a = (Halves)interleave_low(rows[0], rows[1]);
  const auto b = (Halves)interleave_low(rows[2], rows[3]);
  const auto c = (Halves)interleave_high(rows[0], rows[1]);
  const auto d = (Halves)interleave_high(rows[2], rows[3]);
  store_words(words, interleave_low(a, b));
  store_words(words + 16, interleave_high(a, b));
  store_words(words + 32, interleave_low(c, d));
  store_words(words + 48, interleave_high(c, d));
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
