// Speed of appending to BF16 pages and of closing pages on a CUDA device, against copies in the
// same run.
//
//   ninja -C build-cuda kvant_cuda_append_bench && build-cuda/bench/kvant_cuda_append_bench
//
// Three steps of one layer with 8 KV heads, head_dim 128 and pages of 64 tokens, per format:
//   decode   64 sequences append a token
//   close    64 pages fill (only the closing)
//   prefill  a sequence appends 8192 tokens, 128 pages fill
// Each graph runs the step on sets of its own inputs and outputs that together exceed the L2 cache
// four times (staging is one buffer, as in a model). Bytes are those that must move: activations,
// BF16 and closed pages once each. The ceiling is the faster of cudaMemcpyAsync and a copy kernel
// on as many bytes, half read and half written, in graphs like these; medians of `--repeats`.
// A table, then a JSON line for each row.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/cuda/append.h"
#include "kvant/backend/cuda/device.h"
#include "kvant/cache/layout.h"
#include "kvant/formats/sections.h"
#include "kvant/formats/spec.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kHeads = 8;
constexpr int kHeadDim = 128;
constexpr int kPageTokens = 64;
constexpr int64_t kColdBytes = 220ll << 20;

int repeats = 15;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
void require(const Status& status) {
  if (status) return;
  std::fprintf(stderr, "%s\n", status.error().message().c_str());
  std::exit(1);
}

class Device {
 public:
  explicit Device(int64_t bytes) {
    require(cudaMalloc(&data_, static_cast<size_t>(bytes)), "allocating");
    require(cudaMemset(data_, 0, static_cast<size_t>(bytes)), "clearing");
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

__device__ float random_normal(uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  float sum = 0.0f;
  for (int k = 0; k < 4; ++k) sum += static_cast<float>((x >> (16 * k)) & 0xffff) / 65536.0f;
  return (sum - 2.0f) * 1.7f;
}
__global__ void fill_f32(float* out, int64_t n) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll)
    out[i] = random_normal(i);
}
__global__ void fill_bf16(uint16_t* out, int64_t n) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll)
    out[i] = static_cast<uint16_t>(__float_as_uint(random_normal(i)) >> 16);
}
__global__ void copy_kernel(const uint4* from, uint4* to, int64_t n) {
  constexpr int kAtOnce = 4;
  const int64_t stride = gridDim.x * 256ll;
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += kAtOnce * stride) {
    uint4 x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (i + k * stride < n) x[k] = from[i + k * stride];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (i + k * stride < n) to[i + k * stride] = x[k];
  }
}

// Median microseconds of one set when a graph of all sets is replayed.
double time_graph(cudaStream_t stream, int sets, const std::function<void(int)>& enqueue) {
  for (int set = 0; set < sets; ++set) enqueue(set);  // what is allocated and sent once
  require(cudaStreamSynchronize(stream), "the first run");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capturing");
  for (int set = 0; set < sets; ++set) enqueue(set);
  require(cudaStreamEndCapture(stream, &graph), "capturing");
  require(cudaGraphInstantiate(&replay, graph, 0), "making a graph");
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "event");
  require(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < repeats + 2; ++i) {
    require(cudaEventRecord(begin, stream), "event");
    require(cudaGraphLaunch(replay, stream), "replaying");
    require(cudaEventRecord(end, stream), "event");
    require(cudaStreamSynchronize(stream), "replaying");
    float ms = 0.0f;
    require(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 2) times.push_back(ms * 1e3 / sets);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Microseconds to read `bytes` / 2 and write as many.
double copy_us(cudaStream_t stream, int64_t bytes, bool memcpy) {
  const int64_t half = (bytes / 2 + 15) / 16 * 16;
  const int sets = static_cast<int>(std::min<int64_t>(64, kColdBytes / (2 * half) + 2));
  Device from(half * sets), to(half * sets);
  return time_graph(stream, sets, [&](int set) {
    const std::byte* source = from.data() + set * half;
    std::byte* target = to.data() + set * half;
    if (memcpy) {
      require(cudaMemcpyAsync(target, source, static_cast<size_t>(half), cudaMemcpyDeviceToDevice,
                              stream),
              "copying");
    } else {
      const int64_t n = half / 16;
      const int blocks = static_cast<int>(std::min<int64_t>(132 * 8, (n + 1023) / 1024));
      copy_kernel<<<blocks, 256, 0, stream>>>(reinterpret_cast<const uint4*>(source),
                                              reinterpret_cast<uint4*>(target), n);
    }
  });
}

enum class Step { kDecode, kClose, kPrefill };

// One layer group whose layers are the sets.
class Problem {
 public:
  Problem(const std::string& kv, Step step) : step_(step) {
    auto format = formats::parse_cache_format(kv);
    if (!format) require(Status(format.error()));
    const formats::UnitSections stored =
        formats::unit_sections(format->k, format->v, kPageTokens, kHeadDim);
    const formats::UnitSections bf16 = formats::unit_sections({}, {}, kPageTokens, kHeadDim);
    num_rows_ = step == Step::kDecode ? 64 : step == Step::kPrefill ? 8192 : 0;
    num_pages_ = step == Step::kPrefill ? 128 : 64;
    closes_ = step != Step::kDecode && !format->is_bf16();
    const int64_t values = int64_t{num_rows_} * kHeads * kHeadDim * 2;
    const int64_t page_values = int64_t{num_pages_} * kPageTokens * kHeads * kHeadDim * 2;
    const int64_t stored_bytes = closes_ ? int64_t{num_pages_} * kHeads * stored.bytes : 0;
    bytes_ = values * 6 + stored_bytes + (step == Step::kClose ? page_values * 2 : 0);
    const int64_t set_bytes = values * 4 + num_pages_ * kHeads * (stored.bytes + bf16.bytes);
    sets_ = static_cast<int>(std::max<int64_t>(4, kColdBytes / set_bytes + 1));

    const bool staged = step == Step::kPrefill;
    const int64_t bf16_page = kHeads * bf16.bytes, stored_page = kHeads * stored.bytes;
    bf16_ = std::make_unique<Device>(num_pages_ * bf16_page * (staged ? 1 : sets_));
    stored_ = std::make_unique<Device>(num_pages_ * stored_page * sets_);
    activations_ = std::make_unique<Device>(std::max<int64_t>(16, values * 4 * sets_));
    fill_bf16<<<1024, 256>>>(reinterpret_cast<uint16_t*>(bf16_->data()),
                             num_pages_ * bf16_page / 2 * (staged ? 1 : sets_));
    fill_f32<<<1024, 256>>>(reinterpret_cast<float*>(activations_->data()), values * sets_);

    g_.resize(kHeads);
    for (int set = 0; set < sets_; ++set) {
      bf16_at_.push_back(staged ? 0 : set * num_pages_ * bf16_page);
      stored_at_.push_back(set * num_pages_ * stored_page);
      bf16_units_.push_back(bf16);
      stored_units_.push_back(stored);
      plain_.push_back({});
      k_.push_back(format->k);
      v_.push_back(format->v);
      layers_.push_back({g_, g_});
    }
    cache::PageKind bf16_kind = {
        bf16_->data(), bf16_page, cache::Layout::kSm90, bf16_at_, bf16_units_, plain_, plain_};
    cache::PageKind stored_kind = {
        stored_->data(), stored_page, cache::Layout::kSm90, stored_at_, stored_units_, k_, v_};
    kinds_ = {bf16_kind, stored_kind, bf16_kind};
    const uint32_t kind = staged ? cache::kKindStaging : cache::kKindBf16;
    for (int page = 0; page < num_pages_; ++page) {
      entries_.push_back(cache::PageEntry::make(kind, static_cast<uint32_t>(page)));
      if (closes_)
        close_items_.push_back(
            {entries_.back(),
             cache::PageEntry::make(cache::kKindStored, static_cast<uint32_t>(page))});
    }
    if (step == Step::kPrefill) {
      sequences_.push_back({.num_new_tokens = num_rows_, .bf16 = entries_.data()});
    }
    for (int s = 0; step == Step::kDecode && s < num_rows_; ++s) {
      sequences_.push_back({.first_row = s,
                            .num_new_tokens = 1,
                            .first_position = s * 7 % kPageTokens,
                            .bf16 = &entries_[s]});
    }
    view_.page_tokens = kPageTokens;
    view_.num_kv_heads = kHeads;
    view_.head_dim = kHeadDim;
    view_.kinds = kinds_;
    view_.sequences = sequences_;
    view_.closes = close_items_;
    view_.layers = layers_;
  }

  int64_t bytes() const { return bytes_; }
  double measure(CacheAppend& append, cudaStream_t stream) {
    const int64_t values = int64_t{num_rows_} * kHeads * kHeadDim;
    return time_graph(stream, sets_, [&](int set) {
      const auto* k = reinterpret_cast<const float*>(activations_->data()) + set * values * 2;
      require(append.run({&view_, set, k, k + values}, stream));
    });
  }

 private:
  Step step_;
  int num_rows_, num_pages_, sets_;
  bool closes_;
  int64_t bytes_;
  std::unique_ptr<Device> bf16_, stored_, activations_;
  std::vector<formats::SideParams> g_;
  std::vector<int64_t> bf16_at_, stored_at_;
  std::vector<formats::UnitSections> bf16_units_, stored_units_;
  std::vector<formats::SideFormat> plain_, k_, v_;
  std::vector<cache::LayerParams> layers_;
  std::vector<cache::PageKind> kinds_;
  std::vector<cache::PageEntry> entries_;
  std::vector<cache::CloseItem> close_items_;
  std::vector<cache::SequenceView> sequences_;
  cache::GroupView view_;
};

struct Row {
  std::string kv;
  const char* step;
  int64_t bytes;
  double us, memcpy_us, kernel_us;
};

void report(const std::vector<Row>& rows, const char* device, double copy_gb_s) {
  std::printf("%s, copy of 1 GiB moved: %.0f GB/s\n", device, copy_gb_s);
  std::printf("%-36s %-8s %9s %9s %9s %9s %8s\n", "kv", "step", "MB", "us", "copy us", "GB/s",
              "% copy");
  for (const Row& row : rows) {
    const double ceiling = std::min(row.memcpy_us, row.kernel_us);
    std::printf("%-36s %-8s %9.2f %9.2f %9.2f %9.0f %7.1f%%\n", row.kv.c_str(), row.step,
                row.bytes / 1e6, row.us, ceiling, row.bytes / row.us / 1e3,
                100.0 * ceiling / row.us);
  }
  for (const Row& row : rows) {
    std::printf(
        "{\"schema_version\":1,\"bench\":\"cuda_append\",\"device\":\"%s\",\"kv\":\"%s\",\"step\":"
        "\"%s\",\"bytes\":%lld,"
        "\"us\":%.3f,\"memcpy_us\":%.3f,\"copy_kernel_us\":%.3f,\"copy_gb_s\":%.1f}\n",
        device, row.kv.c_str(), row.step, static_cast<long long>(row.bytes), row.us, row.memcpy_us,
        row.kernel_us, copy_gb_s);
  }
}

int run(int argc, char** argv) {
  std::vector<std::string> formats = {"bf16",
                                      "fp8",
                                      "int8",
                                      "nvfp4",
                                      "nvfp4+46",
                                      "k=int4:channel,v=nvfp4",
                                      "4bit",
                                      "8bit",
                                      "mxfp4",
                                      "k=nvfp4+46+mean,v=nvfp4+46",
                                      "k=int4:channel+rot,v=nvfp4+rot+46"};
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--repeats=", 10) == 0)
      repeats = std::max(1, std::atoi(argv[i] + 10));
    else if (std::strncmp(argv[i], "--kv=", 5) == 0)
      formats = formats::split_format_list(argv[i] + 5);
    else {
      std::fprintf(stderr, "usage: %s [--kv=LIST] [--repeats=N]\n", argv[0]);
      return 64;
    }
  }
  const auto properties = find_device();
  if (!properties) require(Status(properties.error()));
  cudaStream_t stream;
  require(cudaStreamCreate(&stream), "making a stream");
  auto append = CacheAppend::create();
  if (!append) require(Status(append.error()));
  std::vector<Row> rows;
  for (const std::string& kv : formats) {
    for (const auto& [step, name] :
         {std::pair(Step::kDecode, "decode"), std::pair(Step::kClose, "close"),
          std::pair(Step::kPrefill, "prefill")}) {
      if (step == Step::kClose && kv == "bf16") continue;
      if (step == Step::kDecode && kv != "bf16") continue;  // no page fills: the same for all
      Problem problem(kv, step);
      Row row = {kv, name, problem.bytes(), problem.measure(**append, stream), 0, 0};
      row.memcpy_us = copy_us(stream, row.bytes, true);
      row.kernel_us = copy_us(stream, row.bytes, false);
      rows.push_back(row);
    }
  }
  const double big = static_cast<double>(1 << 30);
  const double big_us = std::min(copy_us(stream, 1 << 30, true), copy_us(stream, 1 << 30, false));
  report(rows, properties->name, big / big_us / 1e3);
  return 0;
}

}  // namespace
}  // namespace kvant::backend::cuda

int main(int argc, char** argv) {
  return kvant::backend::cuda::run(argc, argv);
}
