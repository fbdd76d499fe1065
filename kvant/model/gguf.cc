#include "kvant/model/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

namespace kvant::model {
namespace {

constexpr uint32_t kMagic = 0x46554747;    // "GGUF"
constexpr uint64_t kMaxNameBytes = 65535;  // keys: docs/gguf.md; longer tensor names are hostile
constexpr uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;       // key of one byte, type, value of one byte
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 4 + 8;  // name of one byte, dims, type, offset
constexpr uint64_t kDefaultAlignment = 32;
// Counts are only claims until the entries have been read: reserve no more than this ahead.
constexpr uint64_t kMaxReserve = 4096;

// Bytes of a value of fixed size; 0 for strings, arrays and unknown types.
uint64_t fixed_bytes(GgufValueType type) {
  switch (type) {
    case GgufValueType::kU8:
    case GgufValueType::kI8:
    case GgufValueType::kBool: return 1;
    case GgufValueType::kU16:
    case GgufValueType::kI16: return 2;
    case GgufValueType::kU32:
    case GgufValueType::kI32:
    case GgufValueType::kF32: return 4;
    case GgufValueType::kU64:
    case GgufValueType::kI64:
    case GgufValueType::kF64: return 8;
    case GgufValueType::kString:
    case GgufValueType::kArray: return 0;
  }
  return 0;
}

template <typename T>
T load(const std::byte* p) {
  static_assert(std::endian::native == std::endian::little, "loads are plain copies");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

}  // namespace

// Walks the file once. Every read is bounded by the bytes that are left.
class GgufParser {
 public:
  explicit GgufParser(Gguf& out) : out_(out), bytes_(out.bytes_) {}

  Status run() {
    uint64_t num_tensors = 0;
    uint64_t num_entries = 0;
    KVANT_TRY(header(num_tensors, num_entries));
    out_.keys_.reserve(std::min(num_entries, kMaxReserve));
    out_.values_.reserve(std::min(num_entries, kMaxReserve));
    for (uint64_t i = 0; i < num_entries; ++i) KVANT_TRY(metadata_entry(i));
    KVANT_TRY(read_alignment());
    out_.tensors_.reserve(std::min(num_tensors, kMaxReserve));
    out_.tensor_index_.reserve(std::min(num_tensors, kMaxReserve));
    for (uint64_t i = 0; i < num_tensors; ++i) KVANT_TRY(tensor_entry(i));
    return place_tensors();
  }

 private:
  Error corrupt(std::string_view what) const {
    return Error(ErrorCode::kCorruptData, fmt::format("{}: {}", out_.name_, what));
  }
  Error unsupported(std::string_view what) const {
    return Error(ErrorCode::kUnsupported, fmt::format("{}: {}", out_.name_, what));
  }
  Error truncated(std::string_view what) const {
    return corrupt(
        fmt::format("the file ends inside {} (at byte {} of {}): it is truncated or damaged; "
                    "fetch it again",
                    what, pos_, bytes_.size()));
  }
  uint64_t remaining() const { return bytes_.size() - pos_; }

  template <typename T>
  Result<T> read(std::string_view what) {
    if (remaining() < sizeof(T)) return truncated(what);
    const T value = load<T>(bytes_.data() + pos_);
    pos_ += sizeof(T);
    return value;
  }

  // A string of at most `max_bytes` bytes.
  Result<std::string_view> read_string(std::string_view what, uint64_t max_bytes) {
    KVANT_ASSIGN(const uint64_t length, read<uint64_t>(what));
    if (length > remaining()) {
      return corrupt(fmt::format("{} at byte {} claims {} bytes, but {} are left", what, pos_ - 8,
                                 length, remaining()));
    }
    if (length > max_bytes) {
      return corrupt(fmt::format("{} at byte {} has {} bytes, more than {}", what, pos_ - 8, length,
                                 max_bytes));
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data() + pos_), length);
    pos_ += length;
    return text;
  }

  // A non-empty name without control characters, so that messages can quote it.
  Result<std::string_view> read_name(std::string_view what) {
    KVANT_ASSIGN(const std::string_view text, read_string(what, kMaxNameBytes));
    if (text.empty()) return corrupt(fmt::format("{} at byte {} is empty", what, pos_ - 8));
    for (const char c : text) {
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
        return corrupt(fmt::format("{} before byte {} contains a control character", what, pos_));
      }
    }
    return text;
  }

  Status header(uint64_t& num_tensors, uint64_t& num_entries) {
    KVANT_ASSIGN(const uint32_t magic, read<uint32_t>("the header"));
    if (magic != kMagic) {
      return corrupt("expected a GGUF file (first bytes \"GGUF\"); this is something else");
    }
    KVANT_ASSIGN(out_.version_, read<uint32_t>("the header"));
    if (out_.version_ != 2 && out_.version_ != 3) {
      const uint32_t swapped = __builtin_bswap32(out_.version_);
      if (swapped >= 1 && swapped <= 3) {
        return unsupported(
            "a big-endian GGUF file; kvant reads little-endian files: convert it or "
            "fetch the little-endian one");
      }
      return unsupported(
          fmt::format("GGUF version {}; kvant reads versions 2 and 3: convert the "
                      "file with a current converter",
                      out_.version_));
    }
    KVANT_ASSIGN(num_tensors, read<uint64_t>("the header"));
    KVANT_ASSIGN(num_entries, read<uint64_t>("the header"));
    if (num_entries > remaining() / kMinEntryBytes) {
      return corrupt(
          fmt::format("the header claims {} metadata entries, more than {} bytes can hold",
                      num_entries, remaining()));
    }
    if (num_tensors > remaining() / kMinTensorBytes) {
      return corrupt(fmt::format("the header claims {} tensors, more than {} bytes can hold",
                                 num_tensors, remaining()));
    }
    return {};
  }

  Status metadata_entry(uint64_t index) {
    KVANT_ASSIGN(const std::string_view key,
                 read_name(fmt::format("the key of metadata entry {}", index)));
    const std::string what = fmt::format("the value of \"{}\"", key);
    GgufValue value;
    KVANT_ASSIGN(value.type, read_value_type(what));
    value.element_type = value.type;
    if (value.type == GgufValueType::kArray) {
      KVANT_ASSIGN(value.element_type, read_value_type(what));
      if (value.element_type == GgufValueType::kArray) {
        return unsupported(fmt::format("\"{}\" is an array of arrays", key));
      }
      KVANT_ASSIGN(value.count, read<uint64_t>(what));
    }
    const uint64_t start = pos_;
    KVANT_TRY(skip_items(value, what));
    value.bytes = bytes_.subspan(start, pos_ - start);
    if (!out_.values_.emplace(key, value).second) {
      return corrupt(fmt::format("the metadata key \"{}\" appears twice", key));
    }
    out_.keys_.push_back(key);
    return {};
  }

  Result<GgufValueType> read_value_type(std::string_view what) {
    KVANT_ASSIGN(const uint32_t id, read<uint32_t>(what));
    if (id > static_cast<uint32_t>(GgufValueType::kF64)) {
      return corrupt(fmt::format("{} has the unknown type {}", what, id));
    }
    return static_cast<GgufValueType>(id);
  }

  Status skip_items(const GgufValue& value, std::string_view what) {
    const uint64_t item_bytes = fixed_bytes(value.element_type);
    // A string takes at least the eight bytes of its length.
    if (value.count > remaining() / (item_bytes != 0 ? item_bytes : 8)) {
      if (value.type != GgufValueType::kArray) return truncated(what);
      return corrupt(
          fmt::format("{} claims {} items, more than the {} bytes that are left can hold", what,
                      value.count, remaining()));
    }
    if (item_bytes != 0) {
      pos_ += value.count * item_bytes;
      return {};
    }
    for (uint64_t i = 0; i < value.count; ++i) {
      KVANT_TRY(read_string(what, std::numeric_limits<uint64_t>::max()));
    }
    return {};
  }

  Status read_alignment() {
    alignment_ = kDefaultAlignment;
    if (!out_.has("general.alignment")) return {};
    KVANT_ASSIGN(alignment_, out_.u32("general.alignment"));
    if (!std::has_single_bit(alignment_) || alignment_ < 8) {
      return corrupt(
          fmt::format("general.alignment is {}, expected a power of two from 8 on", alignment_));
    }
    return {};
  }

  Status tensor_entry(uint64_t index) {
    GgufTensor tensor;
    KVANT_ASSIGN(tensor.name, read_name(fmt::format("the name of tensor {}", index)));
    const std::string what = fmt::format("the description of tensor \"{}\"", tensor.name);
    KVANT_TRY(read_dims(tensor, what));
    KVANT_ASSIGN(const uint32_t type_id, read<uint32_t>(what));
    const formats::WeightTypeInfo* info = formats::find_weight_type(type_id);
    if (info == nullptr) {
      const std::string_view known = formats::gguf_type_name(type_id);
      return unsupported(fmt::format("tensor \"{}\" has type {}, which kvant cannot read; {}",
                                     tensor.name,
                                     known.empty() ? fmt::format("{} (unknown)", type_id)
                                                   : fmt::format("{} ({})", known, type_id),
                                     supported_types()));
    }
    tensor.type = info->type;
    if (tensor.dims[0] % info->block_elements != 0) {
      return corrupt(
          fmt::format("tensor \"{}\" has rows of {} elements, not a multiple of the {} of "
                      "a {} block",
                      tensor.name, tensor.dims[0], info->block_elements, info->name));
    }
    KVANT_ASSIGN(const uint64_t offset, read<uint64_t>(what));
    if (offset % alignment_ != 0) {
      return corrupt(
          fmt::format("tensor \"{}\" starts at offset {}, not a multiple of the alignment "
                      "{}",
                      tensor.name, offset, alignment_));
    }
    if (!out_.tensor_index_.emplace(tensor.name, out_.tensors_.size()).second) {
      return corrupt(fmt::format("the tensor \"{}\" appears twice", tensor.name));
    }
    out_.tensors_.push_back(tensor);
    offsets_.push_back(offset);
    return {};
  }

  static std::string supported_types() {
    std::string names = "supported:";
    for (const formats::WeightTypeInfo& info : formats::weight_types()) {
      if (info.in_files) names += fmt::format(" {}", info.name);
    }
    return names;
  }

  Status read_dims(GgufTensor& tensor, std::string_view what) {
    KVANT_ASSIGN(const uint32_t num_dims, read<uint32_t>(what));
    if (num_dims > tensor.dims.size()) {
      return corrupt(fmt::format("tensor \"{}\" has {} dimensions, expected at most 4", tensor.name,
                                 num_dims));
    }
    tensor.num_dims = static_cast<int>(num_dims);
    int64_t elements = 1;
    for (uint32_t i = 0; i < num_dims; ++i) {
      KVANT_ASSIGN(const uint64_t dim, read<uint64_t>(what));
      // Times 4 must not overflow either: an element has up to four bytes.
      if (dim == 0 ||
          dim > static_cast<uint64_t>((std::numeric_limits<int64_t>::max() / 4) / elements)) {
        return corrupt(fmt::format("tensor \"{}\" has an impossible size: dimension {} is {}",
                                   tensor.name, i, dim));
      }
      tensor.dims[i] = static_cast<int64_t>(dim);
      elements *= tensor.dims[i];
    }
    return {};
  }

  Status place_tensors() {
    const uint64_t padding = (alignment_ - pos_ % alignment_) % alignment_;
    if (!offsets_.empty() && padding > remaining()) return truncated("the padding before the data");
    const uint64_t data_start = pos_ + (offsets_.empty() ? 0 : padding);
    const uint64_t data_bytes = bytes_.size() - data_start;
    for (size_t i = 0; i < offsets_.size(); ++i) {
      GgufTensor& tensor = out_.tensors_[i];
      const uint64_t size =
          static_cast<uint64_t>(formats::weight_bytes(tensor.type, tensor.num_elements()));
      if (offsets_[i] > data_bytes || size > data_bytes - offsets_[i]) {
        return corrupt(
            fmt::format("tensor \"{}\" needs {} bytes at offset {} of the data, which has {} "
                        "bytes: the file is "
                        "truncated or damaged; fetch it again",
                        tensor.name, size, offsets_[i], data_bytes));
      }
      tensor.bytes = bytes_.subspan(data_start + offsets_[i], size);
    }
    return {};
  }

  Gguf& out_;
  std::span<const std::byte> bytes_;
  uint64_t pos_ = 0;
  uint64_t alignment_ = kDefaultAlignment;
  std::vector<uint64_t> offsets_;  // of tensors_, from the start of the data
};

Result<Gguf> Gguf::open(const std::string& path) {
  KVANT_ASSIGN(MappedFile file, MappedFile::open(path));
  KVANT_ASSIGN(Gguf gguf, parse(file.bytes(), path));
  gguf.file_ = std::move(file);  // the mapping does not move, so views stay valid
  return gguf;
}

Result<Gguf> Gguf::parse(std::span<const std::byte> bytes, std::string name) {
  Gguf gguf;
  gguf.bytes_ = bytes;
  gguf.name_ = std::move(name);
  KVANT_TRY(GgufParser(gguf).run());
  return gguf;
}

const GgufTensor* Gguf::find_tensor(std::string_view tensor_name) const {
  const auto it = tensor_index_.find(tensor_name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

Result<GgufTensor> Gguf::tensor(std::string_view tensor_name) const {
  if (const GgufTensor* found = find_tensor(tensor_name)) return *found;
  return Error(ErrorCode::kNotFound, fmt::format("{}: no tensor \"{}\"", name_, tensor_name));
}

}  // namespace kvant::model
