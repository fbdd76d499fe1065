// Converters on the device against those of the host, every byte; and codecs on many values: pages
// closed on the device, converted to planar, against the host's codec.
#include "kvant/backend/cuda/page_convert.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kvant/backend/cuda/append.h"
#include "kvant/backend/cuda/page_map.h"
#include "kvant/backend/cuda/testing/cache_mirror.h"
#include "kvant/backend/cuda/testing/cache_on_device.h"
#include "kvant/base/small_floats.h"
#include "kvant/base/thread_pool.h"

namespace kvant::backend::cuda {
namespace {

using cache::Layout;
using cache::UnitShape;
using testing::DeviceBytes;

uint64_t next(uint64_t& seed) {
  seed += 0x9e3779b97f4a7c15ull;
  uint64_t x = seed;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

class CudaConvert : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string why = testing::no_device_reason();
    if (!why.empty()) GTEST_SKIP() << why;
  }
};

// Units with random codes, scales and mean, padding zero, in planar order.
std::vector<std::byte> random_units(const UnitShape& shape, int count) {
  const auto at = formats::unit_sections(shape.k, shape.v, shape.page_tokens, shape.head_dim);
  std::vector<std::byte> units(at.bytes * count);
  uint64_t seed = 11;
  for (int u = 0; u < count; ++u) {
    for (const bool keys : {true, false}) {
      const auto bytes =
          formats::side_bytes(keys ? shape.k : shape.v, shape.page_tokens, shape.head_dim);
      const auto fill = [&](int64_t offset, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
          units[u * at.bytes + offset + i] = static_cast<std::byte>(next(seed) >> 56);
      };
      fill(keys ? at.k_codes : at.v_codes, bytes.codes);
      fill(keys ? at.k_scales : at.v_scales, bytes.scales);
      if (keys) fill(at.k_mean, bytes.mean);
    }
  }
  return units;
}

TEST_F(CudaConvert, UnitsOfEveryFormatBothWays) {
  for (const formats::FormatInfo& info : formats::all_formats()) {
    for (const int head_dim : {16, 64, 80, 96, 128, 192, 256, 512}) {
      for (const int page_tokens : {16, 64, 128}) {
        UnitShape shape{{}, {}, page_tokens, head_dim};
        shape.k.base = info.id;
        shape.k.mean = info.id != formats::FormatId::kBf16;
        shape.v.base = info.for_values ? info.id : formats::FormatId::kNvfp4;
        constexpr int kPages = 2, kHeads = 3;
        const auto sections = formats::unit_sections(shape.k, shape.v, page_tokens, head_dim);
        const std::vector<std::byte> planar = random_units(shape, kPages * kHeads);
        std::vector<std::byte> sm90(planar.size());
        for (int u = 0; u < kPages * kHeads; ++u) {
          cache::convert_unit(shape, Layout::kPlanar, planar.data() + u * sections.bytes,
                              Layout::kSm90, sm90.data() + u * sections.bytes);
        }
        const DeviceBytes a(planar.data(), static_cast<int64_t>(planar.size()));
        const DeviceBytes b(a.size()), c(a.size());
        cudaMemset(b.data(), 0xff, b.size());
        cudaMemset(c.data(), 0xff, c.size());
        const int64_t stride = kHeads * sections.bytes;
        ASSERT_TRUE(convert_pages(shape, unit_batch(shape, Layout::kPlanar, a.data(), stride),
                                  unit_batch(shape, Layout::kSm90, b.data(), stride), kPages,
                                  kHeads, nullptr));
        ASSERT_TRUE(convert_pages(shape, unit_batch(shape, Layout::kSm90, b.data(), stride),
                                  unit_batch(shape, Layout::kPlanar, c.data(), stride), kPages,
                                  kHeads, nullptr));
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        ASSERT_TRUE(b.download() == sm90) << info.name << " " << head_dim << " " << page_tokens;
        ASSERT_TRUE(c.download() == planar) << info.name << " " << head_dim << " " << page_tokens;
      }
    }
  }
}

TEST_F(CudaConvert, Nvfp4PagesOfOtherEngines) {
  UnitShape shape{{}, {}, 16, 128};
  shape.k.base = shape.v.base = formats::FormatId::kNvfp4;
  constexpr int kPages = 2, kHeads = 2;
  constexpr int64_t kCodes = 16 * 64, kScales = 16 * 8;
  const auto at = formats::unit_sections(shape.k, shape.v, 16, 128);
  const std::vector<std::byte> planar = random_units(shape, kPages * kHeads);
  const DeviceBytes units(planar.data(), static_cast<int64_t>(planar.size()));
  const DeviceBytes sm90(units.size()), back(units.size());
  const DeviceBytes paged(kPages * kHeads * 2 * (kCodes + kScales));
  const auto own = [&](Layout layout, const DeviceBytes& bytes) {
    return unit_batch(shape, layout, bytes.data(), kHeads * at.bytes);
  };
  ASSERT_TRUE(convert_pages(shape, own(Layout::kPlanar, units), own(Layout::kSm90, sm90), kPages,
                            kHeads, nullptr));
  for (const bool by_four : {false, true}) {
    const PageBatch other = nvfp4_page_batch(shape, paged.data(), kHeads, by_four);
    ASSERT_TRUE(convert_pages(shape, own(Layout::kSm90, sm90), other, kPages, kHeads, nullptr));
    ASSERT_TRUE(convert_pages(shape, other, own(Layout::kPlanar, back), kPages, kHeads, nullptr));
    const std::vector<std::byte> bytes = paged.download();
    EXPECT_TRUE(back.download() == planar);
    for (int page = 0; page < kPages; ++page) {
      for (int head = 0; head < kHeads; ++head) {
        const std::byte* unit = planar.data() + (page * kHeads + head) * at.bytes;
        const std::byte* there = bytes.data() + page * kHeads * 2 * (kCodes + kScales);
        EXPECT_EQ(std::memcmp(there + head * kCodes, unit + at.k_codes, kCodes), 0);
        there += kHeads * kCodes;
        EXPECT_EQ(std::memcmp(there + head * kScales, unit + at.k_scales, kScales), 0);
        there += kHeads * kScales;
        EXPECT_EQ(std::memcmp(there + head * kCodes, unit + at.v_codes, kCodes), 0);
        there += kHeads * kCodes + head * kScales;
        for (int t = 0; t < 16; ++t) {
          for (int b = 0; b < 8; ++b) {
            const int place = by_four ? t / 4 * 32 + b * 4 + t % 4 : t * 8 + b;
            ASSERT_EQ(there[place], unit[at.v_scales + t * 8 + b]) << t << " " << b;
          }
        }
      }
    }
  }
  shape.k.mean = true;
  EXPECT_FALSE(convert_pages(shape, own(Layout::kSm90, sm90),
                             nvfp4_page_batch(shape, paged.data(), kHeads, false), 1, 1, nullptr));
}

// ---- many values ----

constexpr int kTokens = 64, kHeadDim = 128;
constexpr int64_t kSideValues = kTokens * kHeadDim;

// BF16 of one side of a page by kind: normal numbers at some scale, with an offset, multiples of an
// eighth, any finite bits, any bits at all.
void fill_page(uint64_t seed, int kind, uint16_t* planar) {
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(100 + next(seed) % 40) << 23);
  const float offset = kind == 1 ? 3.0f * scale : 0.0f;
  for (int64_t i = 0; i < kSideValues; ++i) {
    const uint64_t bits = next(seed);
    float x = static_cast<float>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff)) /
                  65536.0f -
              1.5f;
    if (kind == 2) x = static_cast<float>(static_cast<int>(x * 16.0f)) / 8.0f;
    planar[i] = to_bf16(x * scale + offset);
    if (kind == 3) planar[i] = static_cast<uint16_t>(bits >> 48 & 0xff7f);
    if (kind == 4 && bits % 64 == 0) planar[i] = static_cast<uint16_t>(bits >> 48);
  }
}

struct ManyValues {
  std::string kv;
  float g = 1.0f;
};

// BF16 pages of both sides: the numbers in token order on the host, fragments on the device.
struct ManyPages {
  int count;
  std::vector<uint16_t> planar;  // [page][side][token][channel]
  std::unique_ptr<DeviceBytes> source;
};

ManyPages make_pages(int count, ThreadPool& pool) {
  ManyPages pages{
      .count = count, .planar = std::vector<uint16_t>(count * 2 * kSideValues), .source = nullptr};
  std::vector<uint16_t> fragments(pages.planar.size());
  pool.parallel_for(count * 2, [&](int64_t side, int) {
    const auto page = static_cast<int>(side / 2 % 64);
    uint16_t* planar = pages.planar.data() + side * kSideValues;
    fill_page(static_cast<uint64_t>(side) * 977 + 1, page < 4 ? page + 1 : 0, planar);
    SideMap map;
    map.values = side % 2 == 1;
    map.head_dim = kHeadDim;
    for (int i = 0; i < kSideValues; ++i) {
      const CodeFields at = sm90_code_fields(map, i / kHeadDim, i % kHeadDim);
      fragments[side * kSideValues + at.field[0].bit / 16] = planar[i];
    }
  });
  pages.source =
      std::make_unique<DeviceBytes>(fragments.data(), static_cast<int64_t>(fragments.size() * 2));
  return pages;
}

// One unit per page; closed on the device, converted, compared with the host.
void compare_codecs(const ManyValues& many, const ManyPages& pages, ThreadPool& pool) {
  SCOPED_TRACE(many.kv + " g " + std::to_string(many.g));
  const auto format = formats::parse_cache_format(many.kv);
  ASSERT_TRUE(format);
  const UnitShape shape{format->k, format->v, kTokens, kHeadDim};
  const auto stored = formats::unit_sections(shape.k, shape.v, kTokens, kHeadDim);
  const auto bf16 = formats::unit_sections({}, {}, kTokens, kHeadDim);
  const int num_pages = pages.count;
  const DeviceBytes closed(stored.bytes * num_pages), converted(stored.bytes * num_pages);

  const int64_t zero = 0;
  const formats::SideParams params{.global_scale = many.g};
  const cache::LayerParams layer{{&params, 1}, {&params, 1}};
  const formats::SideFormat plain;
  const cache::PageKind kinds[] = {{pages.source->data(),
                                    bf16.bytes,
                                    Layout::kSm90,
                                    {&zero, 1},
                                    {&bf16, 1},
                                    {&plain, 1},
                                    {&plain, 1}},
                                   {closed.data(),
                                    stored.bytes,
                                    Layout::kSm90,
                                    {&zero, 1},
                                    {&stored, 1},
                                    {&shape.k, 1},
                                    {&shape.v, 1}}};
  std::vector<cache::CloseItem> closes;
  for (int page = 0; page < num_pages; ++page)
    closes.push_back({cache::PageEntry::make(0, page), cache::PageEntry::make(1, page)});
  cache::GroupView view;
  view.page_tokens = kTokens;
  view.num_kv_heads = 1;
  view.head_dim = kHeadDim;
  view.kinds = kinds;
  view.closes = closes;
  view.layers = {&layer, 1};
  auto append = CacheAppend::create();
  ASSERT_TRUE(append);
  const Status status = (*append)->run({&view, 0, nullptr, nullptr}, nullptr);
  ASSERT_TRUE(status) << status.error().message();
  ASSERT_TRUE(convert_pages(shape, unit_batch(shape, Layout::kSm90, closed.data(), stored.bytes),
                            unit_batch(shape, Layout::kPlanar, converted.data(), stored.bytes),
                            num_pages, 1, nullptr));
  const std::vector<std::byte> result = converted.download();
  const auto counted = (*append)->take_stats(nullptr);
  ASSERT_TRUE(counted) << counted.error().message();

  const auto k_codec = formats::Codec::create(shape.k, kHeadDim, detect_cpu_level());
  const auto v_codec = formats::Codec::create(shape.v, kHeadDim, detect_cpu_level());
  ASSERT_TRUE(k_codec && v_codec);
  std::atomic<int64_t> saturated{0}, wrong{0};
  pool.parallel_for(num_pages, [&](int64_t page, int) {
    std::vector<float> x(kSideValues);
    std::vector<std::byte> unit(stored.bytes);
    for (const bool keys : {true, false}) {
      const uint16_t* from = pages.planar.data() + (page * 2 + (keys ? 0 : 1)) * kSideValues;
      for (int64_t i = 0; i < kSideValues; ++i) x[i] = from_bf16(from[i]);
      const auto stats =
          (keys ? k_codec : v_codec)
              ->encode_page_in_place(
                  x.data(), kTokens, params,
                  side_of_unit(unit.data(), stored, keys ? shape.keys() : shape.values()));
      saturated += stats.saturated;
    }
    if (std::memcmp(unit.data(), result.data() + page * stored.bytes, stored.bytes) != 0) ++wrong;
  });
  EXPECT_EQ(wrong.load(), 0) << "of " << num_pages << " pages";
  EXPECT_EQ(counted->saturated, saturated.load());
}

// 10^8 values a format and side: 12,288 pages of 8,192.
TEST_F(CudaConvert, CodecsOfManyValues) {
  ThreadPool pool(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  const ManyPages pages = make_pages(12288, pool);
  const ManyValues cases[] = {{"nvfp4"},
                              {"nvfp4", 0.013f},
                              {"k=nvfp4+46,v=nvfp4+46"},
                              {"k=nvfp4+46+mean,v=nvfp4+46", 0.013f},
                              {"4bit"},
                              {"fp8", 0.37f},
                              {"k=fp8+mean,v=fp8e5m2"},
                              {"8bit"},
                              {"k=mxfp4+mean,v=mxfp4"},
                              {"k=mxfp8,v=mxfp8"},
                              {"k=int4+mean,v=int4"},
                              {"k=fp8:token,v=f16"},
                              {"k=int3:channel,v=fp8:token"},
                              {"k=int2:channel+mean,v=int8"}};
  for (const ManyValues& many : cases) {
    compare_codecs(many, pages, pool);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace kvant::backend::cuda
