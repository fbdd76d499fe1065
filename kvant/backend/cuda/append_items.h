// The work of one append as flat lists that a kernel indexes: runs of rows and pages to close.
//
// Made on the host from a GroupView, once per step and layer group (step_tables.h uploads them). No
// CUDA here: tested on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

// Rows [row, row + count) of the activations are tokens [token, token + count) of one page; they
// lie within one tile of 16 tokens. `token` 0..127, `count` 1..16.
struct AppendItem {
  int32_t row = 0;
  uint32_t slot = 0;
  uint8_t kind = 0;
  uint8_t token = 0;
  uint8_t count = 0;
  uint8_t unused = 0;

  bool operator==(const AppendItem&) const = default;
};
static_assert(sizeof(AppendItem) == 12);

struct ClosedPage {
  uint32_t source_slot = 0;
  uint32_t target_slot = 0;
  uint32_t source_kind = 0;
  // The first of the page's rows, all of which are in this step: who closes the page appends them
  // too, and `rows` does not have them. -1: the page's values are there already.
  int32_t row = -1;

  bool operator==(const ClosedPage&) const = default;
};
static_assert(sizeof(ClosedPage) == 16);

struct AppendLists {
  std::vector<AppendItem> rows;
  std::vector<ClosedPage> closes;

  bool operator==(const AppendLists&) const = default;
};

// Replaces what `lists` holds. With +strict, rows are never left to the closing of their page.
// kInternal if the view names a page that is not there.
Status list_append_items(const cache::GroupView& view, AppendLists& lists);

}  // namespace kvant::backend::cuda
