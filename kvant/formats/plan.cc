#include "kvant/formats/plan.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "kvant/base/check.h"
#include "kvant/base/mapped_file.h"
#include "kvant/formats/safetensors.h"
#include "kvant/formats/suggest.h"

namespace kvant::formats {
namespace {

constexpr int kPlanVersion = 1;
constexpr int kMaxLayers = 4096;
constexpr int kMaxExtent = 65536;

// Beyond these a value is a mistake of units or conventions, not a scale of a cache.
constexpr float kSmallestScale = 1e-8f, kLargestScale = 1e8f;
constexpr float kSmallestFactor = 1e-6f, kLargestFactor = 1e6f;
constexpr float kLargestBias = 65504.0f;

constexpr std::string_view kCalibrate = "; calibrate again (`kvant calibrate`)";

Error corrupt(std::string message) {
  return Error(ErrorCode::kCorruptData, std::move(message));
}
Error invalid(std::string message) {
  return Error(ErrorCode::kInvalidArgument, std::move(message));
}

std::string tensor_name(size_t layer, bool keys, std::string_view field) {
  std::string name = "layers." + std::to_string(layer) + (keys ? ".k." : ".v.");
  name += field;
  return name;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  text += "]";
  return text;
}

// ---- names ----

struct TensorPlace {
  int layer = 0;
  bool keys = true;
  std::string_view field;
};

// "layers.12.k.bias"
Result<TensorPlace> parse_name(std::string_view name) {
  const Error unknown = corrupt("tensor " + quote_name(name) +
                                " is not one of a plan: expected layers.N.k.FIELD or "
                                "layers.N.v.FIELD with FIELD global_scale, "
                                "bias or smooth");
  constexpr std::string_view kPrefix = "layers.";
  if (!name.starts_with(kPrefix)) return unknown;
  std::string_view rest = name.substr(kPrefix.size());
  TensorPlace place;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), place.layer);
  const size_t digits = static_cast<size_t>(end - rest.data());
  if (error != std::errc() || place.layer < 0 ||
      std::to_string(place.layer) != rest.substr(0, digits)) {
    return unknown;
  }
  if (place.layer >= kMaxLayers) {
    return corrupt("tensor " + quote_name(name) + ": a plan has at most " +
                   std::to_string(kMaxLayers) + " layers");
  }
  rest.remove_prefix(digits);
  if (!rest.starts_with(".k.") && !rest.starts_with(".v.")) return unknown;
  place.keys = rest[1] == 'k';
  place.field = rest.substr(3);
  if (place.field == "codebook" || place.field == "thresholds") {
    return Error(ErrorCode::kUnsupported, "tensor " + quote_name(name) +
                                              " belongs to codebook formats, which this version of "
                                              "kvant does not have");
  }
  if (place.field != "global_scale" && place.field != "bias" && place.field != "smooth") {
    return unknown;
  }
  return place;
}

// ---- reading ----

Status read_tensor(const SafetensorsTensor& tensor, const TensorPlace& place, LayerPlan& layer) {
  if (tensor.dtype != "F32") {
    return corrupt("its type is " + quote_name(tensor.dtype) + "; plans hold F32");
  }
  SidePlan& side = place.keys ? layer.k : layer.v;
  const bool scale = place.field == "global_scale";
  std::vector<float>& values = scale                   ? side.global_scale
                               : place.field == "bias" ? side.bias
                                                       : side.smooth;
  const size_t rank = scale ? 1 : 2;
  const bool extents_fit =
      std::all_of(tensor.shape.begin(), tensor.shape.end(),
                  [](int64_t extent) { return extent >= 1 && extent <= kMaxExtent; });
  if (tensor.shape.size() != rank || !extents_fit) {
    return corrupt("its shape is " + shape_text(tensor.shape) + "; expected " +
                   (scale ? "[1] or [KV heads]" : "[KV heads, head_dim]"));
  }
  if (!scale) {
    const int heads = static_cast<int>(tensor.shape[0]), dim = static_cast<int>(tensor.shape[1]);
    if (layer.head_dim != 0 && (layer.num_kv_heads != heads || layer.head_dim != dim)) {
      return corrupt(
          "its shape is " + shape_text(tensor.shape) + ", but other tensors of the layer have [" +
          std::to_string(layer.num_kv_heads) + ", " + std::to_string(layer.head_dim) + "]");
    }
    layer.num_kv_heads = heads;
    layer.head_dim = dim;
  }
  values.resize(tensor.bytes.size() / sizeof(float));
  std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return {};
}

Result<std::string> required(const Safetensors& file, const std::string& key) {
  const auto found = file.metadata.find(key);
  if (found == file.metadata.end()) {
    return corrupt("not a plan: __metadata__ has no " + quote_name(key));
  }
  return found->second;
}

Status read_metadata(const Safetensors& file, QuantPlan& plan) {
  KVANT_ASSIGN(const std::string version, required(file, "kvant_plan_version"));
  const auto [end, error] =
      std::from_chars(version.data(), version.data() + version.size(), plan.version);
  if (error != std::errc() || end != version.data() + version.size() || plan.version < 1) {
    return corrupt("kvant_plan_version is " + quote_name(version) + ", not a number");
  }
  if (plan.version > kPlanVersion) {
    return Error(ErrorCode::kUnsupported, "the plan has version " + version +
                                              "; this version of kvant reads up to " +
                                              std::to_string(kPlanVersion));
  }
  KVANT_ASSIGN(plan.geometry_id, required(file, "geometry_id"));
  KVANT_ASSIGN(plan.weights_id, required(file, "weights_id"));
  KVANT_ASSIGN(plan.corpus_sha256, required(file, "corpus_sha256"));
  KVANT_ASSIGN(plan.kv, required(file, "kv"));
  return {};
}

Result<QuantPlan> parse_plan(std::span<const std::byte> bytes) {
  KVANT_ASSIGN(const Safetensors file, parse_safetensors(bytes));
  QuantPlan plan;
  KVANT_TRY(read_metadata(file, plan));
  for (const SafetensorsTensor& tensor : file.tensors) {
    KVANT_ASSIGN(const TensorPlace place, parse_name(tensor.name));
    const size_t layer = static_cast<size_t>(place.layer);
    if (plan.layers.size() <= layer) plan.layers.resize(layer + 1);
    if (Status status = read_tensor(tensor, place, plan.layers[layer]); !status) {
      return status.error().with_context("tensor " + quote_name(tensor.name));
    }
  }
  return plan;
}

// ---- writing ----

Status write_atomically(const std::string& path, std::string_view bytes) {
  const std::string target = path + ".tmp" + std::to_string(::getpid());
  const auto failed = [&](int error) {
    ::unlink(target.c_str());
    return Error(ErrorCode::kIoError, "cannot write '" + path + "': " + std::strerror(error));
  };
  const int fd = ::open(target.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return failed(errno);
  int error = 0;
  while (!bytes.empty() && error == 0) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written >= 0) {
      bytes.remove_prefix(static_cast<size_t>(written));
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (error == 0 && ::fsync(fd) != 0) error = errno;
  if (::close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && std::rename(target.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) return failed(error);
  return {};
}

void add_tensor(Safetensors& file, std::string name, std::vector<int64_t> shape,
                const std::vector<float>& values) {
  if (values.empty()) return;
  file.tensors.push_back(
      {std::move(name), "F32", std::move(shape), std::as_bytes(std::span(values))});
}

// ---- plausibility ----

struct Term {
  std::string name;  // of the tensor
  const std::vector<float>& values;
  std::string_view option;  // "+bias": what asks for it
};

std::string number(float value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(value));
  return text;
}

// Every |value| in [smallest, largest]; negative ones only where `smallest` is 0.
Status check_values(const Term& term, float smallest, float largest) {
  for (size_t i = 0; i < term.values.size(); ++i) {
    const float value = term.values[i];
    const bool fits =
        smallest > 0.0f ? value >= smallest && value <= largest : std::fabs(value) <= largest;
    if (fits) continue;
    return invalid("plan: " + term.name + "[" + std::to_string(i) + "] is " + number(value) +
                   "; expected a finite value " +
                   (smallest > 0.0f ? "from " + number(smallest) + " to " : "of magnitude up to ") +
                   number(largest) + std::string(kCalibrate));
  }
  return {};
}

Status check_vector(const Term& term, const LayerPlan& layer, int num_kv_heads, int head_dim) {
  const std::string expected = shape_text(std::vector<int64_t>{num_kv_heads, head_dim});
  if (term.values.empty()) {
    return invalid("plan: " + term.name + " is missing, but " + std::string(term.option) +
                   " needs it (F32 " + expected + ")" + std::string(kCalibrate) +
                   " or leave the option out");
  }
  const bool shape_fits =
      (layer.head_dim == 0 || (layer.num_kv_heads == num_kv_heads && layer.head_dim == head_dim)) &&
      term.values.size() == static_cast<size_t>(num_kv_heads) * static_cast<size_t>(head_dim);
  if (!shape_fits) {
    return invalid("plan: " + term.name + " has " + std::to_string(term.values.size()) +
                   " values in [" + std::to_string(layer.num_kv_heads) + ", " +
                   std::to_string(layer.head_dim) + "]; the model needs " + expected +
                   ": the plan was made for another geometry");
  }
  return {};
}

Status check_scale(const Term& term, GlobalScale kind, int num_kv_heads) {
  if (term.values.empty()) {
    return invalid("plan: " + term.name +
                   " is missing, although other layers of the same side have one" +
                   std::string(kCalibrate));
  }
  const size_t count = term.values.size();
  const bool per_head = kind == GlobalScale::kPerHead && count == static_cast<size_t>(num_kv_heads);
  if (count != 1 && !per_head) {
    return invalid("plan: " + term.name + " has " + std::to_string(count) + " values; expected 1" +
                   (kind == GlobalScale::kPerHead
                        ? " or one for each of the " + std::to_string(num_kv_heads) + " KV heads"
                        : std::string()));
  }
  return check_values(term, kSmallestScale, kLargestScale);
}

bool has_scales(const QuantPlan& plan, bool keys) {
  return std::any_of(plan.layers.begin(), plan.layers.end(), [&](const LayerPlan& layer) {
    return !(keys ? layer.k : layer.v).global_scale.empty();
  });
}

}  // namespace

Result<QuantPlan> QuantPlan::parse(std::span<const std::byte> bytes, std::string_view file_name) {
  Result<QuantPlan> plan = parse_plan(bytes);
  if (!plan) return plan.error().with_context(file_name);
  return plan;
}

Result<QuantPlan> QuantPlan::load(const std::string& path) {
  KVANT_ASSIGN(const MappedFile file, MappedFile::open(path));
  return parse(file.bytes(), path);
}

Status QuantPlan::save(const std::string& path) const {
  Safetensors file;
  file.metadata = {{"kvant_plan_version", std::to_string(kPlanVersion)},
                   {"geometry_id", geometry_id},
                   {"weights_id", weights_id},
                   {"corpus_sha256", corpus_sha256},
                   {"kv", kv}};
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerPlan& layer = layers[i];
    const std::vector<int64_t> extents = {layer.num_kv_heads, layer.head_dim};
    for (const bool keys : {true, false}) {
      const SidePlan& side = keys ? layer.k : layer.v;
      for (const std::vector<float>* values : {&side.bias, &side.smooth}) {
        KVANT_CHECK(
            values->empty() || static_cast<int64_t>(values->size()) == extents[0] * extents[1],
            "a layer's bias and smooth have the extents of the layer");
      }
      add_tensor(file, tensor_name(i, keys, "global_scale"),
                 {static_cast<int64_t>(side.global_scale.size())}, side.global_scale);
      add_tensor(file, tensor_name(i, keys, "bias"), extents, side.bias);
      add_tensor(file, tensor_name(i, keys, "smooth"), extents, side.smooth);
    }
  }
  return write_atomically(path, serialize_safetensors(file));
}

SideParams QuantPlan::side_params(int layer, bool keys, int kv_head, int head_dim) const {
  SideParams params;
  if (layer < 0 || static_cast<size_t>(layer) >= layers.size()) return params;
  const LayerPlan& terms = layers[static_cast<size_t>(layer)];
  const SidePlan& side = keys ? terms.k : terms.v;
  const size_t head = static_cast<size_t>(kv_head);
  const size_t first = head * static_cast<size_t>(head_dim);
  const size_t last = first + static_cast<size_t>(head_dim);
  if (side.global_scale.size() == 1) params.global_scale = side.global_scale[0];
  if (side.global_scale.size() > 1) {
    KVANT_CHECK(head < side.global_scale.size(), "check_plan was called with the model's extents");
    params.global_scale = side.global_scale[head];
  }
  if (!side.bias.empty()) {
    KVANT_CHECK(last <= side.bias.size(), "check_plan was called with the model's extents");
    params.bias = side.bias.data() + first;
  }
  if (!side.smooth.empty()) {
    KVANT_CHECK(last <= side.smooth.size(), "check_plan was called with the model's extents");
    params.smooth = side.smooth.data() + first;
  }
  return params;
}

Status check_plan(const QuantPlan& plan, const CacheFormat& format, int num_layers,
                  int num_kv_heads, int head_dim) {
  if (plan.layers.size() > static_cast<size_t>(num_layers)) {
    return invalid("plan: it has " + std::to_string(plan.layers.size()) + " layers and the model " +
                   std::to_string(num_layers) + ": the plan was made for another geometry");
  }
  static const LayerPlan kNoTerms;
  for (size_t i = 0; i < static_cast<size_t>(num_layers); ++i) {
    const LayerPlan& layer = i < plan.layers.size() ? plan.layers[i] : kNoTerms;
    for (const bool keys : {true, false}) {
      const SideFormat& side = keys ? format.k : format.v;
      const SidePlan& terms = keys ? layer.k : layer.v;
      if (side.bias) {
        const Term bias = {tensor_name(i, keys, "bias"), terms.bias, "+bias"};
        KVANT_TRY(check_vector(bias, layer, num_kv_heads, head_dim));
        KVANT_TRY(check_values(bias, 0.0f, kLargestBias));
      }
      if (side.smooth) {
        const Term smooth = {tensor_name(i, keys, "smooth"), terms.smooth, "+smooth"};
        KVANT_TRY(check_vector(smooth, layer, num_kv_heads, head_dim));
        KVANT_TRY(check_values(smooth, kSmallestFactor, kLargestFactor));
      }
      const GlobalScale kind = format_info(side.base).global_scale;
      if (kind != GlobalScale::kNone && has_scales(plan, keys)) {
        KVANT_TRY(check_scale({tensor_name(i, keys, "global_scale"), terms.global_scale, ""}, kind,
                              num_kv_heads));
      }
    }
  }
  return {};
}

}  // namespace kvant::formats
