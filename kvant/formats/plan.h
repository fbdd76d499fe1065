// Quantisation plan: which format each layer's K and V use, with scales, biases and factors.
//
// The output of calibration; a safetensors file (codecs.md section 6). Without a plan every layer
// uses the format asked for with g = 1. Plain data. Biases and scales are those of the values that
// `kv` encodes (after +smooth and +rot, scales also after +bias or +mean): fit_plan makes them
// those of another format.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/spec.h"

namespace kvant::formats {

// One side of one layer. Empty vectors mean "absent". head_dim is in the order of Hugging Face
// checkpoints.
struct SidePlan {
  std::vector<float> global_scale;  // [1] or [num_kv_heads]
  std::vector<float> bias;          // [num_kv_heads * head_dim]
  std::vector<float> smooth;        // [num_kv_heads * head_dim]
};

struct LayerPlan {
  SidePlan k;
  SidePlan v;
  // Extents of bias and smooth of both sides; 0 where the layer has neither.
  int num_kv_heads = 0;
  int head_dim = 0;
};

struct QuantPlan {
  int version = 1;
  std::string geometry_id;  // of the model it was made for; another geometry is an error
  std::string weights_id;   // other weights of the same geometry: a warning for the caller to show
  std::string corpus_sha256;  // what it was calibrated on
  std::string kv;             // cache format string it was made for
  std::vector<LayerPlan> layers;

  // kNotFound, kIoError, kCorruptData, or kUnsupported for a plan of a later version; each names
  // the file, and the tensor where there is one.
  static Result<QuantPlan> load(const std::string& path);
  static Result<QuantPlan> parse(std::span<const std::byte> bytes, std::string_view file_name);
  // Atomic: written beside and renamed, so that a failure leaves an old file as it was.
  Status save(const std::string& path) const;

  // What the codec of one layer, side and head reads. Absent terms are null; g defaults to 1.
  SideParams side_params(int layer, bool keys, int kv_head, int head_dim) const;
};

// Every term that `format` declares (+bias, +smooth) must be in the plan for every layer and
// plausible (finite, positive where it must be); kInvalidArgument names the first that is missing
// or implausible.
Status check_plan(const QuantPlan& plan, const CacheFormat& format, int num_layers,
                  int num_kv_heads, int head_dim);

// A plan made for one format as another needs it.
struct FittedPlan {
  QuantPlan plan;
  // Scales that the plan has and the format would read, but which were measured on other values
  // than the format encodes (other options of that side, or without the first page): left out, g
  // = 1.
  bool k_scales_left_out = false;
  bool v_scales_left_out = false;
};

// Biases move to the frame of `format` (through the plan's factors and the rotation, in fp32; not a
// bit changes where the frame is the same). Scales per KV head become one where the format reads
// one. kCorruptData if plan.kv is no format or its factors are missing, kInvalidArgument if biases
// or factors of keys before RoPE are wanted after it or the other way round. Call check_plan on the
// result.
Result<FittedPlan> fit_plan(const QuantPlan& plan, const CacheFormat& format);

}  // namespace kvant::formats
