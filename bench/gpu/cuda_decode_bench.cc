// Decode attention on the GPU: microseconds and percent of the read ceiling of the same run.
//
// Usage: kvant_cuda_decode_bench [--kv A;B;...] [--heads Q/KV] [--head-dim D] [--shape BxL,...]
//                                [--shared TOKENS [--shared-blocks N,N,...]] [--json FILE]
//                                [--replays N] [--pause MS]
// Example: kvant_cuda_decode_bench --kv 'nvfp4;4bit' --heads 32/8 --shape 1x131072,8x32768
//          kvant_cuda_decode_bench --shape 1x131072+31x4096   one batch of both lengths
//          kvant_cuda_decode_bench --replays 2 --pause 700    a burst, before power is limited
//
// Random data, pages of 64 tokens in random order, cold L2 (copies that exceed it several times are
// used in turn), graph replays, the median. Bytes counted: what attention must read of the cache,
// open and sink pages included. The ceiling is a linear read of as many bytes.
//
// With --shared all sequences have their first TOKENS in common. Three rows per case: every
// sequence with pages of its own, common pages that each sequence reads for itself, and common
// pages read once for all; the last column is the first row's time over this one's. With
// --shared-blocks also a row for each number of multiprocessors that read common pages.
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bench/gpu/memory_kernels.h"
#include "bench/gpu/timing.h"
#include "kvant/backend/cuda/attention.h"
#include "kvant/backend/cuda/device.h"
#include "kvant/formats/format.h"

namespace kvant::bench {
namespace {

using backend::PageSharing;
using backend::cuda::CudaAttention;
using cache::PageEntry;
using formats::FormatInfo;

// `count` sequences of `length` tokens beside those of other parts.
struct Part {
  int count = 1;
  int64_t length = 0;
};
using Shape = std::vector<Part>;

struct Options {
  std::vector<std::string> kv = {"nvfp4"};
  int query_heads = 32;
  int kv_heads = 8;
  int head_dim = 128;
  std::vector<Shape> shapes = {{{1, 32768}}, {{1, 131072}}, {{8, 32768}},  {{32, 8192}},
                               {{64, 4096}}, {{16, 32768}}, {{1, 1048576}}};
  int64_t shared = 0;  // tokens that all sequences have in common
  std::vector<int> shared_blocks;
  std::string json;
  int replays = 13;
  int pause_ms = 0;  // before each row
};

constexpr int kPageTokens = 64;

Fill code_fill(const FormatInfo& info) {
  switch (info.element) {
    case formats::Element::kBf16: return Fill::kBf16;
    case formats::Element::kF16: return Fill::kScaleF16;
    case formats::Element::kE4m3: return Fill::kFiniteE4m3;
    case formats::Element::kE5m2: return Fill::kScaleE4m3;
    default: return Fill::kCodes;
  }
}

Fill scale_fill(const FormatInfo& info) {
  switch (info.scale) {
    case formats::Scale::kE4m3: return Fill::kScaleE4m3;
    case formats::Scale::kE8m0: return Fill::kScaleE8m0;
    case formats::Scale::kF32: return Fill::kScaleF32;
    default: return Fill::kScaleF16;
  }
}

// A batch with random pages on the device, in several copies.
class Problem {
 public:
  Problem(const Options& options, const formats::CacheFormat& format,
          const std::vector<int64_t>& lengths, int64_t shared, int64_t least_bytes)
      : options_(options), format_(format), shared_pages_(shared / kPageTokens) {
    for (int kind = 0; kind < 2; ++kind) {
      if (kind == 1) k_[1] = format.k, v_[1] = format.v;
      units_[kind] = formats::unit_sections(k_[kind], v_[kind], kPageTokens, options.head_dim);
    }
    for (const int64_t length : lengths) add_sequence(length);
    for (int kind = 0; kind < 2; ++kind)
      slab_bytes_[kind] = slots_[kind] * units_[kind].bytes * options.kv_heads;
    copies_ = static_cast<int>(std::clamp<int64_t>((least_bytes + bytes_ - 1) / bytes_, 2, 24));
    shuffle();
    allocate();
  }
  ~Problem() {
    for (std::byte* slab : slabs_) cudaFree(slab);
    cudaFree(q_);
    cudaFree(out_);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  int64_t bytes() const { return bytes_; }
  int copies() const { return copies_; }
  const std::byte* slab(int copy) const { return slabs_[2 * copy + 1]; }
  int64_t stored_bytes() const { return slab_bytes_[1]; }

  // The step on one copy; valid until the next call.
  backend::AttentionArgs args(int copy) {
    view_.kinds = kinds_[copy];
    backend::AttentionArgs args;
    args.view = &view_;
    args.params.num_query_heads = options_.query_heads;
    args.params.scale = 1.0f / std::sqrt(static_cast<float>(options_.head_dim));
    args.params.rope.rotary_dim = options_.head_dim;  // for +prerope
    args.q = q_;
    args.out = out_;
    return args;
  }

 private:
  void add_sequence(int64_t length) {
    const int64_t last_page = (length - 1) / kPageTokens;
    cache::SequenceView view;
    view.first_row = static_cast<int32_t>(sequences_.size());
    view.num_new_tokens = 1;
    view.first_position = length - 1;
    view.bf16_first_page = last_page;
    std::vector<PageEntry> stored;
    int64_t common = 0;
    if (!stored_.empty()) common = std::min(shared_pages_, last_page);
    for (int64_t page = 0; page < last_page; ++page) {
      if (page < common) {
        stored.push_back(stored_[0][page]);
        continue;
      }
      const bool bf16 = format_.is_bf16() || (format_.sink && page == 0);
      stored.push_back(
          PageEntry::make(bf16 ? 0 : 1, static_cast<uint32_t>(slots_[bf16 ? 0 : 1]++)));
    }
    bytes_ += ((last_page - common) * units_[stored.empty() || !format_.is_bf16() ? 1 : 0].bytes) *
              options_.kv_heads;
    if (format_.sink && last_page > 0 && common == 0)
      bytes_ += (units_[0].bytes - units_[1].bytes) * options_.kv_heads;
    const int64_t open_tiles = (length - last_page * kPageTokens + 15) / 16;
    bytes_ += open_tiles * 16 * options_.head_dim * 4 * options_.kv_heads;
    stored_.push_back(std::move(stored));
    open_.push_back(PageEntry::make(0, static_cast<uint32_t>(slots_[0]++)));
    sequences_.push_back(view);
  }

  // Slots in random order, as a cache that has run for a while hands them out.
  void shuffle() {
    std::mt19937 random(3);
    for (int kind = 0; kind < 2; ++kind) {
      std::vector<uint32_t> order(static_cast<size_t>(slots_[kind]));
      std::iota(order.begin(), order.end(), 0u);
      std::shuffle(order.begin(), order.end(), random);
      const auto move = [&](PageEntry& entry) {
        if (static_cast<int>(entry.kind) == kind)
          entry = PageEntry::make(entry.kind, order[entry.slot]);
      };
      for (size_t s = 0; s < stored_.size(); ++s) {
        const size_t common = s == 0 ? 0 : std::min<size_t>(shared_pages_, stored_[s].size());
        std::copy_n(stored_[0].begin(), common, stored_[s].begin());
        for (size_t page = common; page < stored_[s].size(); ++page) move(stored_[s][page]);
      }
      for (PageEntry& entry : open_) move(entry);
    }
    for (size_t i = 0; i < sequences_.size(); ++i) {
      sequences_[i].stored = stored_[i].data();
      sequences_[i].bf16 = &open_[i];
    }
  }

  void allocate() {
    side_params_.assign(static_cast<size_t>(options_.kv_heads), {});
    layer_ = {side_params_, side_params_};
    kinds_.resize(static_cast<size_t>(copies_));
    for (int copy = 0; copy < copies_; ++copy) {
      for (int kind = 0; kind < 2; ++kind) {
        std::byte* slab = nullptr;
        check(
            cudaMalloc(reinterpret_cast<void**>(&slab), std::max<int64_t>(slab_bytes_[kind], 128)),
            "allocating pages");
        slabs_.push_back(slab);
        fill(slab, kind, static_cast<uint32_t>(copy * 2 + kind));
        cache::PageKind pages;
        pages.base = slab;
        pages.page_bytes = units_[kind].bytes * options_.kv_heads;
        pages.layout = cache::Layout::kSm90;
        pages.layer_offset = {&layer_offset_, 1};
        pages.units = {&units_[kind], 1};
        pages.k_format = {&k_[kind], 1};
        pages.v_format = {&v_[kind], 1};
        kinds_[copy].push_back(pages);
      }
    }
    view_.page_tokens = kPageTokens;
    view_.num_kv_heads = options_.kv_heads;
    view_.head_dim = options_.head_dim;
    view_.sequences = sequences_;
    view_.layers = {&layer_, 1};
    const int64_t values =
        static_cast<int64_t>(sequences_.size()) * options_.query_heads * options_.head_dim;
    check(cudaMalloc(reinterpret_cast<void**>(&q_), values * 4), "allocating queries");
    check(cudaMalloc(reinterpret_cast<void**>(&out_), values * 4), "allocating outputs");
    launch_fill_normal(q_, values, 5, nullptr);
    check(cudaDeviceSynchronize(), "filling pages");
  }

  void fill(std::byte* slab, int kind, uint32_t seed) {
    const FormatInfo& k = formats::format_info(k_[kind].base);
    const FormatInfo& v = formats::format_info(v_[kind].base);
    const formats::UnitSections& unit = units_[kind];
    const formats::SideBytes k_bytes = side_bytes(k_[kind], kPageTokens, options_.head_dim);
    const formats::SideBytes v_bytes = side_bytes(v_[kind], kPageTokens, options_.head_dim);
    const FillSection sections[] = {
        {unit.k_codes, unit.k_codes + k_bytes.codes, code_fill(k)},
        {unit.k_scales, unit.k_scales + k_bytes.scales, scale_fill(k)},
        {unit.k_mean, unit.k_mean + k_bytes.mean, Fill::kBf16},
        {unit.v_codes, unit.v_codes + v_bytes.codes, code_fill(v)},
        {unit.v_scales, unit.v_scales + v_bytes.scales, scale_fill(v)},
    };
    launch_fill(slab, slots_[kind] * options_.kv_heads, unit.bytes, sections, 5, seed, nullptr);
  }

  const Options& options_;
  const formats::CacheFormat format_;
  const int64_t shared_pages_;  // of all sequences together
  formats::SideFormat k_[2], v_[2];
  formats::UnitSections units_[2];
  int64_t layer_offset_ = 0;
  int64_t slots_[2] = {0, 0};
  int64_t slab_bytes_[2] = {0, 0};
  int64_t bytes_ = 0;
  int copies_ = 1;
  std::vector<cache::SequenceView> sequences_;
  std::vector<std::vector<PageEntry>> stored_;
  std::vector<PageEntry> open_;
  std::vector<formats::SideParams> side_params_;
  cache::LayerParams layer_;
  std::vector<std::byte*> slabs_;  // [copy][kind]
  std::vector<std::vector<cache::PageKind>> kinds_;
  cache::GroupView view_;
  float* q_ = nullptr;
  float* out_ = nullptr;
};

// A linear read of as many bytes as the cases of one shape read, by size.
class Ceiling {
 public:
  explicit Ceiling(int num_sms) : num_sms_(num_sms) {
    check(cudaMalloc(reinterpret_cast<void**>(&sink_), 4), "allocating a word");
  }
  double microseconds(int64_t bytes) {
    if (bytes == bytes_) return microseconds_;
    const int copies = static_cast<int>(std::clamp<int64_t>(600000000 / bytes + 1, 2, 24));
    std::vector<std::byte*> data(static_cast<size_t>(copies));
    const FillSection all{0, 4096, Fill::kCodes};
    for (std::byte*& p : data) {
      check(cudaMalloc(reinterpret_cast<void**>(&p), bytes + 4096), "allocating the read's data");
      launch_fill(p, bytes / 4096 + 1, 4096, &all, 1, 9, nullptr);
    }
    check(cudaDeviceSynchronize(), "filling the read's data");
    const Timed timed = time_graph(
        [&](int copy, cudaStream_t stream) {
          launch_linear_read(data[copy], bytes, sink_, num_sms_, stream);
        },
        copies, stream_of());
    for (std::byte* p : data) cudaFree(p);
    bytes_ = bytes;
    return microseconds_ = timed.median_us;
  }
  cudaStream_t stream_of() {
    if (stream_ == nullptr) check(cudaStreamCreate(&stream_), "creating a stream");
    return stream_;
  }

 private:
  const int num_sms_;
  uint32_t* sink_ = nullptr;
  cudaStream_t stream_ = nullptr;
  int64_t bytes_ = 0;  // of the read before
  double microseconds_ = 0.0;
};

// The new token is the first of its page: every page before it is closed. Sequences of different
// lengths are mixed, as in a batch that has run for a while.
std::vector<int64_t> lengths_of(const Shape& shape) {
  std::vector<int64_t> lengths;
  for (const Part& part : shape) lengths.insert(lengths.end(), part.count, part.length + 1);
  if (shape.size() > 1) std::shuffle(lengths.begin(), lengths.end(), std::mt19937(4));
  return lengths;
}

std::string name_of(const Shape& shape) {
  std::string name;
  for (const Part& part : shape)
    name += fmt::format("{}{}x{}", name.empty() ? "" : "+", part.count, part.length);
  return name;
}

struct Mode {
  const char* name;
  bool common;  // the first pages are the same of all sequences
  PageSharing sharing;
  int blocks = 0;  // multiprocessors for common pages; 0: as planned
};

void run(const Options& options) {
  const Result<cudaDeviceProp> found = backend::cuda::find_device();
  if (!found) {
    fmt::print(stderr, "error: {}\n", found.error().message());
    std::exit(69);
  }
  const cudaDeviceProp& device = *found;
  fmt::print("{}, {} multiprocessors; {}/{} heads, head_dim {}\n", device.name,
             device.multiProcessorCount, options.query_heads, options.kv_heads, options.head_dim);
  fmt::print("{:<28} {:>12} {:>9} {:>9} {:>9} {:>7} {:>9}\n", "format", "shape", "us", "least",
             "ceiling", "%", "TB/s");
  std::FILE* json = options.json.empty() ? nullptr : std::fopen(options.json.c_str(), "a");
  Ceiling ceiling(device.multiProcessorCount);
  auto attention = CudaAttention::create();
  if (!attention) return fmt::print(stderr, "error: {}\n", attention.error().message());
  std::vector<Mode> modes = {{"apart", false, PageSharing::kNever}};
  if (options.shared > 0) {
    modes.push_back({"common, each for itself", true, PageSharing::kNever});
    modes.push_back({"shared", true, PageSharing::kWherePays});
    for (const int blocks : options.shared_blocks)
      modes.push_back({"shared by blocks", true, PageSharing::kWherePossible, blocks});
  }
  for (const Shape& shape : options.shapes) {
    for (const std::string& kv : options.kv) {
      const auto format = formats::parse_cache_format(kv);
      if (!format) {
        fmt::print(stderr, "error: {}\n", format.error().message());
        std::exit(64);
      }
      double apart_us = 0.0;
      for (const Mode& mode : modes) {
        const int64_t shared = mode.common ? options.shared : 0;
        Problem problem(options, *format, lengths_of(shape), shared, 600000000);
        (*attention)->set_sharing(mode.sharing, mode.blocks);
        const Status prepared = (*attention)->prepare(problem.args(0), nullptr);
        if (!prepared) {
          fmt::print(stderr, "error: {}\n", prepared.error().message());
          std::exit(69);
        }
        check(cudaDeviceSynchronize(), "preparing");
        std::this_thread::sleep_for(std::chrono::milliseconds(options.pause_ms));
        const Timed timed = time_graph(
            [&](int copy, cudaStream_t stream) {
              const Status launched = (*attention)->launch(problem.args(copy), stream);
              if (!launched) fmt::print(stderr, "error: {}\n", launched.error().message());
            },
            problem.copies(), ceiling.stream_of(), 8.0, options.replays);
        if (apart_us == 0.0) apart_us = timed.median_us;
        const double read_us = ceiling.microseconds(problem.bytes());
        fmt::print("{:<28} {:>12} {:>9.2f} {:>9.2f} {:>9.2f} {:>7.1f} {:>9.3f}", kv, name_of(shape),
                   timed.median_us, timed.least_us, read_us, 100.0 * read_us / timed.median_us,
                   static_cast<double>(problem.bytes()) / timed.median_us * 1e-6);
        if (options.shared > 0)
          fmt::print("  {:<24} {:>4} {:>6.2f}", mode.name, mode.blocks, apart_us / timed.median_us);
        fmt::print("\n");
        std::fflush(stdout);
        if (json != nullptr) {
          fmt::print(
              json,
              "{{\"bench\":\"cuda_decode\",\"device\":\"{}\",\"kv\":\"{}\",\"heads\":\"{}/{}\","
              "\"head_dim\":{},\"shape\":\"{}\",\"shared\":{},\"mode\":\"{}\","
              "\"shared_blocks\":{},\"sharing_sequences\":{},\"bytes\":{},\"us\":{:.3f},\"us_"
              "least\":{:.3f},"
              "\"us_most\":{:.3f},\"ceiling_us\":{:.3f}}}\n",
              device.name, kv, options.query_heads, options.kv_heads, options.head_dim,
              name_of(shape), shared, mode.name, mode.blocks, (*attention)->num_sharing_sequences(),
              problem.bytes(), timed.median_us, timed.least_us, timed.most_us, read_us);
        }
      }
    }
  }
  if (json != nullptr) std::fclose(json);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace
}  // namespace kvant::bench

int main(int argc, char** argv) {
  using namespace kvant::bench;
  Options options;
  std::string kv = "nvfp4", heads = "32/8", shapes;
  CLI::App app{"Decode attention on the GPU against the read ceiling of the same run."};
  app.add_option("--kv", kv, "cache formats, separated by ';'");
  app.add_option("--heads", heads, "query heads / KV heads");
  app.add_option("--head-dim", options.head_dim, "64, 80, 96, 128, 192 or 256");
  app.add_option("--shape", shapes,
                 "BxL[,BxL...]: sequences x tokens of each; BxL+BxL: in one batch");
  app.add_option("--shared", options.shared, "tokens that all sequences have in common");
  app.add_option("--shared-blocks", options.shared_blocks,
                 "with --shared, also so many multiprocessors for common pages (N,N,...)")
      ->delimiter(',');
  app.add_option("--json", options.json, "append a line of JSON per row to this file");
  app.add_option("--replays", options.replays, "graph replays, of which the median is taken");
  app.add_option("--pause", options.pause_ms, "milliseconds without work before each row")
      ->check(CLI::Range(0, 60000));
  CLI11_PARSE(app, argc, argv);
  options.kv = split(kv, ';');
  if (std::sscanf(heads.c_str(), "%d/%d", &options.query_heads, &options.kv_heads) != 2) {
    std::fprintf(stderr, "error: --heads: expected Q/KV, found '%s'\n", heads.c_str());
    return 64;
  }
  if (!shapes.empty()) {
    options.shapes.clear();
    for (const std::string& text : split(shapes, ',')) {
      Shape shape;
      for (const std::string& part : split(text, '+')) {
        long long length = 0;
        int count = 0;
        if (std::sscanf(part.c_str(), "%dx%lld", &count, &length) != 2 || count < 1 || length < 1) {
          std::fprintf(stderr, "error: --shape: expected BxL or BxL+BxL, found '%s'\n",
                       text.c_str());
          return 64;
        }
        shape.push_back({count, length});
      }
      options.shapes.push_back(shape);
    }
  }
  run(options);
}
