#include "kvant/backend/cuda/page_convert.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "kvant/backend/cuda/page_map.h"
#include "kvant/backend/cuda/status.h"
#include "kvant/formats/sections.h"

namespace kvant::backend::cuda {

using cache::Layout;
using formats::kSectionAlignment;

namespace {

constexpr int kThreads = 256;

// The sections of one side: codes, scales, mean.
struct SideBatch {
  std::byte* base;
  int64_t page_stride;
  int64_t start[3];
  int64_t head_stride[3];
  bool planar;
  bool scales_by_four;
  bool padded;

  __device__ std::byte* section(int index, int page, int head) const {
    return base + page * page_stride + start[index] + head * head_stride[index];
  }
};

struct ConvertArgs {
  SideMap map[2];
  int mean_bytes[2];
  SideBatch from[2];
  SideBatch to[2];
  int num_kv_heads;
};

__device__ CodeFields fields_of(const SideMap& map, bool planar, int token, int channel) {
  if (!planar) return sm90_code_fields(map, token, channel);
  CodeFields fields;
  fields.field[0] = planar_code_field(map, token, channel);
  fields.num = 1;
  return fields;
}

__device__ uint32_t read_code(const uint32_t* words, const CodeFields& fields) {
  uint32_t code = 0;
  for (int i = 0; i < fields.num; ++i) {
    const CodeField& field = fields.field[i];
    const int offset = field.bit % 32;
    uint32_t bits = words[field.bit / 32] >> offset;
    if (offset + field.width > 32) bits |= words[field.bit / 32 + 1] << (32 - offset);
    code |= (bits & ((1u << field.width) - 1u)) << field.shift;
  }
  return code;
}

// Into zeroed shared memory.
__device__ void write_code(uint32_t* words, const CodeFields& fields, uint32_t code) {
  for (int i = 0; i < fields.num; ++i) {
    const CodeField& field = fields.field[i];
    const int offset = field.bit % 32;
    const uint32_t bits = code >> field.shift & ((1u << field.width) - 1u);
    if (bits == 0) continue;
    atomicOr(words + field.bit / 32, bits << offset);
    if (offset + field.width > 32) atomicOr(words + field.bit / 32 + 1, bits >> (32 - offset));
  }
}

__device__ int scale_byte(const SideMap& map, const SideBatch& batch, int row, int block,
                          int part) {
  if (!batch.planar) return sm90_scale_byte(map, row, block, part);
  if (batch.scales_by_four && map.values) return row / 4 * 4 * map.num_blocks + block * 4 + row % 4;
  return planar_scale_byte(map, row, block, part);
}

__device__ void convert_codes(const SideMap& map, const SideBatch& from, const SideBatch& to,
                              const std::byte* source, std::byte* target, uint32_t* shared) {
  const auto* in = reinterpret_cast<const uint32_t*>(source);
  const int num_words = map.code_bytes / 4;
  for (int i = threadIdx.x; i < num_words; i += kThreads) shared[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < map.page_tokens * map.head_dim; i += kThreads) {
    const int token = i / map.head_dim;
    const int channel = i % map.head_dim;
    write_code(shared, fields_of(map, to.planar, token, channel),
               read_code(in, fields_of(map, from.planar, token, channel)));
  }
  __syncthreads();
  auto* out = reinterpret_cast<uint32_t*>(target);
  for (int i = threadIdx.x; i < num_words; i += kThreads) out[i] = shared[i];
}

__device__ void convert_scales(const SideMap& map, const SideBatch& from, const SideBatch& to,
                               const std::byte* source, std::byte* target) {
  if (map.num_parts == 0) return;
  const int num_entries = map.scale_bytes / map.part_bytes;
  for (int i = threadIdx.x; i < num_entries; i += kThreads) {
    const int part = i % map.num_parts;
    const int block = i / map.num_parts % map.num_blocks;
    const int row = i / map.num_parts / map.num_blocks;
    const std::byte* read = source + scale_byte(map, from, row, block, part);
    std::byte* write = target + scale_byte(map, to, row, block, part);
    for (int byte = 0; byte < map.part_bytes; ++byte) write[byte] = read[byte];
  }
}

__device__ void zero_padding(std::byte* section, int bytes) {
  const int end =
      (bytes + int{kSectionAlignment} - 1) / int{kSectionAlignment} * int{kSectionAlignment};
  for (int i = bytes + static_cast<int>(threadIdx.x); i < end; i += kThreads)
    section[i] = std::byte{0};
}

__global__ void __launch_bounds__(kThreads)
    convert_kernel(const __grid_constant__ ConvertArgs args) {
  extern __shared__ uint32_t shared[];
  const int side = static_cast<int>(blockIdx.x % 2);
  const int head = static_cast<int>(blockIdx.x / 2) % args.num_kv_heads;
  const int page = static_cast<int>(blockIdx.x / 2) / args.num_kv_heads;
  const SideMap& map = args.map[side];
  const SideBatch& from = args.from[side];
  const SideBatch& to = args.to[side];
  convert_codes(map, from, to, from.section(0, page, head), to.section(0, page, head), shared);
  convert_scales(map, from, to, from.section(1, page, head), to.section(1, page, head));
  const int mean_bytes = args.mean_bytes[side];
  if (mean_bytes > 0) {
    const std::byte* mean = from.section(2, page, head);
    for (int i = threadIdx.x; i < mean_bytes; i += kThreads) to.section(2, page, head)[i] = mean[i];
  }
  if (!to.padded) return;
  zero_padding(to.section(0, page, head), map.code_bytes);
  if (map.scale_bytes > 0) zero_padding(to.section(1, page, head), map.scale_bytes);
  if (mean_bytes > 0) zero_padding(to.section(2, page, head), mean_bytes);
}

SideBatch side_batch(const PageBatch& batch, bool keys) {
  SideBatch side = {};
  side.base = batch.base;
  side.page_stride = batch.page_stride;
  const int first = static_cast<int>(keys ? Section::kKeyCodes : Section::kValueCodes);
  for (int i = 0; i < (keys ? 3 : 2); ++i) {
    side.start[i] = batch.start[first + i];
    side.head_stride[i] = batch.head_stride[first + i];
  }
  side.planar = batch.layout == Layout::kPlanar;
  side.scales_by_four = batch.value_scales_by_four;
  side.padded = batch.padded;
  return side;
}

}  // namespace

PageBatch unit_batch(const cache::UnitShape& shape, Layout layout, std::byte* base,
                     int64_t page_stride) {
  const formats::UnitSections at =
      formats::unit_sections(shape.k, shape.v, shape.page_tokens, shape.head_dim);
  PageBatch batch;
  batch.base = base;
  batch.page_stride = page_stride;
  batch.start = {at.k_codes, at.k_scales, at.k_mean, at.v_codes, at.v_scales};
  batch.head_stride.fill(at.bytes);
  batch.layout = layout;
  return batch;
}

PageBatch nvfp4_page_batch(const cache::UnitShape& shape, std::byte* base, int num_kv_heads,
                           bool value_scales_by_four) {
  const int64_t codes = static_cast<int64_t>(shape.page_tokens) * shape.head_dim / 2;
  const int64_t scales = static_cast<int64_t>(shape.page_tokens) * shape.head_dim / 16;
  PageBatch batch;
  batch.base = base;
  batch.page_stride = 2 * num_kv_heads * (codes + scales);
  const int64_t values = num_kv_heads * (codes + scales);
  batch.start = {0, num_kv_heads * codes, 0, values, values + num_kv_heads * codes};
  batch.head_stride = {codes, scales, 0, codes, scales};
  batch.layout = Layout::kPlanar;
  batch.value_scales_by_four = value_scales_by_four;
  batch.padded = false;
  return batch;
}

Status convert_pages(const cache::UnitShape& shape, const PageBatch& from, const PageBatch& to,
                     int num_pages, int num_kv_heads, cudaStream_t stream) {
  if (from.layout == Layout::kCpu || to.layout == Layout::kCpu) {
    return Error(
        ErrorCode::kUnsupported,
        "devices convert between the layouts sm90 and planar; convert cpu pages on the host");
  }
  for (const PageBatch* batch : {&from, &to}) {
    const bool paged = !batch->padded;
    const bool nvfp4 = shape.k.base == formats::FormatId::kNvfp4 &&
                       shape.v.base == formats::FormatId::kNvfp4 && !shape.k.mean;
    if (paged && !nvfp4) {
      return Error(ErrorCode::kInvalidArgument,
                   "NVFP4 pages of other engines hold nvfp4 keys and values without a mean");
    }
  }
  if (num_pages == 0) return {};
  ConvertArgs args = {};
  args.num_kv_heads = num_kv_heads;
  int shared_bytes = 0;
  for (const bool keys : {true, false}) {
    const int side = keys ? 0 : 1;
    args.map[side] = make_side_map(keys ? shape.keys() : shape.values());
    args.mean_bytes[side] = keys && shape.k.mean ? shape.head_dim * 2 : 0;
    args.from[side] = side_batch(from, keys);
    args.to[side] = side_batch(to, keys);
    shared_bytes = std::max(shared_bytes, args.map[side].code_bytes);
  }
  KVANT_TRY(
      cuda_status(cudaFuncSetAttribute(convert_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       shared_bytes),
                  "raising shared memory of the page converter"));
  convert_kernel<<<num_pages * num_kv_heads * 2, kThreads, shared_bytes, stream>>>(args);
  return launch_status("convert_kernel");
}

}  // namespace kvant::backend::cuda
