#include "kvant/backend/cuda/decode/variants.h"

#include <gtest/gtest.h>

namespace kvant::backend::cuda {
namespace {

VariantQuery query_of(KeyKernel key, int rows, int64_t fast_pages) {
  VariantQuery query;
  query.key = key;
  query.value = ValueKernel::kNvfp4;
  query.head_dim = 128;
  query.page_tokens = 64;
  query.rows = rows;
  query.fast_pages = fast_pages;
  return query;
}

TEST(CudaDecodeVariants, FastMemoryAndManyPagesTakeKernelsOfTheirOwn) {
  const DecodeVariant* const usual = find_variant(query_of(KeyKernel::kNvfp4, 4, kNotFast));
  ASSERT_NE(usual, nullptr);
  EXPECT_EQ(usual->least_fast_pages, kNotFast);
  EXPECT_EQ(find_variant(query_of(KeyKernel::kNvfp4, 4, 63)), usual);
  const DecodeVariant* const fast = find_variant(query_of(KeyKernel::kNvfp4, 4, 64));
  ASSERT_NE(fast, nullptr);
  EXPECT_EQ(fast->least_fast_pages, 64);
  EXPECT_EQ(find_variant(query_of(KeyKernel::kInt4Channel, 4, 0))->least_fast_pages, 0);
}

TEST(CudaDecodeVariants, ManyQueryRowsTakeTheUsualKernels) {
  for (const int64_t pages : {int64_t{kNotFast}, int64_t{1} << 20}) {
    const DecodeVariant* const variant = find_variant(query_of(KeyKernel::kNvfp4, 16, pages));
    ASSERT_NE(variant, nullptr);
    EXPECT_EQ(variant->least_fast_pages, kNotFast);
    EXPECT_EQ(variant->max_rows, 16);
  }
}

}  // namespace
}  // namespace kvant::backend::cuda
