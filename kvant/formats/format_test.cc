#include "kvant/formats/format.h"

#include <gtest/gtest.h>

#include <set>

#include "kvant/formats/all_formats.h"

namespace kvant::formats {
namespace {

// A header's functions must work in constant expressions, so that tables can be made at compile
// time.
constexpr float kBlock[16] = {1.0f, -2.0f, 3.0f, 6.0f};
static_assert(Nvfp4::block_scale(kBlock, 16, 1.0f) == 0x38);
static_assert(Nvfp4::encode(-2.0f, 0x38, 1.0f) == 0xc);
static_assert(Nvfp4::decode(0xc, 0x38, 1.0f) == -2.0f);
static_assert(Int4::encode(15.0f, Int4::block_scale(kBlock, 16, 1.0f), 1.0f) == 15);
static_assert(Mxfp4::block_scale(kBlock, 16, 1.0f) == 127);

TEST(Formats, RegistryIsComplete) {
  EXPECT_GE(all_formats().size(), 14u);
  int last = -1;
  std::set<std::string_view> names;
  for (const FormatInfo& format : all_formats()) {
    EXPECT_GT(static_cast<int>(format.id), last) << format.name;
    last = static_cast<int>(format.id);
    EXPECT_TRUE(names.insert(format.name).second) << format.name;
    EXPECT_EQ(&format_info(format.id), &format);
    const Result<FormatId> found = find_format(format.name);
    ASSERT_TRUE(found) << format.name;
    EXPECT_EQ(*found, format.id);
    EXPECT_FALSE(format.summary.empty());
  }
}

TEST(Formats, NumbersNeverChange) {
  // Part of the fingerprint of stored pages.
  EXPECT_EQ(static_cast<int>(FormatId::kBf16), 0);
  EXPECT_EQ(static_cast<int>(FormatId::kFp8Token), 4);
  EXPECT_EQ(static_cast<int>(FormatId::kInt4Channel), 9);
  EXPECT_EQ(static_cast<int>(FormatId::kNvfp4), 12);
  EXPECT_EQ(static_cast<int>(FormatId::kMxfp4), 13);
}

TEST(Formats, UnknownNameListsFormatsAndSuggests) {
  const Result<FormatId> found = find_format("nvpf4");
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(found.error().message().find("did you mean 'nvfp4'"), std::string::npos);
  EXPECT_NE(found.error().message().find("int4:channel"), std::string::npos);
}

}  // namespace
}  // namespace kvant::formats
