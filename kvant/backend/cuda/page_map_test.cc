// The closed forms that kernels use against the definition of the layouts, bit by bit.
#include "kvant/backend/cuda/page_map.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kvant/backend/cuda/append_items.h"

namespace kvant::backend::cuda {
namespace {

using cache::Layout;
using cache::PageEntry;
using cache::SideRole;
using cache::SideShape;

template <typename F>
void for_each_shape(F&& f) {
  for (const formats::FormatInfo& info : formats::all_formats()) {
    for (const SideRole role : {SideRole::kKeys, SideRole::kValues}) {
      if (!(role == SideRole::kKeys ? info.for_keys : info.for_values)) continue;
      for (const int page_tokens : {16, 32, 64, 128}) {
        for (const int head_dim : {16, 48, 64, 80, 96, 112, 128, 192, 256, 512}) {
          SideShape shape;
          shape.format.base = info.id;
          shape.role = role;
          shape.page_tokens = page_tokens;
          shape.head_dim = head_dim;
          f(shape, std::string(info.name) + (role == SideRole::kKeys ? " k " : " v ") +
                       std::to_string(page_tokens) + " x " + std::to_string(head_dim));
        }
      }
    }
  }
}

bool same(const CodeField& field, const cache::BitField& expected) {
  return field.bit == expected.bit && field.width == expected.width &&
         field.shift == expected.shift;
}

TEST(PageMap, CodesLieWhereTheLayoutSays) {
  for_each_shape([](const SideShape& shape, const std::string& name) {
    const SideMap map = make_side_map(shape);
    for (int token = 0; token < shape.page_tokens; ++token) {
      for (int channel = 0; channel < shape.head_dim; ++channel) {
        const cache::ElementPlace sm90 = code_place(Layout::kSm90, shape, token, channel);
        const CodeFields fields = sm90_code_fields(map, token, channel);
        ASSERT_EQ(fields.num, sm90.num_fields) << name;
        for (int i = 0; i < fields.num; ++i) {
          ASSERT_TRUE(same(fields.field[i], sm90.fields[i]))
              << name << " token " << token << " channel " << channel;
          // What kernels rely on when they build words.
          ASSERT_LE(fields.field[i].bit % 32 + fields.field[i].width, 32);
        }
        const cache::ElementPlace planar = code_place(Layout::kPlanar, shape, token, channel);
        ASSERT_TRUE(same(planar_code_field(map, token, channel), planar.fields[0])) << name;
      }
    }
  });
}

TEST(PageMap, ScalesLieWhereTheLayoutSays) {
  for_each_shape([](const SideShape& shape, const std::string& name) {
    const SideMap map = make_side_map(shape);
    const cache::ScaleGrid grid = scale_grid(shape);
    ASSERT_EQ(map.num_parts, grid.num_parts);
    for (int row = 0; row < grid.num_rows; ++row) {
      for (int block = 0; block < grid.num_blocks; ++block) {
        for (int part = 0; part < grid.num_parts; ++part) {
          ASSERT_EQ(sm90_scale_byte(map, row, block, part),
                    scale_place(Layout::kSm90, shape, row, block, part))
              << name;
          ASSERT_EQ(planar_scale_byte(map, row, block, part),
                    scale_place(Layout::kPlanar, shape, row, block, part))
              << name;
        }
      }
    }
  });
}

// Kernels move 16 bytes at a time.
TEST(PageMap, SectionsAreWholeSixteenBytes) {
  for_each_shape([](const SideShape& shape, const std::string& name) {
    const SideMap map = make_side_map(shape);
    EXPECT_EQ(map.code_bytes % 16, 0) << name;
    EXPECT_EQ(map.scale_bytes % 16, 0) << name;
  });
}

TEST(AppendItems, RunsOfRowsStayWithinTilesAndPages) {
  const PageEntry pages[] = {PageEntry::make(cache::kKindBf16, 7),
                             PageEntry::make(cache::kKindStaging, 0),
                             PageEntry::make(cache::kKindBf16, 9)};
  const cache::SequenceView sequences[] = {{.first_row = 0,
                                            .num_new_tokens = 45,
                                            .first_position = 3 * 32 + 30,
                                            .bf16_first_page = 3,
                                            .bf16 = pages},
                                           {.first_row = 45,
                                            .num_new_tokens = 1,
                                            .first_position = 31,
                                            .bf16_first_page = 0,
                                            .bf16 = pages}};
  const cache::CloseItem closes[] = {
      {PageEntry::make(cache::kKindBf16, 7), PageEntry::make(cache::kKindStored, 3)},
      {PageEntry::make(cache::kKindStaging, 0), PageEntry::make(cache::kKindStored, 4)}};
  cache::GroupView view;
  view.page_tokens = 32;
  view.sequences = sequences;
  view.closes = closes;
  AppendLists lists;
  ASSERT_TRUE(list_append_items(view, lists));
  // The staged page is closed in this step: its rows are appended there.
  std::vector<AppendItem> rows = {{.row = 0, .slot = 7, .kind = 0, .token = 30, .count = 2},
                                  {.row = 34, .slot = 9, .kind = 0, .token = 0, .count = 11},
                                  {.row = 45, .slot = 7, .kind = 0, .token = 31, .count = 1}};
  EXPECT_EQ(lists.rows, rows);
  std::vector<ClosedPage> closed = {{7, 3, 0, -1}, {0, 4, 2, 2}};
  EXPECT_EQ(lists.closes, closed);

  view.strict = true;
  ASSERT_TRUE(list_append_items(view, lists));
  rows.insert(rows.begin() + 1, {{.row = 2, .slot = 0, .kind = 2, .token = 0, .count = 16},
                                 {.row = 18, .slot = 0, .kind = 2, .token = 16, .count = 16}});
  closed[1].row = -1;
  EXPECT_EQ(lists.rows, rows);
  EXPECT_EQ(lists.closes, closed);
}

TEST(AppendItems, APageThatIsNotThereIsAnError) {
  const PageEntry none[] = {PageEntry::none()};
  const cache::SequenceView sequence = {.num_new_tokens = 1, .bf16 = none};
  cache::GroupView view;
  view.page_tokens = 16;
  view.sequences = {&sequence, 1};
  AppendLists lists;
  const Status status = list_append_items(view, lists);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), ErrorCode::kInternal);
}

}  // namespace
}  // namespace kvant::backend::cuda
