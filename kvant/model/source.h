// Where a model's configuration and weights come from: a GGUF file, as it is or re-quantised while
// it is loaded, or random numbers at any geometry.
//
// Thread-compatible. Sources of matrices stay valid while the ModelSource lives, except that
// matrices that are made (random or re-quantised) may be released once the backend has its own
// copy.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/memory.h"
#include "kvant/base/result.h"
#include "kvant/model/config.h"
#include "kvant/model/gguf.h"

namespace kvant::model {

// What becomes of a file's matrices.
enum class WeightStorage {
  kAsInFile,
  // F8_E4M3 with one scale an output row (formats::quantize_row_e4m3), of whatever type the file
  // has. As usual for this recipe the token embeddings, the output head and routers of experts stay
  // as they are, and so do norms and biases.
  kF8E4m3
};

class ModelSource {
 public:
  // A GGUF file; errors name the path.
  static Result<std::unique_ptr<ModelSource>> open(
      const std::string& path, WeightStorage storage = WeightStorage::kAsInFile);
  // The same from memory, which must outlive the result.
  static Result<std::unique_ptr<ModelSource>> parse(
      std::span<const std::byte> bytes, std::string name,
      WeightStorage storage = WeightStorage::kAsInFile);
  // Random weights: matrices of `type` where their rows hold whole blocks of it, else Q8_0 or BF16;
  // norms are 1. The same names and sizes give the same bytes on every machine.
  static Result<std::unique_ptr<ModelSource>> dummy(ModelConfig config, formats::WeightType type);

  const ModelConfig& config() const { return config_; }
  WeightStorage storage() const { return storage_; }
  formats::WeightType dummy_type() const { return dummy_type_; }  // of random weights
  const std::string& name() const { return name_; }               // path of the file
  const Gguf* gguf() const { return gguf_ ? &*gguf_ : nullptr; }  // null for random weights
  // Mapped bytes; 0 for random weights.
  int64_t file_bytes() const { return gguf_ ? gguf_->file_bytes() : 0; }

  // Name, type and size of a matrix, without its bytes if they would have to be made.
  Result<backend::MatrixSource> describe(std::string_view name, int64_t rows, int64_t cols) const;
  // With its bytes; made in `memory`, which outlives the source, if random or re-quantised.
  // kCorruptData, naming tensor and row, if a value that is re-quantised is not finite.
  Result<backend::MatrixSource> matrix(std::string_view name, int64_t rows, int64_t cols,
                                       MemoryResource& memory);
  // The matrices of all experts, which a file stacks in one tensor [experts][rows][cols].
  Result<std::vector<backend::MatrixSource>> describe_experts(std::string_view name,
                                                              int64_t num_experts, int64_t rows,
                                                              int64_t cols) const;
  Result<std::vector<backend::MatrixSource>> experts(std::string_view name, int64_t num_experts,
                                                     int64_t rows, int64_t cols,
                                                     MemoryResource& memory);
  Result<std::vector<float>> vector(std::string_view name, int64_t size) const;
  // The backend has its own copy of `name`: takes the file's bytes out of resident memory (they can
  // still be read). Bytes that were made are freed if nothing else will read them.
  void release(std::string_view name, bool still_read);

  // Memory to make weights in for a backend whose memory the host cannot write.
  MemoryResource& host_memory() { return host_memory_; }

  // The bytes that a tensor which is made and kept adds to the backend's memory; 0 if it lies in
  // the file.
  int64_t made_bytes(const backend::MatrixSource& described) const;

 private:
  ModelSource() = default;
  Result<GgufTensor> tensor(std::string_view name, std::span<const int64_t> dims) const;
  formats::WeightType dummy_type_for(int64_t cols) const;
  bool is_made(std::string_view name) const;  // not read where it lies in the file
  formats::WeightType type_of(const GgufTensor& tensor) const;
  Status requantise(std::string_view name, const backend::MatrixSource& source, std::byte* out);
  Status make(std::string_view name, backend::MatrixSource& source, MemoryResource& memory);

  ModelConfig config_;
  std::string name_;
  std::optional<Gguf> gguf_;
  WeightStorage storage_ = WeightStorage::kAsInFile;
  formats::WeightType dummy_type_ = formats::WeightType::kQ4_0;
  HostMemory host_memory_;  // before what lies in it
  std::map<std::string, Buffer, std::less<>> made_;
};

// What weights take, before anything is loaded.
struct WeightBytes {
  int64_t matrices = 0;      // repacked by the backend, or random
  int64_t parameters = 0;    // norms, biases, frequency factors
  int64_t in_place = 0;      // of the mapped file: read where they lie
  int64_t loading_peak = 0;  // highest sum of the first two while loading
};

// Called while weights load with bytes done and their total; returning false cancels.
using LoadProgress = std::function<bool(int64_t done_bytes, int64_t total_bytes)>;

// Random bytes of `type` for a matrix of rows x cols whose values are about N(0, 1/cols): what
// keeps activations of a deep model finite. Only BF16, Q4_0, Q4_K, Q8_0 and F8_E4M3.
void make_random_weights(formats::WeightType type, int64_t rows, int64_t cols, uint64_t seed,
                         std::byte* out);
// The types that make_random_weights knows, and their parsing from "Q4_0", ...
Result<formats::WeightType> parse_dummy_type(std::string_view name);

}  // namespace kvant::model
