// Speed of closing and decoding one head's part of a page, per format and CPU level, on one thread.
//
// Bytes per second count the BF16 values that a closing page holds (2 bytes each), so that figures
// compare with memory bandwidth and among formats; `fp32` counts the codec's input. The page's 16
// KiB to 32 KiB stay in the caches, as they do when a page is closed after its last token.
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "kvant/formats/codec.h"
#include "kvant/formats/sections.h"

namespace {

using namespace kvant;
using namespace kvant::formats;

constexpr int kTokens = 64;

struct Page {
  Page(const SideFormat& side, int head_dim) : bytes(side_bytes(side, kTokens, head_dim)) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    x.resize(static_cast<size_t>(kTokens * head_dim));
    for (float& value : x) value = normal(random);
    codes.resize(static_cast<size_t>(bytes.codes));
    scales.resize(static_cast<size_t>(bytes.scales));
    mean.resize(static_cast<size_t>(head_dim));
  }
  SideBytes bytes;
  std::vector<float> x;
  std::vector<uint8_t> codes, scales;
  std::vector<uint16_t> mean;
};

void report(benchmark::State& state, const Page& page) {
  const double values =
      static_cast<double>(state.iterations()) * static_cast<double>(page.x.size());
  state.SetBytesProcessed(static_cast<int64_t>(values * 2));
  state.counters["fp32"] = benchmark::Counter(values * 4, benchmark::Counter::kIsRate,
                                              benchmark::Counter::OneK::kIs1024);
}

void encode(benchmark::State& state, const Codec& codec) {
  Page page(codec.side(), codec.head_dim());
  const PlanarSide out = {page.codes.data(), page.scales.data(), page.mean.data()};
  for (auto _ : state) {
    benchmark::DoNotOptimize(codec.encode_page(page.x.data(), kTokens, {}, out));
    benchmark::ClobberMemory();
  }
  report(state, page);
}

void decode(benchmark::State& state, const Codec& codec) {
  Page page(codec.side(), codec.head_dim());
  codec.encode_page(page.x.data(), kTokens, {},
                    {page.codes.data(), page.scales.data(), page.mean.data()});
  const ConstPlanarSide in = {page.codes.data(), page.scales.data(), page.mean.data()};
  for (auto _ : state) {
    codec.decode_page(in, kTokens, {}, Codec::Frame::kPlain, page.x.data());
    benchmark::ClobberMemory();
  }
  report(state, page);
}

void add(const std::string& name, const SideFormat& side, int head_dim, CpuLevel level) {
  const Result<Codec> codec = Codec::create(side, head_dim, level);
  if (!codec) return;
  const std::string suffix =
      "/" + name + "/" + std::to_string(head_dim) + "/" + std::string(cpu_level_name(level));
  const Codec copy = *codec;
  benchmark::RegisterBenchmark(("encode" + suffix).c_str(),
                               [copy](benchmark::State& state) { encode(state, copy); });
  benchmark::RegisterBenchmark(("decode" + suffix).c_str(),
                               [copy](benchmark::State& state) { decode(state, copy); });
}

}  // namespace

int main(int argc, char** argv) {
  for (const CpuLevel level : {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    for (const FormatInfo& format : all_formats()) {
      add(std::string(format.name), {.base = format.id}, 128, level);
    }
    add("nvfp4+46", {.base = FormatId::kNvfp4, .four_over_six = true}, 128, level);
    add("nvfp4+mean+46", {.base = FormatId::kNvfp4, .mean = true, .four_over_six = true}, 128,
        level);
    add("int8+mean", {.base = FormatId::kInt8, .mean = true}, 128, level);
    add("int8+rot", {.base = FormatId::kInt8, .rotate = true}, 128, level);
    add("int8", {.base = FormatId::kInt8}, 80, level);  // a short last block in every row
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
