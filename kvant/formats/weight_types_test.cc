#include "kvant/formats/weight_types.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/base/small_floats.h"

namespace kvant::formats {
namespace {

std::vector<float> dequantize(WeightType type, const std::vector<uint8_t>& bytes) {
  const WeightTypeInfo& info = weight_type_info(type);
  const int64_t n = static_cast<int64_t>(bytes.size()) / info.block_bytes * info.block_elements;
  std::vector<float> out(static_cast<size_t>(n));
  dequantize_row(type, reinterpret_cast<const std::byte*>(bytes.data()), n, out.data());
  return out;
}

void put_f16(std::vector<uint8_t>& block, size_t at, float value) {
  const uint16_t bits = to_f16(value);
  std::memcpy(block.data() + at, &bits, 2);
}

TEST(WeightTypes, TableIsConsistent) {
  uint32_t previous = 0;
  for (const WeightTypeInfo& info : weight_types()) {
    const uint32_t id = static_cast<uint32_t>(info.type);
    EXPECT_TRUE(id == 0 || id > previous) << info.name;
    previous = id;
    EXPECT_EQ(&weight_type_info(info.type), &info);
    EXPECT_EQ(find_weight_type(id), info.in_files ? &info : nullptr) << info.name;
    EXPECT_EQ(gguf_type_name(id), info.in_files ? info.name : "");
    EXPECT_EQ(weight_bytes(info.type, 3 * info.block_elements),
              row_head_bytes(info.type) + 3 * info.block_bytes);
    EXPECT_EQ(weight_bytes(info.type, 5, 3 * info.block_elements),
              5 * weight_bytes(info.type, 3 * info.block_elements));
  }
  EXPECT_EQ(find_weight_type(20), nullptr);
  EXPECT_EQ(gguf_type_name(20), "IQ4_NL");
  EXPECT_EQ(gguf_type_name(12345), "");
  EXPECT_THROW((void)weight_bytes(WeightType::kQ4_0, 33), InternalError);
}

TEST(WeightTypes, PlainTypesKeepEveryBit) {
  const std::vector<uint8_t> bytes = {0x01, 0x00, 0x80, 0x3f, 0x00, 0x00, 0xc0, 0xff};
  const std::vector<float> f32 = dequantize(WeightType::kF32, bytes);
  EXPECT_EQ(std::bit_cast<uint32_t>(f32[0]), 0x3f800001u);
  EXPECT_EQ(std::bit_cast<uint32_t>(f32[1]), 0xffc00000u);
  EXPECT_EQ(dequantize(WeightType::kF16, {0x00, 0x3c, 0x01, 0x80}),
            (std::vector<float>{1.0f, -0x1p-24f}));
  EXPECT_EQ(dequantize(WeightType::kBF16, {0x80, 0x3f, 0x49, 0xc0}),
            (std::vector<float>{1.0f, -3.140625f}));
}

// One element of each type set apart from the rest, so that a wrong position or sign shows.
TEST(WeightTypes, BlocksOf32) {
  std::vector<uint8_t> q4_0(18, 0x88);  // all codes 8: zero
  put_f16(q4_0, 0, 0.5f);
  q4_0[2 + 3] = 0xf0;  // element 3 code 0, element 19 code 15
  std::vector<float> expected(32, 0.0f);
  expected[3] = -4.0f;
  expected[19] = 3.5f;
  EXPECT_EQ(dequantize(WeightType::kQ4_0, q4_0), expected);

  std::vector<uint8_t> q4_1(20, 0);
  put_f16(q4_1, 0, 0.25f);
  put_f16(q4_1, 2, -1.0f);
  q4_1[4 + 15] = 0x2f;
  expected.assign(32, -1.0f);
  expected[15] = 0.25f * 15 - 1;
  expected[31] = 0.25f * 2 - 1;
  EXPECT_EQ(dequantize(WeightType::kQ4_1, q4_1), expected);

  std::vector<uint8_t> q5_0(22, 0);
  put_f16(q5_0, 0, 2.0f);
  q5_0[2] = 0x01;  // high bit of element 0
  q5_0[5] = 0x80;  // high bit of element 31
  q5_0[6] = 0x03;
  expected.assign(32, -32.0f);
  expected[0] = 2.0f * (16 + 3 - 16);
  expected[31] = 0.0f;
  EXPECT_EQ(dequantize(WeightType::kQ5_0, q5_0), expected);

  std::vector<uint8_t> q5_1(24, 0);
  put_f16(q5_1, 0, 2.0f);
  put_f16(q5_1, 2, 1.0f);
  q5_1[4 + 2] = 0x01;  // high bit of element 16
  q5_1[8] = 0x50;      // low bits of element 16
  expected.assign(32, 1.0f);
  expected[16] = 2.0f * 21 + 1;
  EXPECT_EQ(dequantize(WeightType::kQ5_1, q5_1), expected);

  std::vector<uint8_t> q8_0(34, 0);
  put_f16(q8_0, 0, 0.125f);
  q8_0[2 + 7] = 0x80;  // -128
  q8_0[2 + 31] = 127;
  expected.assign(32, 0.0f);
  expected[7] = -16.0f;
  expected[31] = 127 * 0.125f;
  EXPECT_EQ(dequantize(WeightType::kQ8_0, q8_0), expected);
}

TEST(WeightTypes, BlocksOf256) {
  std::vector<uint8_t> q4_k(144, 0);
  put_f16(q4_k, 0, 0.5f);
  put_f16(q4_k, 2, 0.25f);
  q4_k[4 + 1] = 7 | 2 << 6;       // sub-block 1: scale 7; top bits of sub-block 5's scale: 2
  q4_k[4 + 5] = 9 | 1 << 6;       // sub-block 1: minimum 9; top bits of sub-block 5's minimum: 1
  q4_k[4 + 9] = 3 | 4 << 4;       // sub-block 5: low bits of scale (3) and minimum (4)
  q4_k[16 + 2] = 0xa0;            // sub-block 1, element 2: code 10
  q4_k[16 + 2 * 32 + 31] = 0x60;  // sub-block 5, element 31: code 6
  std::vector<float> expected(256, 0.0f);
  for (int i = 0; i < 32; ++i) {
    expected[32 + i] = -0.25f * 9;
    expected[160 + i] = -0.25f * (16 + 4);
  }
  expected[32 + 2] = 0.5f * 7 * 10 - 0.25f * 9;
  expected[160 + 31] = 0.5f * (32 + 3) * 6 - 0.25f * 20;
  EXPECT_EQ(dequantize(WeightType::kQ4_K, q4_k), expected);

  std::vector<uint8_t> q5_k(176, 0);
  std::copy(q4_k.begin(), q4_k.begin() + 16, q5_k.begin());
  std::copy(q4_k.begin() + 16, q4_k.end(), q5_k.begin() + 48);
  q5_k[16 + 2] = 1 << 1;   // fifth bit of sub-block 1, element 2
  q5_k[16 + 31] = 1 << 5;  // fifth bit of sub-block 5, element 31
  expected[32 + 2] = 0.5f * 7 * 26 - 0.25f * 9;
  expected[160 + 31] = 0.5f * 35 * 22 - 0.25f * 20;
  EXPECT_EQ(dequantize(WeightType::kQ5_K, q5_k), expected);

  std::vector<uint8_t> q6_k(210, 0);
  put_f16(q6_k, 208, 0.5f);
  q6_k[192 + 15] = 0xfe;  // scale of elements 240..255: -2
  q6_k[64 + 32 + 20] = 0xb0;
  q6_k[128 + 32 + 20] = 0x80;  // element 128 + 3 * 32 + 20 = 244: code 11 + 2 * 16
  expected.assign(256, 0.0f);
  for (int i = 240; i < 256; ++i) expected[i] = 0.5f * -2 * -32;
  expected[244] = 0.5f * -2 * (43 - 32);
  EXPECT_EQ(dequantize(WeightType::kQ6_K, q6_k), expected);
}

struct E4m3Row {
  float scale = -1.0f;
  std::vector<uint8_t> codes;
  std::vector<float> values;  // of the codes again
  bool made = false;

  explicit E4m3Row(const std::vector<float>& in) {
    const auto n = static_cast<int64_t>(in.size());
    std::vector<std::byte> bytes(static_cast<size_t>(weight_bytes(WeightType::kF8_E4M3, n)),
                                 std::byte{0xa5});
    made = quantize_row_e4m3(in, bytes.data());
    std::memcpy(&scale, bytes.data(), 4);
    codes.resize(in.size());
    std::memcpy(codes.data(), bytes.data() + 4, in.size());
    values.resize(in.size());
    dequantize_row(WeightType::kF8_E4M3, bytes.data(), n, values.data());
  }
};

TEST(WeightTypes, E4m3RowsHaveTheCodesOfTheStandard) {
  // The largest value is 448, so that the scale is 1: ties go to even codes, the smallest step is
  // 2^-9.
  const E4m3Row row({448.0f, -448.0f, 0.0f, -0.0f, 1.0f, -1.125f, 17.0f, 19.0f, 17.01f, 0x1p-6f,
                     0x1p-9f, 0x1p-10f, 0x1.8p-9f, -0x1.1p-10f, 432.0f, 300.0f});
  ASSERT_TRUE(row.made);
  EXPECT_EQ(row.scale, 1.0f);
  EXPECT_EQ(row.codes, (std::vector<uint8_t>{0x7e, 0xfe, 0x00, 0x80, 0x38, 0xb9, 0x58, 0x5a, 0x59,
                                             0x08, 0x01, 0x00, 0x02, 0x81, 0x7e, 0x79}));
  EXPECT_EQ(row.values,
            (std::vector<float>{448.0f, -448.0f, 0.0f, -0.0f, 1.0f, -1.125f, 16.0f, 20.0f, 18.0f,
                                0x1p-6f, 0x1p-9f, 0.0f, 0x1p-8f, -0x1p-9f, 448.0f, 288.0f}));
}

TEST(WeightTypes, E4m3RowsAreCloseWhateverTheirSize) {
  for (const float size : {0x1p-100f, 3e-4f, 1.0f, 1e30f, 3e38f}) {
    std::vector<float> in;
    for (int i = -100; i <= 100; ++i) in.push_back(static_cast<float>(i * i * i) * 1e-6f * size);
    const E4m3Row row(in);
    ASSERT_TRUE(row.made);
    EXPECT_EQ(row.scale, in.back() / 448.0f);
    EXPECT_EQ(row.codes.front(), 0xfe);
    EXPECT_EQ(row.codes.back(), 0x7e);
    for (size_t i = 0; i < in.size(); ++i) {
      const float bound = std::max(std::fabs(in[i]) * 0x1.01p-4f, row.scale * 0x1.01p-10f);
      EXPECT_LE(std::fabs(row.values[i] - in[i]), bound) << in[i];
    }
  }
}

TEST(WeightTypes, E4m3RowsOfZerosAndOfTinyValues) {
  const E4m3Row zeros(std::vector<float>{0.0f, -0.0f, 0.0f});
  EXPECT_TRUE(zeros.made);
  EXPECT_EQ(zeros.scale, 0.0f);
  EXPECT_EQ(zeros.codes, (std::vector<uint8_t>{0, 0, 0}));
  const E4m3Row tiny({0x1p-149f, -0x1p-145f});  // amax / 448 is zero
  EXPECT_TRUE(tiny.made);
  EXPECT_EQ(tiny.scale, 0.0f);
  EXPECT_EQ(tiny.codes, (std::vector<uint8_t>{0, 0}));
  // The scale, 512 / 448 of the smallest number, is rounded down: the largest value saturates.
  const E4m3Row subnormal({0x1p-140f, -0x1p-141f});
  EXPECT_TRUE(subnormal.made);
  EXPECT_EQ(subnormal.codes, (std::vector<uint8_t>{0x7e, 0xf8}));
  EXPECT_EQ(subnormal.values, (std::vector<float>{448 * 0x1p-149f, -0x1p-141f}));
}

TEST(WeightTypes, E4m3RowsAreNotMadeOfWhatIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN()}) {
    const E4m3Row row({1.0f, bad, 2.0f});
    EXPECT_FALSE(row.made);
    EXPECT_EQ(row.codes, (std::vector<uint8_t>(3, 0xa5)));  // nothing is written
  }
}

}  // namespace
}  // namespace kvant::formats
