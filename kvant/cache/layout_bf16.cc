// BF16 units: rows in (appending) and rows out (closing); `cpu` layout by words.
#include <cstring>

#include "kvant/base/check.h"
#include "kvant/base/small_floats.h"
#include "kvant/cache/layout.h"
#include "kvant/cache/word_vectors.h"

namespace kvant::cache {

using internal::interleave_high;
using internal::interleave_low;
using internal::load_words;
using internal::store_words;
using internal::transpose;
using internal::Words;

namespace {

constexpr int kTile = 16;

// Words hold two BF16 numbers; as fp32 these are the low and the high half moved to the top.
Words low_floats(Words words) {
  return words << 16;
}
Words high_floats(Words words) {
  return words & 0xffff0000u;
}

// to_bf16 of fp32 numbers, in the upper halves.
Words bf16_on_top(Words u) {
  using Signed = int32_t __attribute__((vector_size(16)));
  const Words rounded = u + 0x7fff + (u >> 16 & 1);
  const auto nan = (Words)((Signed)(u & 0x7fffffff) > 0x7f800000);
  return ((nan & (u | 0x400000)) | (~nan & rounded)) & 0xffff0000;
}

void store_word(uint8_t* p, uint32_t word) {
  std::memcpy(p, &word, sizeof(word));
}
void store_half(uint8_t* p, uint32_t word) {
  const auto half = static_cast<uint16_t>(word);
  std::memcpy(p, &half, sizeof(half));
}

float float_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return from_bf16(bits);
}

// [tile of 16 tokens][two channels][16 tokens]
void read_keys(int head_dim, const uint8_t* codes, int num_tokens, float* rows) {
  constexpr int kAtOnce = 4;  // words of a token, and tokens
  const int64_t d = head_dim;
  const int whole = num_tokens / kTile * kTile;
  for (int tile = 0; tile < whole; tile += kTile) {
    for (int64_t word = 0; word < d / 2; word += kAtOnce) {
      const uint8_t* from = codes + (tile * (d / 2) + word * kTile) * 4;
      for (int t = 0; t < kTile; t += kAtOnce) {
        Words x[kAtOnce];
        for (int w = 0; w < kAtOnce; ++w) x[w] = load_words(from + (w * kTile + t) * 4);
        transpose(x);
        for (int i = 0; i < kAtOnce; ++i) {
          float* out = rows + (tile + t + i) * d + 2 * word;
          store_words(out, interleave_low(low_floats(x[i]), high_floats(x[i])));
          store_words(out + kAtOnce, interleave_high(low_floats(x[i]), high_floats(x[i])));
        }
      }
    }
  }
  for (int t = whole; t < num_tokens; ++t) {
    for (int c = 0; c < head_dim; ++c) {
      rows[t * d + c] = float_at(codes + cpu_bf16_key_offset(head_dim, t, c));
    }
  }
}

// [16 channels][two tokens][16 channels]
void read_values(int page_tokens, int head_dim, const uint8_t* codes, int num_tokens, float* rows) {
  const int64_t d = head_dim;
  for (int64_t channel = 0; channel < d; channel += kTile) {
    const uint8_t* from = codes + channel * page_tokens * 2;
    for (int t = 0; t + 1 < num_tokens; t += 2, from += kTile * 4) {
      float* even = rows + t * d + channel;
      for (int c = 0; c < kTile; c += 4) {
        const Words x = load_words(from + 4 * c);
        store_words(even + c, low_floats(x));
        store_words(even + d + c, high_floats(x));
      }
    }
    if (num_tokens % 2 == 0) continue;
    for (int c = 0; c < kTile; ++c) {
      rows[(num_tokens - 1) * d + channel + c] = float_at(from + 4 * c);
    }
  }
}

void read_cpu_bf16_side(int page_tokens, int head_dim, const uint8_t* codes, SideRole role,
                        int num_tokens, float* rows) {
  if (role == SideRole::kKeys) {
    read_keys(head_dim, codes, num_tokens, rows);
  } else {
    read_values(page_tokens, head_dim, codes, num_tokens, rows);
  }
}

void write_cpu_bf16_row(int page_tokens, int head_dim, uint8_t* codes, SideRole role, int token,
                        const uint16_t* row) {
  if (role == SideRole::kKeys) {
    uint8_t* to = codes + cpu_bf16_key_offset(head_dim, token, 0);
    for (int c = 0; c < head_dim; c += 2, to += kTile * 4) std::memcpy(to, row + c, 4);
    return;
  }
  for (int channel = 0; channel < head_dim; channel += kTile) {
    uint8_t* to = codes + cpu_bf16_value_offset(page_tokens, token, channel);
    for (int c = 0; c < kTile; ++c) std::memcpy(to + 4 * c, row + channel + c, 2);
  }
}

void write_cpu_f32_row(int page_tokens, int head_dim, uint8_t* codes, SideRole role, int token,
                       const float* row) {
  if (role == SideRole::kKeys) {
    uint8_t* to = codes + cpu_bf16_key_offset(head_dim, token, 0);
    for (int c = 0; c < head_dim; c += 8) {
      const Words a = bf16_on_top(load_words(row + c));
      const Words b = bf16_on_top(load_words(row + c + 4));
      const Words words = __builtin_shufflevector(a, b, 0, 2, 4, 6) >> 16 |
                          __builtin_shufflevector(a, b, 1, 3, 5, 7);
      for (int i = 0; i < 4; ++i, to += kTile * 4) store_word(to, words[i]);
    }
    return;
  }
  for (int channel = 0; channel < head_dim; channel += kTile) {
    uint8_t* to = codes + cpu_bf16_value_offset(page_tokens, token, channel);
    for (int c = 0; c < kTile; c += 4) {
      const Words words = bf16_on_top(load_words(row + channel + c)) >> 16;
      for (int i = 0; i < 4; ++i) store_half(to + 4 * (c + i), words[i]);
    }
  }
}

// ---- any layout ----

SideShape bf16_shape(SideRole role, int page_tokens, int head_dim) {
  return {formats::SideFormat{}, role, page_tokens, head_dim};
}

int64_t bf16_side_offset(SideRole role, int page_tokens, int head_dim) {
  return role == SideRole::kKeys ? 0 : static_cast<int64_t>(page_tokens) * head_dim * 2;
}

int64_t bf16_offset(Layout layout, const SideShape& shape, int token, int channel) {
  return code_place(layout, shape, token, channel).fields[0].bit / 8;
}

void write_bf16_row(Layout layout, const SideShape& shape, std::byte* unit, int token,
                    const uint16_t* row) {
  std::byte* codes = unit + bf16_side_offset(shape.role, shape.page_tokens, shape.head_dim);
  if (layout == Layout::kCpu) {
    write_cpu_bf16_row(shape.page_tokens, shape.head_dim, reinterpret_cast<uint8_t*>(codes),
                       shape.role, token, row);
    return;
  }
  for (int channel = 0; channel < shape.head_dim; ++channel)
    std::memcpy(codes + bf16_offset(layout, shape, token, channel), &row[channel], 2);
}

}  // namespace

void write_bf16_token(Layout layout, int page_tokens, int head_dim, std::byte* unit, int token,
                      const uint16_t* k, const uint16_t* v) {
  write_bf16_row(layout, bf16_shape(SideRole::kKeys, page_tokens, head_dim), unit, token, k);
  write_bf16_row(layout, bf16_shape(SideRole::kValues, page_tokens, head_dim), unit, token, v);
}

void write_f32_token(Layout layout, int page_tokens, int head_dim, std::byte* unit, int token,
                     const float* k, const float* v) {
  if (layout == Layout::kCpu) {
    auto* codes = reinterpret_cast<uint8_t*>(unit);
    write_cpu_f32_row(page_tokens, head_dim, codes, SideRole::kKeys, token, k);
    codes += bf16_side_offset(SideRole::kValues, page_tokens, head_dim);
    write_cpu_f32_row(page_tokens, head_dim, codes, SideRole::kValues, token, v);
    return;
  }
  constexpr int kMaxHeadDim = 512;
  KVANT_CHECK(head_dim <= kMaxHeadDim, "head_dim is at most 512");
  uint16_t k16[kMaxHeadDim];
  uint16_t v16[kMaxHeadDim];
  for (int i = 0; i < head_dim; ++i) {
    k16[i] = to_bf16(k[i]);
    v16[i] = to_bf16(v[i]);
  }
  write_bf16_token(layout, page_tokens, head_dim, unit, token, k16, v16);
}

void read_bf16_side(Layout layout, int page_tokens, int head_dim, const std::byte* unit,
                    SideRole role, int num_tokens, float* rows) {
  const SideShape shape = bf16_shape(role, page_tokens, head_dim);
  const std::byte* codes = unit + bf16_side_offset(role, page_tokens, head_dim);
  if (layout == Layout::kCpu) {
    read_cpu_bf16_side(page_tokens, head_dim, reinterpret_cast<const uint8_t*>(codes), role,
                       num_tokens, rows);
    return;
  }
  for (int token = 0; token < num_tokens; ++token) {
    float* row = rows + static_cast<int64_t>(token) * head_dim;
    for (int channel = 0; channel < head_dim; ++channel) {
      uint16_t bits;
      std::memcpy(&bits, codes + bf16_offset(layout, shape, token, channel), 2);
      row[channel] = from_bf16(bits);
    }
  }
}

}  // namespace kvant::cache
