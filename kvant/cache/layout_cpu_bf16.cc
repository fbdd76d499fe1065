// BF16 units in `cpu` layout: rows in (appending) and rows out (closing), words at a time.
#include <cstring>

#include "kvant/base/small_floats.h"
#include "kvant/cache/layout.h"
#include "kvant/cache/word_vectors.h"

namespace kvant::cache::internal {
namespace {

constexpr int kTile = 16;

// Words hold two BF16 numbers; as fp32 these are the low and the high half moved to the top.
Words low_floats(Words words) {
  return words << 16;
}
Words high_floats(Words words) {
  return words & 0xffff0000u;
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

}  // namespace

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

}  // namespace kvant::cache::internal
