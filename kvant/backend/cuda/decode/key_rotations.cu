#include <algorithm>
#include <string>

#include "kvant/backend/cuda/decode/key_rotations.h"
#include "kvant/backend/cuda/ptx.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

using attention::RopeParams;

constexpr int kThreads = 256;

int64_t page_bytes(int half) {
  return half * int64_t{sizeof(float2)};
}
// A cosine and a sine in fp16 for each place in a page and pair.
int64_t token_bytes(int half, int page_tokens) {
  return int64_t{half} * page_tokens * 4;
}

__device__ double frequency_of(const RopeParams& rope, int pair) {
  const double frequency = pow(static_cast<double>(rope.base), -2.0 * pair / rope.rotary_dim) *
                           static_cast<double>(rope.position_scale);
  if (rope.frequency_factors == nullptr) return frequency;
  return frequency / static_cast<double>(rope.frequency_factors[pair]);
}

__global__ void page_angles_kernel(RopeParams rope, int page_tokens, int64_t num_pages,
                                   float2* pages) {
  const int half = rope.rotary_dim / 2;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_pages * half;
       i += step) {
    const double position = static_cast<double>(i / half * page_tokens);
    double sine, cosine;
    sincos(position * frequency_of(rope, static_cast<int>(i % half)), &sine, &cosine);
    const double factor = 2.0 * static_cast<double>(rope.attention_factor);
    pages[i] = {static_cast<float>(factor * cosine), static_cast<float>(factor * sine)};
  }
}

__global__ void token_angles_kernel(RopeParams rope, int page_tokens, uint4* tokens) {
  const int octets = rope.rotary_dim / 16;
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= page_tokens / 16 * octets * 32) return;
  const int lane = i % 32, octet = i / 32 % octets, tile = i / 32 / octets;
  float cosines[2][2], sines[2][2];  // [half of the tile][pair]
  for (int half = 0; half < 2; ++half) {
    for (int c = 0; c < 2; ++c) {
      const int token = tile * 16 + half * 8 + lane / 4;
      double sine, cosine;
      sincos(token * frequency_of(rope, octet * 8 + lane % 4 * 2 + c), &sine, &cosine);
      cosines[half][c] = static_cast<float>(0.5 * cosine);
      sines[half][c] = static_cast<float>(0.5 * sine);
    }
  }
  tokens[i] = {ptx::f16x2_of_f32(cosines[0][0], cosines[0][1]),
               ptx::f16x2_of_f32(cosines[1][0], cosines[1][1]),
               ptx::f16x2_of_f32(sines[0][0], sines[0][1]),
               ptx::f16x2_of_f32(sines[1][0], sines[1][1])};
}

}  // namespace

bool same_rope(const RopeParams& a, const RopeParams& b) {
  return a.rotary_dim == b.rotary_dim && a.base == b.base && a.position_scale == b.position_scale &&
         a.frequency_factors == b.frequency_factors && a.attention_factor == b.attention_factor;
}

Status check_key_rotation(const RopeParams& rope, int head_dim) {
  if (rope.rotary_dim % 16 == 0 && rope.rotary_dim <= head_dim) return {};
  return Error(ErrorCode::kUnsupported, "CUDA decode attention does not support +prerope with " +
                                            std::to_string(rope.rotary_dim) +
                                            " rotary channels of " + std::to_string(head_dim) +
                                            " (it takes multiples of 16); use a format without "
                                            "+prerope, or --device cpu");
}

KeyRotations::~KeyRotations() {
  for (Slot& slot : slots_) cudaFree(slot.owned);
}

int64_t KeyRotations::workspace_bytes(int head_dim, int page_tokens, int64_t max_context) {
  const int64_t pages = max_context / page_tokens + 2;
  const int64_t bytes = token_bytes(head_dim / 2, page_tokens) + pages * page_bytes(head_dim / 2);
  return kNumSlots * ((bytes + 255) / 256 * 256);
}

void KeyRotations::use(std::byte* memory, int64_t bytes) {
  for (int i = 0; i < kNumSlots; ++i) {
    cudaFree(slots_[i].owned);
    slots_[i] = Slot();
    slots_[i].bytes = bytes / kNumSlots;
    slots_[i].memory = memory == nullptr ? nullptr : memory + i * slots_[i].bytes;
  }
}

Result<KeyRotations::Tables> KeyRotations::get(const RopeParams& rope, int page_tokens,
                                               int64_t num_pages, cudaStream_t stream) {
  if (rope.rotary_dim == 0) return Tables();
  for (Slot& slot : slots_) {
    if (slot.num_pages < num_pages || slot.page_tokens != page_tokens ||
        !same_rope(slot.rope, rope))
      continue;
    slot.last_use = ++clock_;
    return slot.tables;
  }
  // The same setting with fewer pages, else the one that was not used for longest.
  Slot* slot = &slots_[slots_[0].last_use <= slots_[1].last_use ? 0 : 1];
  for (Slot& other : slots_) {
    if (other.num_pages > 0 && same_rope(other.rope, rope)) slot = &other;
  }
  KVANT_TRY(fill(*slot, rope, page_tokens, num_pages, stream));
  slot->last_use = ++clock_;
  return slot->tables;
}

// As many pages as the memory holds: the next steps need more.
Status KeyRotations::fill(Slot& slot, const RopeParams& rope, int page_tokens, int64_t num_pages,
                          cudaStream_t stream) {
  const int half = rope.rotary_dim / 2;
  const int64_t fixed = token_bytes(half, page_tokens);
  slot.num_pages = 0;
  if (fixed + num_pages * page_bytes(half) > slot.bytes) {
    KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for angles in use"));
    cudaFree(slot.owned);
    slot.owned = slot.memory = nullptr;
    slot.bytes = 0;
    const int64_t bytes = fixed + 2 * num_pages * page_bytes(half);
    KVANT_TRY(
        cuda_status(cudaMalloc(reinterpret_cast<void**>(&slot.owned), static_cast<size_t>(bytes)),
                    "allocating angles of keys before RoPE"));
    slot.memory = slot.owned;
    slot.bytes = bytes;
  }
  num_pages = (slot.bytes - fixed) / page_bytes(half);
  auto* tokens = reinterpret_cast<uint4*>(slot.memory);
  auto* pages = reinterpret_cast<float2*>(slot.memory + fixed);
  const int64_t blocks = std::min<int64_t>((num_pages * half + kThreads - 1) / kThreads, 4096);
  page_angles_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rope, page_tokens,
                                                                             num_pages, pages);
  const int64_t places = fixed / int64_t{sizeof(uint4)};
  token_angles_kernel<<<static_cast<unsigned>((places + kThreads - 1) / kThreads), kThreads, 0,
                        stream>>>(rope, page_tokens, tokens);
  KVANT_TRY(launch_status("angles of keys before RoPE"));
  KVANT_TRY(cuda_status(cudaStreamSynchronize(stream), "making angles of keys before RoPE"));
  slot.rope = rope;
  slot.page_tokens = page_tokens;
  slot.num_pages = num_pages;
  slot.tables = {pages, tokens};
  return {};
}

}  // namespace kvant::backend::cuda
