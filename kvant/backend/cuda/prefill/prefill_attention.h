// Attention of the CUDA backend for steps with many new tokens: prompts and their chunks.
//
// Pages become tile images, FP16 or E4M3, in a bounded workspace (prefill_plan.h), any format and
// option the same way (dequantise.h); a persistent wgmma kernel reads them (attention_kernel.cuh,
// attention_e4m3_kernel.cuh). KV heads are done as many at a time as fit; a sequence of which one
// head does not fit is read in ranges of pages. Error against float64 on the same pages: rounding
// of queries, keys (less a reference key), weights and values to the type of images
// (docs/kernels/cuda-prefill.md).
//
// Thread-compatible; work is enqueued on the stream given, always the same one. Results do not
// depend on what else is in the batch except through the workspace's split into passes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/backend/cuda/prefill/dequantise.h"
#include "kvant/backend/cuda/prefill/prefill_plan.h"
#include "kvant/base/result.h"
#include "kvant/formats/spec.h"

namespace kvant::backend::cuda {

struct PrefillLimits {
  ImageType images = ImageType::kF16;
  int64_t image_bytes = int64_t{512} << 20;  // of images at the same time
  int64_t max_rows = 0;                      // new tokens of a step, all sequences
  int64_t max_pages = 0;  // pages of a step, all sequences; those of new tokens count twice
  int max_sequences = 1;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 0;
};

struct PrefillKernelArgs;  // attention_kernel.h
struct BackgroundImages;

class PrefillAttention {
 public:
  // kUnsupported names what the kernels lack: head_dim 64, 80, 96, 128, 192 or 256; 1 to 16 query
  // heads per KV head; E4M3 on Hopper only.
  static Status supports(int head_dim, int query_heads_per_kv_head, ImageType images);

  // Device memory that create() is given.
  static int64_t workspace_bytes(const PrefillLimits& limits);
  // Also takes pinned host memory for tables.
  static Result<std::unique_ptr<PrefillAttention>> create(const PrefillLimits& limits,
                                                          std::byte* workspace, int64_t bytes);
  ~PrefillAttention();

  // Every sequence of the view, all its new tokens, one layer. The view's pages are device memory
  // in `sm90` layout, its tables and `view.layers` host memory; q and out are fp32 device memory;
  // sink_logits and rope.frequency_factors may be either. `lse` (device, [num_rows]
  // [num_query_heads], may be null) gets the natural logarithm of the sum of exp(score) over the
  // keys read, without sink logits. kInvalidArgument for another layout, kResourceExhausted for a
  // step beyond the limits.
  Status run(const AttentionArgs& args, cudaStream_t stream, float* lse = nullptr);

  // For tests and benchmarks: whether images may be written beside attention, and which of the
  // kernels run() launches from now on.
  void set_background(bool allowed) { background_allowed_ = allowed; }
  void measure_only(bool images, bool attention) {
    launch_images_ = images;
    launch_attention_ = attention;
  }

  // kNumericError if a key (less the reference key) or a value since the last call was beyond the
  // images' type (the outputs that read it are not finite then, or too small in E4M3). Waits for
  // the stream.
  Status check_range(cudaStream_t stream);

 private:
  struct Tables;
  struct HostSlot {
    std::byte* data = nullptr;  // pinned
    cudaEvent_t copied = nullptr;
  };

  PrefillAttention() = default;
  Status check(const AttentionArgs& args) const;
  Status upload(const AttentionArgs& args, cudaStream_t stream, Tables& tables);
  Status send(std::span<const std::byte> bytes, cudaStream_t stream);
  void fill_dequantise(const AttentionArgs& args, const Tables& tables, DequantiseArgs& out) const;
  bool writes_in_background(const AttentionArgs& args) const;
  Status launch_pass(const PrefillKernelArgs& kernel, const BackgroundImages* images,
                     cudaStream_t stream) const;
  Status run_passes(const AttentionArgs& args, const Tables& tables, float* lse,
                    cudaStream_t stream);

  PrefillLimits limits_;
  int num_processors_ = 0;
  PrefillPlan plan_;
  static constexpr int kSlots = 4;  // how many runs the host may be ahead
  HostSlot slots_[kSlots];
  int next_slot_ = 0;
  bool background_allowed_ = true;
  bool launch_images_ = true;
  bool launch_attention_ = true;
  int64_t table_bytes_ = 0;
  std::vector<std::byte> written_;  // tables of this run
  std::vector<std::byte> sent_;     // what the device has
  // Parts of the workspace.
  std::byte* images_ = nullptr;
  std::byte* tables_ = nullptr;
  float* state_ = nullptr;
  float* references_ = nullptr;
  double* frequencies_ = nullptr;
  float* factors_ = nullptr;  // frequency factors
  float* sink_logits_ = nullptr;
  uint32_t* out_of_range_ = nullptr;
  int32_t* counters_ = nullptr;
  int32_t* ready_ = nullptr;  // of images written beside attention
  int32_t epoch_ = 0;         // of the last launch that did so
};

}  // namespace kvant::backend::cuda
