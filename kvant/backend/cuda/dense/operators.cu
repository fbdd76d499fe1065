#include "kvant/backend/cuda/dense/operators.h"

#include <algorithm>

#include "kvant/backend/cuda/dense/file_blocks.cuh"
#include "kvant/backend/cuda/dense/gate.cuh"
#include "kvant/backend/cuda/dense/rotate.cuh"
#include "kvant/backend/cuda/dense/row_norm.cuh"
#include "kvant/backend/cuda/launch.h"
#include "kvant/backend/cuda/ptx.cuh"
#include "kvant/backend/cuda/status.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kThreads = 256;

// Blocks of a loop over n values with a stride of the grid.
unsigned grid_for(int64_t n) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((n + kThreads - 1) / kThreads, 1, int64_t{1} << 16));
}

#define KVANT_GRID_LOOP(i, n)                                               \
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < (n); \
       i += int64_t{gridDim.x} * blockDim.x)

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Lets the next kernel begin, and waits for what the kernels before wrote.
__device__ void enter_stream() {
  ptx::launch_dependents();
  ptx::wait_prerequisites();
}

__device__ void store(float value, float* at) {
  *at = value;
}
__device__ void store(float value, uint16_t* at) {
  *at = to_bf16(value);
}

// A warp a row. Rows of `out` are `stride` values apart, zeros from `dim` on.
template <typename Out>
__global__ void norm_short_rows_kernel(const float* x, const float* weight, Out* out, int stride,
                                       int64_t num_rows, int dim, float epsilon) {
  enter_stream();
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (row >= num_rows) return;  // whole warps
  const float* from = x + row * dim;
  float sum = 0.0f;
  for (int i = lane; i < dim; i += 32) sum = fmaf(from[i], from[i], sum);
  const float factor = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(dim) + epsilon);
  for (int i = lane; i < stride; i += 32) {
    store(i < dim ? from[i] * factor * weight[i] : 0.0f, out + row * stride + i);
  }
}

// A block a row; the same.
template <typename Out>
__global__ void __launch_bounds__(kNormThreads)
    norm_rows_kernel(const float* x, const float* weight, Out* out, int stride, int dim,
                     float epsilon) {
  ptx::launch_dependents();
  const int first = 8 * static_cast<int>(threadIdx.x);
  float w[8];
  load_eight(weight, first, dim, w);
  ptx::wait_prerequisites();
  const float* from = x + blockIdx.x * int64_t{dim};
  float v[8];
  load_eight(from, first, dim, v);
  const float factor = norm_factor(from, dim, v, epsilon);
  for (int at = first; at < stride; at += 8 * kNormThreads) {
    if (at > first) {
      load_eight(from, at, dim, v);
      load_eight(weight, at, dim, w);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at + i >= stride) break;
      store(at + i < dim ? v[i] * factor * w[i] : 0.0f,
            out + blockIdx.x * int64_t{stride} + at + i);
    }
  }
}

__global__ void rope_table_kernel(attention::RopeParams rope, const int64_t* positions,
                                  int64_t num_rows, float* table) {
  enter_stream();
  const int half = rope.rotary_dim / 2;
  KVANT_GRID_LOOP(at, num_rows * half) {
    const int64_t row = at / half;
    const int i = static_cast<int>(at % half);
    double frequency = pow(static_cast<double>(rope.base), -2.0 * i / rope.rotary_dim) *
                       static_cast<double>(rope.position_scale);
    if (rope.frequency_factors != nullptr) {
      frequency /= static_cast<double>(rope.frequency_factors[i]);
    }
    double sine, cosine;
    sincos(static_cast<double>(positions[row]) * frequency, &sine, &cosine);
    const double factor = static_cast<double>(rope.attention_factor);
    table[row * 2 * half + i] = static_cast<float>(factor * cosine);
    table[row * 2 * half + half + i] = static_cast<float>(factor * sine);
  }
}

// Heads of q, then of k.
__global__ void rope_kernel(RopeArgs args, const float* table) {
  enter_stream();
  const int half = args.rope.rotary_dim / 2;
  const int heads = args.num_query_heads + args.num_kv_heads;
  KVANT_GRID_LOOP(at, args.num_rows * heads * half) {
    const int i = static_cast<int>(at % half);
    const int head = static_cast<int>(at / half % heads);
    const int64_t row = at / half / heads;
    float* x =
        head < args.num_query_heads
            ? static_cast<float*>(args.q) + (row * args.num_query_heads + head) * args.head_dim
            : static_cast<float*>(args.k) +
                  (row * args.num_kv_heads + head - args.num_query_heads) * args.head_dim;
    rotate_pair(x, table + row * 2 * half, half, i);
  }
}

template <GateKind kKind>
__global__ void gate_kernel(const float* gate, const float* up, float* out, int64_t n) {
  enter_stream();
  KVANT_GRID_LOOP(i, n) out[i] = activate(kKind, gate[i]) * up[i];
}

__global__ void add_kernel(const float* x, float* y, int64_t n) {
  enter_stream();
  KVANT_GRID_LOOP(i, n) y[i] += x[i];
}

__global__ void gather_kernel(const float* x, const int64_t* rows, int64_t num_rows, int dim,
                              float* out) {
  enter_stream();
  KVANT_GRID_LOOP(at, num_rows * dim) out[at] = x[rows[at / dim] * dim + at % dim];
}

template <WeightType kType>
__global__ void dequantize_kernel(const uint8_t* rows, int64_t row_bytes, int64_t num_rows,
                                  int64_t cols, float scale, float* out) {
  enter_stream();
  KVANT_GRID_LOOP(at, num_rows * cols) {
    out[at] = file_value<kType>(rows + at / cols * row_bytes, at % cols) * scale;
  }
}

__global__ void round_kernel(const float* x, int64_t num_rows, int64_t cols, int64_t padded,
                             uint16_t* out) {
  enter_stream();
  KVANT_GRID_LOOP(at, num_rows * padded) {
    const int64_t i = at % padded;
    out[at] = i < cols ? to_bf16(x[at / padded * cols + i]) : uint16_t{0};
  }
}

template <typename Out>
Status launch_norm(const RmsNormArgs& args, Out* out, int stride, cudaStream_t stream) {
  if (args.num_rows == 0) return {};
  const auto* x = static_cast<const float*>(args.x);
  if (args.dim <= kMostWarpNorm) {  // heads
    const int64_t blocks = (args.num_rows + 7) / 8;
    return launch_overlapped("rms_norm", norm_short_rows_kernel<Out>,
                             {static_cast<unsigned>(blocks), 256, 0, stream}, x, args.weight, out,
                             stride, args.num_rows, args.dim, args.epsilon);
  }
  return launch_overlapped("rms_norm", norm_rows_kernel<Out>,
                           {static_cast<unsigned>(args.num_rows), kNormThreads, 0, stream}, x,
                           args.weight, out, stride, args.dim, args.epsilon);
}

}  // namespace

Status rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  return launch_norm(args, static_cast<float*>(args.out), args.dim, stream);
}

Status rounded_rms_norm(const RmsNormArgs& args, int64_t padded, uint16_t* out,
                        cudaStream_t stream) {
  return launch_norm(args, out, static_cast<int>(padded), stream);
}

Status rope_table(const attention::RopeParams& rope, const int64_t* positions, int64_t num_rows,
                  float* table, cudaStream_t stream) {
  return launch_overlapped("rope_table", rope_table_kernel,
                           {grid_for(num_rows * rope.rotary_dim / 2), kThreads, 0, stream}, rope,
                           positions, num_rows, table);
}

Status rope(const RopeArgs& args, const float* table, cudaStream_t stream) {
  const int64_t n =
      args.num_rows * (args.num_query_heads + args.num_kv_heads) * (args.rope.rotary_dim / 2);
  if (n == 0) return {};
  return launch_overlapped("rope", rope_kernel, {grid_for(n), kThreads, 0, stream}, args, table);
}

Status gate(GateKind kind, const float* gate, const float* up, float* out, int64_t num_values,
            cudaStream_t stream) {
  if (num_values == 0) return {};
  const auto kernel =
      kind == GateKind::kSilu ? gate_kernel<GateKind::kSilu> : gate_kernel<GateKind::kGeluTanh>;
  return launch_overlapped("gate", kernel, {grid_for(num_values), kThreads, 0, stream}, gate, up,
                           out, num_values);
}

Status add(const float* x, float* y, int64_t num_values, cudaStream_t stream) {
  if (num_values == 0) return {};
  return launch_overlapped("add", add_kernel, {grid_for(num_values), kThreads, 0, stream}, x, y,
                           num_values);
}

Status gather_rows(const float* x, const int64_t* rows, int64_t num_rows, int dim, float* out,
                   cudaStream_t stream) {
  if (num_rows == 0) return {};
  return launch_overlapped("gather_rows", gather_kernel,
                           {grid_for(num_rows * dim), kThreads, 0, stream}, x, rows, num_rows, dim,
                           out);
}

Status dequantize_rows(formats::WeightType type, const uint8_t* rows, int64_t num_rows,
                       int64_t cols, float scale, float* out, cudaStream_t stream) {
  if (num_rows == 0) return {};
  const int64_t row_bytes = formats::weight_bytes(type, cols);
  return for_weight_type<WeightTag>(type, [&](auto tag) {
    return launch_overlapped("dequantize_rows", dequantize_kernel<decltype(tag)::kValue>,
                             {grid_for(num_rows * cols), kThreads, 0, stream}, rows, row_bytes,
                             num_rows, cols, scale, out);
  });
}

Status round_rows(const float* x, int64_t num_rows, int64_t cols, int64_t padded, uint16_t* out,
                  cudaStream_t stream) {
  if (num_rows == 0) return {};
  return launch_overlapped("round_rows", round_kernel,
                           {grid_for(num_rows * padded), kThreads, 0, stream}, x, num_rows, cols,
                           padded, out);
}

}  // namespace kvant::backend::cuda
