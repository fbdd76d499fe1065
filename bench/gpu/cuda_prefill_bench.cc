// Time of prefill attention on the GPU, by shape and cache format.
//
//   kvant_cuda_prefill_bench                 all shapes, nvfp4 and 4bit: a table
//   kvant_cuda_prefill_bench SHAPE...        these shapes
//   kvant_cuda_prefill_bench --attn fp8 ...  with E4M3 operands
//   kvant_cuda_prefill_bench --serve         a line "SHAPE FORMAT MS" on stdin is measured for
//   about
//                                            MS milliseconds and answered with a line of JSON
//
// SHAPE is BATCHxQUERIES@CONTEXT:QHEADS/KVHEADS[/HEAD_DIM], e.g. 1x2048@32768:32/8; CONTEXT counts
// the queries. Pages of 64 tokens with random content; 512 MiB of images. FLOP = 4 x head_dim x
// query heads x visible keys of all queries, as for any attention. bench/peers/gpu_prefill.py runs
// it in turn with PyTorch. Numbers are correct only if kvant_cuda_tests pass on the same machine.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kvant/backend/cuda/device.h"
#include "kvant/backend/cuda/prefill/prefill_attention.h"
#include "kvant/cache/layout.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/spec.h"

namespace kvant::backend::cuda {
namespace {

constexpr int kPageTokens = 64;
constexpr int kDistinctPages = 16;

struct Shape {
  int batch = 1;
  int queries = 0;
  int context = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 128;

  double flop() const {
    const double history = context - queries;
    const double keys = queries * history + 0.5 * queries * (queries + 1.0);
    return 4.0 * head_dim * q_heads * batch * keys;
  }
  std::string name() const {
    return std::to_string(batch) + "x" + std::to_string(queries) + "@" + std::to_string(context) +
           ":" + std::to_string(q_heads) + "/" + std::to_string(kv_heads) + "/" +
           std::to_string(head_dim);
  }
};

bool parse_shape(const std::string& text, Shape& shape) {
  return std::sscanf(text.c_str(), "%dx%d@%d:%d/%d/%d", &shape.batch, &shape.queries,
                     &shape.context, &shape.q_heads, &shape.kv_heads, &shape.head_dim) >= 5;
}

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
template <typename T>
T require(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().message().c_str());
    std::exit(1);
  }
  return std::move(*result);
}
void require(const Status& status) {
  if (status) return;
  std::fprintf(stderr, "%s\n", status.error().message().c_str());
  std::exit(1);
}

std::byte* device_bytes(int64_t bytes) {
  void* data = nullptr;
  require(cudaMalloc(&data, static_cast<size_t>(bytes)));
  return static_cast<std::byte*>(data);
}

// Units of kDistinctPages pages in `sm90` layout, encoded from normal values.
std::vector<std::byte> random_units(const formats::SideFormat& k, const formats::SideFormat& v,
                                    const formats::UnitSections& sections, int kv_heads,
                                    int head_dim) {
  const auto unit = static_cast<size_t>(sections.bytes);
  std::vector<std::byte> planar(unit), units;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(kPageTokens) * head_dim);
  const auto k_codec = require(formats::Codec::create(k, head_dim));
  const auto v_codec = require(formats::Codec::create(v, head_dim));
  const cache::UnitShape shape{k, v, kPageTokens, head_dim};
  units.resize(unit * kDistinctPages * kv_heads);
  for (int i = 0; i < kDistinctPages * kv_heads; ++i) {
    std::fill(planar.begin(), planar.end(), std::byte{0});
    for (const cache::SideShape& side : {shape.keys(), shape.values()}) {
      for (float& value : x) value = normal(random);
      (side.role == cache::SideRole::kKeys ? k_codec : v_codec)
          .encode_page(x.data(), kPageTokens, {},
                       cache::side_of_unit(planar.data(), sections, side));
    }
    cache::convert_unit(shape, cache::Layout::kPlanar, planar.data(), cache::Layout::kSm90,
                        units.data() + unit * i);
  }
  return units;
}

// One layer of a step: pages, tables, queries, on the device.
class Workload {
 public:
  Workload(const Shape& shape, const std::string& kv, ImageType images)
      : shape_(shape), images_(images) {
    const formats::CacheFormat format = require(formats::parse_cache_format(kv));
    const int64_t pages = (shape.context + kPageTokens - 1) / kPageTokens;
    const int64_t chunk_pages = pages - (shape.context - shape.queries) / kPageTokens;
    k_formats_[0] = v_formats_[0] = formats::SideFormat{};
    k_formats_[1] = format.k;
    v_formats_[1] = format.v;
    const int64_t counts[2] = {chunk_pages * shape.batch, pages * shape.batch};
    for (int kind = 0; kind < 2; ++kind) add_kind(kind, counts[kind]);
    tables_.resize(static_cast<size_t>(shape.batch));
    std::mt19937 random(3);
    std::vector<uint32_t> slots[2];
    for (int kind = 0; kind < 2; ++kind) {
      for (int64_t i = 0; i < counts[kind]; ++i) slots[kind].push_back(static_cast<uint32_t>(i));
      std::shuffle(slots[kind].begin(), slots[kind].end(), random);
    }
    for (int b = 0; b < shape.batch; ++b) add_sequence(b, pages, chunk_pages, slots);
    view_.page_tokens = kPageTokens;
    view_.num_kv_heads = shape.kv_heads;
    view_.head_dim = shape.head_dim;
    params_.resize(static_cast<size_t>(shape.kv_heads));
    layer_ = {params_, params_};
    view_.layers = std::span(&layer_, 1);
    view_.kinds = kinds_;
    view_.sequences = sequences_;
    make_queries();
    make_prefill(pages, chunk_pages);
  }
  ~Workload() {
    prefill_.reset();
    for (std::byte* data : owned_) cudaFree(data);
  }

  void run() { require(prefill_->run(args_, nullptr)); }
  PrefillAttention& prefill() { return *prefill_; }

 private:
  void add_kind(int kind, int64_t count) {
    const formats::UnitSections sections =
        formats::unit_sections(k_formats_[kind], v_formats_[kind], kPageTokens, shape_.head_dim);
    units_[kind] = sections;
    const std::vector<std::byte> units = random_units(k_formats_[kind], v_formats_[kind], sections,
                                                      shape_.kv_heads, shape_.head_dim);
    const int64_t page = sections.bytes * shape_.kv_heads;
    cache::PageKind& target = kinds_[kind];
    target.base = keep(device_bytes(page * count));
    target.page_bytes = page;
    target.layout = cache::Layout::kSm90;
    target.layer_offset = std::span(&zero_, 1);
    target.units = std::span(&units_[kind], 1);
    target.k_format = std::span(&k_formats_[kind], 1);
    target.v_format = std::span(&v_formats_[kind], 1);
    for (int64_t i = 0; i < count; ++i) {
      require(cudaMemcpy(target.base + i * page, units.data() + (i % kDistinctPages) * page,
                         static_cast<size_t>(page), cudaMemcpyHostToDevice));
    }
  }

  void add_sequence(int b, int64_t pages, int64_t chunk_pages,
                    const std::vector<uint32_t> (&slots)[2]) {
    cache::SequenceView seq;
    seq.first_row = b * shape_.queries;
    seq.num_new_tokens = shape_.queries;
    seq.first_position = shape_.context - shape_.queries;
    seq.bf16_first_page = pages - chunk_pages;
    auto& table = tables_[static_cast<size_t>(b)];
    for (int64_t p = 0; p < pages; ++p) {
      table.push_back(
          cache::PageEntry::make(cache::kKindStored, slots[1][static_cast<size_t>(b * pages + p)]));
    }
    for (int64_t p = 0; p < chunk_pages; ++p) {
      table.push_back(cache::PageEntry::make(cache::kKindBf16,
                                             slots[0][static_cast<size_t>(b * chunk_pages + p)]));
    }
    seq.stored = table.data();
    seq.bf16 = table.data() + pages;
    sequences_.push_back(seq);
  }

  void make_queries() {
    const int64_t rows = static_cast<int64_t>(shape_.batch) * shape_.queries;
    std::vector<float> q(static_cast<size_t>(rows * shape_.q_heads * shape_.head_dim));
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> some(1 << 20);
    for (float& x : some) x = normal(random);
    for (size_t i = 0; i < q.size(); ++i) q[i] = some[(i * 7 + i / 1000) % some.size()];
    const auto bytes = static_cast<int64_t>(q.size() * 4);
    std::byte* device_q = keep(device_bytes(bytes));
    require(cudaMemcpy(device_q, q.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
    args_.view = &view_;
    args_.params.num_query_heads = shape_.q_heads;
    args_.params.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    args_.params.rope.rotary_dim = shape_.head_dim;  // for +prerope
    args_.q = device_q;
    args_.out = keep(device_bytes(bytes));
  }

  void make_prefill(int64_t pages, int64_t chunk_pages) {
    PrefillLimits limits;
    limits.images = images_;
    limits.max_rows = static_cast<int64_t>(shape_.batch) * shape_.queries;
    limits.max_pages = (pages + 2 * chunk_pages) * shape_.batch;
    limits.max_sequences = shape_.batch;
    limits.num_query_heads = shape_.q_heads;
    limits.num_kv_heads = shape_.kv_heads;
    limits.head_dim = shape_.head_dim;
    limits.page_tokens = kPageTokens;
    const int64_t bytes = PrefillAttention::workspace_bytes(limits);
    prefill_ = require(PrefillAttention::create(limits, keep(device_bytes(bytes)), bytes));
  }

  std::byte* keep(std::byte* data) {
    owned_.push_back(data);
    return data;
  }

  const Shape shape_;
  const ImageType images_;
  const int64_t zero_ = 0;
  formats::SideFormat k_formats_[2], v_formats_[2];
  formats::UnitSections units_[2];
  cache::PageKind kinds_[2];
  std::vector<std::vector<cache::PageEntry>> tables_;
  std::vector<cache::SequenceView> sequences_;
  std::vector<formats::SideParams> params_;
  cache::LayerParams layer_;
  cache::GroupView view_;
  AttentionArgs args_;
  std::unique_ptr<PrefillAttention> prefill_;
  std::vector<std::byte*> owned_;
};

// Median microseconds of a call, for about `ms` milliseconds after a warm-up. Calls are enqueued
// several at a time, so that the device does not wait for the host, as in a model's step.
double median_us(Workload& work, double ms) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<double> times;
  double total = 0.0;
  int calls = 1;
  for (int i = 0; i < 5 || (total < ms * 1e3 && i < 10000); ++i) {
    require(cudaEventRecord(begin));
    for (int c = 0; c < calls; ++c) work.run();
    require(cudaEventRecord(end));
    require(cudaEventSynchronize(end));
    float elapsed = 0.0f;
    require(cudaEventElapsedTime(&elapsed, begin, end));
    total += 1e3 * elapsed;
    if (i >= 2) times.push_back(1e3 * elapsed / calls);
    if (i == 1) calls = std::clamp(static_cast<int>(4000.0 / (1e3 * elapsed)), 2, 16);
  }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

struct Times {
  double all = 0.0;
  double in_turn = 0.0;  // images first, then attention
  double images = 0.0;
  double attention = 0.0;
};

Times measure(Workload& work, double ms) {
  Times times;
  times.all = median_us(work, ms);
  work.prefill().set_background(false);
  times.in_turn = median_us(work, ms / 2);
  work.prefill().set_background(true);
  work.prefill().measure_only(true, false);
  times.images = median_us(work, ms / 8);
  work.prefill().measure_only(false, true);
  times.attention = median_us(work, ms / 2);
  work.prefill().measure_only(true, true);
  return times;
}

int serve(ImageType images) {
  std::string line, name, kv, last;
  std::unique_ptr<Workload> work;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    double ms = 100.0;
    Shape shape;
    if (!(in >> name >> kv >> ms) || !parse_shape(name, shape)) {
      std::fprintf(stderr, "expected: SHAPE FORMAT MS; found: %s\n", line.c_str());
      return 64;
    }
    if (last != name + kv) {
      work.reset();
      work = std::make_unique<Workload>(shape, kv, images);
      last = name + kv;
    }
    const Times t = measure(*work, ms);
    std::printf(
        "{\"shape\": \"%s\", \"kv\": \"%s\", \"us\": %.1f, \"in_turn_us\": %.1f, "
        "\"images_us\": %.1f, \"attention_us\": %.1f, \"tflops\": %.1f}\n",
        name.c_str(), kv.c_str(), t.all, t.in_turn, t.images, t.attention,
        shape.flop() / t.all * 1e-6);
    std::fflush(stdout);
  }
  return 0;
}

int table(std::vector<std::string> shapes, ImageType images) {
  const std::vector<std::string> all = {
      "1x4096@4096:32/8",      "1x16384@16384:32/8", "1x2048@32768:32/8", "1x8192@32768:32/8",
      "1x2048@131072:32/8",    "1x8192@131072:32/8", "1x512@32768:32/8",  "1x512@131072:32/8",
      "8x512@16384:32/8",      "8x512@16384:64/8",   "1x2048@32768:64/8", "1x2048@32768:32/8/64",
      "1x2048@32768:16/4/256", "1x2048@32768:32/32"};
  if (shapes.empty()) shapes = all;
  std::printf("%-28s %-6s %10s %10s %10s %10s %8s\n", "shape", "kv", "us", "in turn", "images",
              "attention", "TFLOP/s");
  for (const std::string& name : shapes) {
    for (const char* kv : {"nvfp4", "4bit"}) {
      Shape shape;
      if (!parse_shape(name, shape)) {
        std::fprintf(stderr, "a shape is e.g. 1x2048@32768:32/8; found: %s\n", name.c_str());
        return 64;
      }
      Workload work(shape, kv, images);
      const Times t = measure(work, 100.0);
      std::printf("%-28s %-6s %10.1f %10.1f %10.1f %10.1f %8.1f\n", name.c_str(), kv, t.all,
                  t.in_turn, t.images, t.attention, shape.flop() / t.all * 1e-6);
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvant::backend::cuda

int main(int argc, char** argv) {
  using kvant::backend::cuda::ImageType;
  std::vector<std::string> args(argv + 1, argv + argc);
  kvant::backend::cuda::require(kvant::backend::cuda::find_device());
  ImageType images = ImageType::kF16;
  if (args.size() >= 2 && args[0] == "--attn" && args[1] == "fp8") {
    images = ImageType::kE4m3;
    args.erase(args.begin(), args.begin() + 2);
  }
  if (args.size() == 1 && args[0] == "--serve") return kvant::backend::cuda::serve(images);
  return kvant::backend::cuda::table(args, images);
}
