// Numbers that kernels know when they are compiled. Included like attention_simd.h, after
// KVANT_LEVEL is defined.
#pragma once

#include "kvant/backend/cpu/attention_simd.h"

namespace kvant::backend::cpu::KVANT_LEVEL {
namespace {

// A page of any size, of which the first tiles of sixteen tokens are read.
struct AnyPage {
  int head_dim;
  int page_tokens;
  int num_tiles;
};
// All of a page of the usual 64 tokens. What few rows read of a page is so little work that
// addresses and loops are half of all instructions where these numbers are variables.
template <int kHeadDim>
struct WholePage {
  static constexpr int head_dim = kHeadDim;
  static constexpr int page_tokens = 64;
  static constexpr int num_tiles = 4;
};

template <typename Page>
inline constexpr bool kIsWhole = false;
template <int kHeadDim>
inline constexpr bool kIsWhole<WholePage<kHeadDim>> = true;

template <typename Args>
KVANT_INLINE bool is_whole(const Args& args) {
  return args.page_tokens == 64 && args.num_tiles == 4;
}

// Calls f(page) with what `args` says of the page.
template <typename Args, typename Fn>
KVANT_INLINE void with_page(const Args& args, Fn&& f) {
  if (is_whole(args)) {
    if (args.head_dim == 128) return f(WholePage<128>{});
    if (args.head_dim == 64) return f(WholePage<64>{});
  }
  f(AnyPage{args.head_dim, args.page_tokens, args.num_tiles});
}

// The same for kernels that know head_dim 256, too.
template <typename Args, typename Fn>
KVANT_INLINE void with_wide_page(const Args& args, Fn&& f) {
  if (is_whole(args) && args.head_dim == 256) return f(WholePage<256>{});
  with_page(args, f);
}

}  // namespace
}  // namespace kvant::backend::cpu::KVANT_LEVEL
