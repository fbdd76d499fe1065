#include "kvant/backend/host.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

namespace kvant::backend {

HostMemorySize host_memory_size() {
  HostMemorySize size;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen("/proc/meminfo", "r"),
                                                             std::fclose);
  if (file == nullptr) return size;
  char line[256];
  while (std::fgets(line, sizeof(line), file.get()) != nullptr) {
    long long kib = 0;
    if (std::sscanf(line, "MemTotal: %lld", &kib) == 1) size.total = kib * 1024;
    if (std::sscanf(line, "MemAvailable: %lld", &kib) == 1) size.available = kib * 1024;
  }
  return size;
}

Status check_matrix_source(const MatrixSource& source) {
  const formats::WeightTypeInfo& info = formats::weight_type_info(source.type);
  const std::string name = "matrix " + std::string(source.name);
  if (source.rows <= 0 || source.cols <= 0) {
    return Error(ErrorCode::kInvalidArgument,
                 name + ": expected positive rows and columns, found " +
                     std::to_string(source.rows) + " x " + std::to_string(source.cols));
  }
  if (source.cols % info.block_elements != 0) {
    return Error(ErrorCode::kInvalidArgument, name + ": rows of " + std::string(info.name) +
                                                  " have a multiple of " +
                                                  std::to_string(info.block_elements) +
                                                  " columns, found " + std::to_string(source.cols));
  }
  const int64_t row_bytes = formats::weight_bytes(source.type, source.cols);
  if (static_cast<int64_t>(source.bytes.size()) / row_bytes < source.rows) {
    return Error(ErrorCode::kInvalidArgument,
                 name + ": " + std::to_string(source.rows) + " rows of " +
                     std::to_string(row_bytes) + " bytes expected, " +
                     std::to_string(source.bytes.size()) + " bytes found");
  }
  if (source.row_order.empty()) return {};
  if (static_cast<int64_t>(source.row_order.size()) != source.rows) {
    return Error(ErrorCode::kInvalidArgument, name + ": a row order names " +
                                                  std::to_string(source.rows) + " rows, found " +
                                                  std::to_string(source.row_order.size()));
  }
  for (const int32_t row : source.row_order) {
    if (row < 0 || row >= source.rows) {
      return Error(ErrorCode::kInvalidArgument,
                   name + ": row " + std::to_string(row) + " in the row order does not exist");
    }
  }
  return {};
}

Status check_embed(const MatrixSource& table, std::span<const int32_t> ids) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= table.rows) {
      return Error(ErrorCode::kInvalidArgument, "token id " + std::to_string(id) +
                                                    " is not in the vocabulary of " +
                                                    std::to_string(table.rows) + " tokens");
    }
  }
  return {};
}

void embed_row(const MatrixSource& table, int64_t id, float* out) {
  const int64_t row = table.row_order.empty() ? id : table.row_order[static_cast<size_t>(id)];
  const int64_t row_bytes = formats::weight_bytes(table.type, table.cols);
  formats::dequantize_row(table.type, table.bytes.data() + row * row_bytes, table.cols, out);
}

}  // namespace kvant::backend
