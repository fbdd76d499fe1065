// A decode problem with random keys and values, as a GroupView on the host and its mirror on the
// device: pages in `sm90` layout, encoded by the scalar codecs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"

namespace kvant::backend::cuda::testing {

struct ProblemOptions {
  std::string kv = "nvfp4";
  int num_kv_heads = 2;
  int group = 4;  // query heads per KV head
  int head_dim = 128;
  int page_tokens = 64;
  int window = 0;
  std::vector<int64_t> lengths = {300};  // tokens of each sequence after the step
  std::vector<int> new_tokens = {1};     // of each sequence in the step; the last one repeats
  // Sequence i has its first `tokens` (whole pages) in common with an earlier sequence.
  struct Prefix {
    int parent = 0;
    int64_t tokens = 0;
  };
  std::vector<Prefix> prefixes = {};  // of each sequence; missing ones share nothing
  float score_deviation = 1.0f;       // of q . k * scale
  bool rising = false;                // scores grow along the sequence
  attention::AttentionParams params;  // heads and scale are filled in; RoPE for +prerope
  uint32_t seed = 1;
};

// Owns both copies. Units are poisoned with NaN bytes where nothing was written.
class PagedProblem {
 public:
  explicit PagedProblem(const ProblemOptions& options);
  ~PagedProblem();
  PagedProblem(const PagedProblem&) = delete;
  PagedProblem& operator=(const PagedProblem&) = delete;

  int64_t num_rows() const { return num_rows_; }
  const AttentionArgs& device_args() const { return device_args_; }

  // Outputs of the device, [rows][query heads][head_dim].
  std::vector<float> download() const;
  void poison_output();
  // Relative L2 error of `out` against the float64 reference.
  double error_of(const std::vector<float>& out) const;

 private:
  struct Slab;
  void add_sequence(int64_t length, int new_tokens, const ProblemOptions::Prefix& prefix);
  void write_page(int64_t first_token, int64_t num_tokens, bool stored, cache::PageEntry entry);
  void fill_terms();
  void fill_rows();
  void mirror();

  ProblemOptions options_;
  formats::CacheFormat format_;
  std::unique_ptr<Slab> slabs_[2];
  std::vector<std::vector<cache::PageEntry>> tables_;
  std::vector<cache::SequenceView> sequences_;
  std::vector<float> row_;    // one token's values
  std::vector<float> terms_;  // of a plan: [side][KV head][bias, smooth][head_dim]
  std::vector<formats::SideParams> params_[2];  // [side][KV head]
  cache::LayerParams layer_;
  std::vector<cache::PageKind> kinds_, device_kinds_;
  cache::GroupView view_, device_view_;
  std::vector<float> q_;
  int64_t num_rows_ = 0;
  float *device_q_ = nullptr, *device_out_ = nullptr, *device_sinks_ = nullptr;
  float* device_rope_ = nullptr;  // frequency factors
  AttentionArgs device_args_;
  uint64_t random_ = 0;
};

}  // namespace kvant::backend::cuda::testing
