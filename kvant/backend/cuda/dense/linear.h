// Matrix products of the CUDA backend: few rows by reading weights as they are (product.h), many
// rows by decoding them on their way to the tensor cores (decoded_product.h) or, on GPUs and with
// weights that these are not for, by cuBLASLt in BF16 with fp32 sums, for which tiled weights are
// dequantised piece by piece right before their product. No second copy of the weights is kept.
//
// With many rows activations and weights are rounded: to FP16 (11 bits) where they are decoded, to
// BF16 (8 bits) for cuBLASLt. In deterministic mode every product is that of few rows.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <map>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/dense/product.h"
#include "kvant/base/result.h"

namespace kvant::backend::cuda {

class CudaLinear {
 public:
  CudaLinear() = default;
  CudaLinear(const CudaLinear&) = delete;
  CudaLinear& operator=(const CudaLinear&) = delete;
  ~CudaLinear();
  Status create(int num_sms, bool deterministic);

  // Scratch memory for products of `max_rows` rows at most (more rows take more turns).
  static int64_t workspace_bytes(int64_t max_rows, int64_t max_cols);
  void set_workspace(std::byte* workspace, int64_t max_rows, int64_t max_cols);

  Status run(const float* x, int64_t num_rows, std::span<const LinearTarget> targets,
             cudaStream_t stream);
  // With the exactness of few rows, however many there are.
  Status run_exact(const float* x, int64_t num_rows, std::span<const LinearTarget> targets,
                   cudaStream_t stream);
  // So too; row i is multiplied with the matrix of its expert, which looks like the target's.
  Status run_chosen(const float* x, int64_t num_rows, const LinearTarget& target,
                    const ExpertChoice& choice, cudaStream_t stream);

  // Whether run() takes so many rows of a product with such matrices for many, which are rounded;
  // run_rounded() norms them on the way too (norm.out is not written).
  bool rounds(int64_t num_rows, std::span<const LinearTarget> targets) const;
  Status run_rounded(const RmsNormArgs& norm, std::span<const LinearTarget> targets,
                     cudaStream_t stream);

  // Whether the next two can be had for such matrices: products of few rows that norm their input
  // on the way (norm.out is not written), and a gate with what it is for in one (so many rows,
  // too).
  bool can_norm(std::span<const LinearTarget> targets) const;
  Status run_normed(const RmsNormArgs& norm, std::span<const LinearTarget> targets,
                    cudaStream_t stream);
  bool can_gate(const GatedArgs& args) const;
  Status run_gated(const GatedArgs& args, cudaStream_t stream);
  bool deterministic() const { return deterministic_; }

 private:
  struct Gemm {
    int64_t outputs, rows, inputs, out_stride;
    const uint16_t* weights;  // [outputs][inputs]
    const uint16_t* x;        // [rows][inputs]
    const float* bias;        // [outputs] or null
    float* out;               // [rows][out_stride]
    bool accumulate;
  };
  using Shape = std::array<int64_t, 5>;  // what the choice of an algorithm depends on

  RowProduct product_of(const float* x, int64_t num_rows) const;
  RowProduct decoded_product_of(const float* x, int64_t num_rows) const;
  Status run_product(const RowProduct& product, std::span<const LinearTarget> targets,
                     cudaStream_t stream);
  // At most max_rows_ rows, normed if there is a weight. Puts the targets in another order.
  Status run_many(const float* x, int64_t num_rows, const RowNorm& norm,
                  std::span<LinearTarget> targets, cudaStream_t stream);
  Status run_decoded(const RowProduct& product, std::span<const LinearTarget> targets,
                     cudaStream_t stream);
  using Multiply = Status(const RowProduct&, std::span<const ProductTarget>, cudaStream_t);
  // Targets of one type share a call.
  static Status run_by_type(const RowProduct& product, std::span<const LinearTarget> targets,
                            Multiply* multiply, cudaStream_t stream);
  Status run_targets(int64_t num_rows, std::span<const LinearTarget> targets, cudaStream_t stream);
  Status run_in_pieces(int64_t num_rows, const LinearTarget& target, cudaStream_t stream);
  struct Piece {
    const LinearTarget& target;
    int64_t first_output;
    int64_t num_outputs;
    const uint16_t* weights;  // of the first output
  };
  Status multiply_piece(int64_t num_rows, const Piece& piece, cudaStream_t stream);
  Status multiply(const Gemm& gemm, cudaStream_t stream);

  cublasLtHandle_t handle_ = nullptr;
  int num_sms_ = 0;
  bool deterministic_ = false;
  int64_t max_rows_ = 0;
  int64_t max_cols_ = 0;
  std::byte* blas_workspace_ = nullptr;
  uint16_t* rounded_x_ = nullptr;  // [max_rows][padded cols]
  uint16_t* weights_ = nullptr;    // a piece of a matrix
  std::map<Shape, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace kvant::backend::cuda
