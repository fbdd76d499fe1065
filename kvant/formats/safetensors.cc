#include "kvant/formats/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "kvant/base/check.h"
#include "kvant/formats/suggest.h"

namespace kvant::formats {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little);

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxRank = 8;

Error corrupt(std::string message) {
  return Error(ErrorCode::kCorruptData, std::move(message));
}

// Bits per element; 0 for a type that is not known.
int dtype_bits(std::string_view dtype) {
  struct Row {
    std::string_view name;
    int bits;
  };
  constexpr Row kRows[] = {{"BOOL", 8},    {"U8", 8},      {"I8", 8},   {"F8_E4M3", 8},
                           {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"I16", 16}, {"U16", 16},
                           {"F16", 16},    {"BF16", 16},   {"I32", 32}, {"U32", 32},
                           {"F32", 32},    {"F64", 64},    {"I64", 64}, {"U64", 64}};
  for (const Row& row : kRows) {
    if (row.name == dtype) return row.bits;
  }
  return 0;
}

// The header as JSON; duplicate names are an error, which nlohmann's DOM would hide.
Result<Json> parse_header(std::string_view text) {
  std::set<std::string> names;
  std::string duplicate;
  const auto on_event = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth == 1 && event == Json::parse_event_t::key) {
      const std::string name = value.get<std::string>();
      if (!names.insert(name).second && duplicate.empty()) duplicate = name;
    }
    return true;
  };
  Json header = Json::parse(text, on_event, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object()) {
    return corrupt("the header is not a JSON object");
  }
  if (!duplicate.empty()) return corrupt("tensor " + quote_name(duplicate) + " is listed twice");
  return header;
}

bool to_size(const Json& value, uint64_t& out) {
  if (!value.is_number_integer() || (!value.is_number_unsigned() && value.get<int64_t>() < 0)) {
    return false;
  }
  out = value.get<uint64_t>();
  return true;
}

// Number of elements, or an error where a dimension is no number or the product too large.
Result<uint64_t> parse_shape(const Json& shape, SafetensorsTensor& tensor) {
  if (!shape.is_array() || shape.size() > kMaxRank) {
    return corrupt("its shape is not a list of at most " + std::to_string(kMaxRank) + " sizes");
  }
  uint64_t num_elements = 1;
  for (const Json& extent : shape) {
    uint64_t size = 0;
    if (!to_size(extent, size) || size > (uint64_t{1} << 40)) {
      return corrupt("its shape has a size that is not a plausible number");
    }
    if (size != 0 && num_elements > (uint64_t{1} << 48) / size) {
      return corrupt("its shape has too many elements");
    }
    num_elements *= size;
    tensor.shape.push_back(static_cast<int64_t>(size));
  }
  return num_elements;
}

Status parse_tensor(const Json& entry, std::span<const std::byte> data, SafetensorsTensor& tensor) {
  if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") ||
      !entry.contains("shape") || !entry.contains("data_offsets") || !entry["dtype"].is_string()) {
    return corrupt("its entry must have dtype, shape and data_offsets, and nothing else");
  }
  tensor.dtype = entry["dtype"].get<std::string>();
  KVANT_ASSIGN(const uint64_t num_elements, parse_shape(entry["shape"], tensor));
  const Json& offsets = entry["data_offsets"];
  uint64_t begin = 0, end = 0;
  if (!offsets.is_array() || offsets.size() != 2 || !to_size(offsets[0], begin) ||
      !to_size(offsets[1], end) || begin > end || end > data.size()) {
    return corrupt("its data_offsets do not lie in the " + std::to_string(data.size()) +
                   " bytes of data");
  }
  const uint64_t bits = static_cast<uint64_t>(dtype_bits(tensor.dtype));
  if (bits != 0 && num_elements * bits != (end - begin) * 8) {
    return corrupt("its shape needs " + std::to_string(num_elements * bits / 8) +
                   " bytes but data_offsets span " + std::to_string(end - begin));
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return {};
}

Status check_contiguous(const std::vector<SafetensorsTensor>& tensors,
                        std::span<const std::byte> data) {
  std::vector<const SafetensorsTensor*> order;
  for (const SafetensorsTensor& tensor : tensors) order.push_back(&tensor);
  // Empty tensors first where several begin at one place.
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::make_pair(a->bytes.data(), a->bytes.size()) <
           std::make_pair(b->bytes.data(), b->bytes.size());
  });
  const std::byte* end = data.data();
  for (const SafetensorsTensor* tensor : order) {
    if (tensor->bytes.data() != end) {
      return corrupt("tensor " + quote_name(tensor->name) +
                     " overlaps another or leaves a hole before it");
    }
    end += tensor->bytes.size();
  }
  const auto left = data.data() + data.size() - end;
  if (left != 0) return corrupt(std::to_string(left) + " bytes at the end belong to no tensor");
  return {};
}

}  // namespace

Result<Safetensors> parse_safetensors(std::span<const std::byte> bytes) {
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof(header_bytes)) {
    return corrupt("too short for a safetensors file: " + std::to_string(bytes.size()) + " bytes");
  }
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const std::span<const std::byte> rest = bytes.subspan(sizeof(header_bytes));
  if (header_bytes > std::min<uint64_t>(rest.size(), kMaxHeaderBytes)) {
    return corrupt("not a safetensors file, or cut off: its header would take " +
                   std::to_string(header_bytes) + " of " + std::to_string(rest.size()) + " bytes");
  }
  const std::string_view text(reinterpret_cast<const char*>(rest.data()), header_bytes);
  if (!text.starts_with('{')) return corrupt("not a safetensors file: no JSON header");
  const std::span<const std::byte> data = rest.subspan(header_bytes);
  KVANT_ASSIGN(const Json header, parse_header(text));
  Safetensors file;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return corrupt("__metadata__ is not an object of strings");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string())
          return corrupt("__metadata__ " + quote_name(key) + " is not a string");
        file.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    SafetensorsTensor tensor;
    tensor.name = name;
    if (Status status = parse_tensor(entry, data, tensor); !status) {
      return status.error().with_context("tensor " + quote_name(name));
    }
    file.tensors.push_back(std::move(tensor));
  }
  KVANT_TRY(check_contiguous(file.tensors, data));
  return file;
}

std::string serialize_safetensors(const Safetensors& content) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  size_t offset = 0;
  for (const SafetensorsTensor& tensor : content.tensors) {
    KVANT_CHECK(!header.contains(tensor.name), "tensors have unique names");
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');  // so that the data is aligned
  const uint64_t header_bytes = text.size();
  std::string file(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  file += text;
  for (const SafetensorsTensor& tensor : content.tensors) {
    file.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  }
  return file;
}

}  // namespace kvant::formats
