#include "kvant/model/source.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvant/base/check.h"
#include "kvant/base/small_floats.h"
#include "kvant/model/random.h"

namespace kvant::model {
namespace {

using backend::MatrixSource;
using formats::WeightType;

uint64_t fnv1a(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return hash;
}

constexpr WeightType kDummyTypes[] = {WeightType::kQ4_0, WeightType::kQ4_K, WeightType::kQ8_0,
                                      WeightType::kBF16, WeightType::kF8_E4M3};

// Random codes in blocks of `code_bytes` behind `head`.
void make_blocks(int64_t num_blocks, std::span<const uint8_t> head, int64_t code_bytes,
                 SplitMix64& random, std::byte* out) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    std::memcpy(out, head.data(), head.size());
    out += head.size();
    for (int64_t i = 0; i < code_bytes; i += 8) {
      const uint64_t bits = random.next();
      std::memcpy(out + i, &bits, 8);
    }
    out += code_bytes;
  }
}

// Rows of uniformly random codes, without the two that are no numbers.
void make_e4m3_rows(int64_t rows, int64_t cols, float sigma, SplitMix64& random, std::byte* out) {
  double squares = 0.0;
  for (int code = 0; code < 256; ++code) {
    const float value = from_e4m3(static_cast<uint8_t>((code & 0x7f) == 0x7f ? code - 1 : code));
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  const float scale = sigma / static_cast<float>(std::sqrt(squares / 256));
  for (int64_t row = 0; row < rows; ++row, out += cols) {
    std::memcpy(out, &scale, sizeof(scale));
    out += sizeof(scale);
    for (int64_t i = 0; i < cols; i += 8) {
      uint64_t codes = random.next();
      const uint64_t nan =
          ((codes & 0x7f7f7f7f7f7f7f7fu) + 0x0101010101010101u) & ~0x7f7f7f7f7f7f7f7fu;
      codes &= ~(nan >> 7);
      std::memcpy(out + i, &codes, static_cast<size_t>(std::min<int64_t>(8, cols - i)));
    }
  }
}

// What F8_E4M3 is not made for: tables that are also read row by row, or decide between experts.
bool keeps_its_type(std::string_view name) {
  return name == "token_embd.weight" || name == "output.weight" ||
         name.ends_with(".ffn_gate_inp.weight");
}

}  // namespace

void make_random_weights(WeightType type, int64_t rows, int64_t cols, uint64_t seed,
                         std::byte* out) {
  SplitMix64 random(seed);
  const float sigma = 1.0f / std::sqrt(static_cast<float>(cols));
  if (type == WeightType::kBF16) {
    const float scale =
        sigma * std::sqrt(3.0f) * 0x1p-15f;  // uniform with standard deviation sigma
    for (int64_t i = 0; i < rows * cols; i += 4) {
      const uint64_t bits = random.next();
      for (int64_t j = 0; j < 4 && i + j < rows * cols; ++j) {
        const uint16_t value =
            to_bf16(scale * static_cast<float>(static_cast<int16_t>(bits >> (16 * j))));
        std::memcpy(out + 2 * (i + j), &value, 2);
      }
    }
    return;
  }
  if (type == WeightType::kF8_E4M3) {
    make_e4m3_rows(rows, cols, sigma, random, out);
    return;
  }
  // Codes are uniform over 16 or 256 levels; their standard deviation is levels / sqrt(12).
  const float step = sigma * std::sqrt(12.0f) / (type == WeightType::kQ8_0 ? 256.0f : 16.0f);
  if (type == WeightType::kQ4_K) {
    // Scales and minima of all sub-blocks are 32 (packed: 0xa0, low bits 0): value = 32 d q - 32 m.
    const uint16_t scales[2] = {to_f16(step / 32.0f), to_f16(7.5f * step / 32.0f)};
    uint8_t head[16] = {};
    std::memcpy(head, scales, sizeof(scales));
    std::memset(head + sizeof(scales), 0xa0, 8);
    make_blocks(rows * cols / 256, head, 128, random, out);
    return;
  }
  KVANT_CHECK(type == WeightType::kQ4_0 || type == WeightType::kQ8_0, "a type of kDummyTypes");
  const uint16_t scale = to_f16(step);
  uint8_t head[2];
  std::memcpy(head, &scale, sizeof(scale));
  make_blocks(rows * cols / 32, head, type == WeightType::kQ4_0 ? 16 : 32, random, out);
}

Result<WeightType> parse_dummy_type(std::string_view name) {
  std::vector<std::string_view> known;
  for (const WeightType type : kDummyTypes) {
    if (formats::weight_type_name(type) == name) return type;
    known.push_back(formats::weight_type_name(type));
  }
  return Error(
      ErrorCode::kInvalidArgument,
      fmt::format("unknown type '{}' of random weights; one of {}", name, fmt::join(known, ", ")));
}

Result<std::unique_ptr<ModelSource>> ModelSource::open(const std::string& path,
                                                       WeightStorage storage) {
  std::unique_ptr<ModelSource> source(new ModelSource());
  source->storage_ = storage;
  KVANT_ASSIGN(source->gguf_, Gguf::open(path));
  source->name_ = path;
  KVANT_ASSIGN(source->config_, read_config(*source->gguf_));
  return source;
}

Result<std::unique_ptr<ModelSource>> ModelSource::parse(std::span<const std::byte> bytes,
                                                        std::string name, WeightStorage storage) {
  std::unique_ptr<ModelSource> source(new ModelSource());
  source->storage_ = storage;
  KVANT_ASSIGN(source->gguf_, Gguf::parse(bytes, name));
  source->name_ = std::move(name);
  KVANT_ASSIGN(source->config_, read_config(*source->gguf_));
  return source;
}

Result<std::unique_ptr<ModelSource>> ModelSource::dummy(ModelConfig config, WeightType type) {
  KVANT_TRY(check_config(config));
  std::unique_ptr<ModelSource> source(new ModelSource());
  source->name_ = config.name + " (random weights)";
  source->config_ = std::move(config);
  source->dummy_type_ = type;
  return source;
}

WeightType ModelSource::dummy_type_for(int64_t cols) const {
  const int64_t block = formats::weight_type_info(dummy_type_).block_elements;
  return cols % block == 0 ? dummy_type_ : WeightType::kBF16;
}

bool ModelSource::is_made(std::string_view name) const {
  return !gguf_ || (storage_ == WeightStorage::kF8E4m3 && !keeps_its_type(name));
}

Result<GgufTensor> ModelSource::tensor(std::string_view name, std::span<const int64_t> dims) const {
  const GgufTensor* found = gguf_->find_tensor(name);
  if (found == nullptr) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{}: there is no tensor {}, which a {} model needs", name_, name,
                             config_.architecture));
  }
  std::vector<int64_t> wanted(dims.begin(), dims.end());
  wanted.resize(4, 1);
  if (!std::equal(wanted.begin(), wanted.end(), found->dims.begin())) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{}: tensor {} has the shape [{}]; the model's settings ask for [{}]",
                             name_, name, fmt::join(found->dims, ", "), fmt::join(wanted, ", ")));
  }
  return *found;
}

Result<MatrixSource> ModelSource::describe(std::string_view name, int64_t rows,
                                           int64_t cols) const {
  MatrixSource source{.name = name, .rows = rows, .cols = cols};
  if (!gguf_) {
    source.type = dummy_type_for(cols);
    return source;
  }
  const int64_t dims[] = {cols, rows};
  KVANT_ASSIGN(const GgufTensor found, tensor(name, dims));
  source.name = found.name;
  source.type = type_of(found);
  if (!is_made(name)) source.bytes = found.bytes;
  return source;
}

WeightType ModelSource::type_of(const GgufTensor& tensor) const {
  return is_made(tensor.name) ? WeightType::kF8_E4M3 : tensor.type;
}

Status ModelSource::requantise(std::string_view name, const MatrixSource& source, std::byte* out) {
  const GgufTensor* const tensor = gguf_->find_tensor(name);
  KVANT_CHECK(tensor != nullptr, "described before");
  const int64_t file_row_bytes = formats::weight_bytes(tensor->type, source.cols);
  const int64_t row_bytes = formats::weight_bytes(source.type, source.cols);
  std::vector<float> values(static_cast<size_t>(source.cols));
  for (int64_t row = 0; row < source.rows; ++row) {
    formats::dequantize_row(tensor->type, tensor->bytes.data() + row * file_row_bytes, source.cols,
                            values.data());
    if (!formats::quantize_row_e4m3(values, out + row * row_bytes)) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("{}: tensor {}: row {} has a value that is not finite, of which "
                               "F8_E4M3 cannot be made",
                               name_, name, row));
    }
  }
  gguf_->drop_pages(*tensor);
  return {};
}

Status ModelSource::make(std::string_view name, MatrixSource& source, MemoryResource& memory) {
  const int64_t bytes = formats::weight_bytes(source.type, source.rows, source.cols);
  auto found = made_.find(name);
  if (found == made_.end()) {
    KVANT_ASSIGN(Buffer buffer, Buffer::create(memory, bytes, MemoryUse::kWeights));
    if (gguf_) {
      KVANT_TRY(requantise(name, source, buffer.data()));
    } else {
      make_random_weights(source.type, source.rows, source.cols, fnv1a(name), buffer.data());
    }
    found = made_.emplace(std::string(name), std::move(buffer)).first;
  }
  source.name = found->first;
  source.bytes = {found->second.data(), static_cast<size_t>(bytes)};
  return {};
}

Result<MatrixSource> ModelSource::matrix(std::string_view name, int64_t rows, int64_t cols,
                                         MemoryResource& memory) {
  KVANT_ASSIGN(MatrixSource source, describe(name, rows, cols));
  if (is_made(name)) KVANT_TRY(make(name, source, memory));
  return source;
}

Result<std::vector<MatrixSource>> ModelSource::describe_experts(std::string_view name,
                                                                int64_t num_experts, int64_t rows,
                                                                int64_t cols) const {
  MatrixSource one{.name = name, .rows = rows, .cols = cols};
  if (!gguf_) {
    one.type = dummy_type_for(cols);
    return std::vector<MatrixSource>(num_experts, one);
  }
  const int64_t dims[] = {cols, rows, num_experts};
  KVANT_ASSIGN(const GgufTensor stacked, tensor(name, dims));
  one.name = stacked.name;
  one.type = type_of(stacked);
  std::vector<MatrixSource> experts(num_experts, one);
  if (is_made(name)) return experts;
  const size_t bytes = static_cast<size_t>(formats::weight_bytes(stacked.type, rows, cols));
  for (int64_t i = 0; i < num_experts; ++i)
    experts[i].bytes = stacked.bytes.subspan(i * bytes, bytes);
  return experts;
}

Result<std::vector<MatrixSource>> ModelSource::experts(std::string_view name, int64_t num_experts,
                                                       int64_t rows, int64_t cols,
                                                       MemoryResource& memory) {
  KVANT_ASSIGN(std::vector<MatrixSource> experts, describe_experts(name, num_experts, rows, cols));
  if (is_made(name)) {
    MatrixSource stacked = experts.front();
    stacked.rows = rows * num_experts;
    KVANT_TRY(make(name, stacked, memory));
    const size_t bytes = stacked.bytes.size() / num_experts;
    for (int64_t i = 0; i < num_experts; ++i) {
      experts[i].name = stacked.name;
      experts[i].bytes = stacked.bytes.subspan(i * bytes, bytes);
    }
  }
  return experts;
}

Result<std::vector<float>> ModelSource::vector(std::string_view name, int64_t size) const {
  if (!gguf_) {
    const bool is_bias = name.ends_with(".bias");
    return std::vector<float>(size, is_bias ? 0.0f : 1.0f);
  }
  const int64_t dims[] = {size};
  KVANT_ASSIGN(const GgufTensor found, tensor(name, dims));
  std::vector<float> values(size);
  formats::dequantize_row(found.type, found.bytes.data(), size, values.data());
  return values;
}

void ModelSource::release(std::string_view name, bool still_read) {
  if (gguf_) {
    const GgufTensor* tensor = gguf_->find_tensor(name);
    if (tensor != nullptr) gguf_->drop_pages(*tensor);
  }
  const auto found = made_.find(name);
  if (!still_read && found != made_.end()) made_.erase(found);
}

int64_t ModelSource::made_bytes(const MatrixSource& described) const {
  return is_made(described.name)
             ? formats::weight_bytes(described.type, described.rows, described.cols)
             : 0;
}

}  // namespace kvant::model
