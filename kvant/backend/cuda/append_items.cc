#include "kvant/backend/cuda/append_items.h"

#include <algorithm>
#include <string>
#include <unordered_map>

namespace kvant::backend::cuda {

using cache::PageEntry;

namespace {

constexpr int kTileTokens = 16;

// What the lists of one step share while they are made.
struct Listing {
  const cache::GroupView& view;
  AppendLists& lists;
  std::unordered_map<uint32_t, size_t> staged;  // index in `closes` by staging slot
};

Status list_rows(Listing& listing, const cache::SequenceView& sequence) {
  const cache::GroupView& view = listing.view;
  for (int32_t begin = 0; begin < sequence.num_new_tokens;) {
    const int64_t position = sequence.first_position + begin;
    const PageEntry entry = sequence.bf16[position / view.page_tokens - sequence.bf16_first_page];
    if (!entry.valid() || (entry.kind != cache::kKindBf16 && entry.kind != cache::kKindStaging)) {
      return Error(ErrorCode::kInternal,
                   "the page of new token " + std::to_string(position) + " has no BF16 slot");
    }
    const int token = static_cast<int>(position % view.page_tokens);
    const int32_t rest = sequence.num_new_tokens - begin;
    if (entry.kind == cache::kKindStaging && token == 0 && rest >= view.page_tokens) {
      const auto found = listing.staged.find(entry.slot);
      if (found != listing.staged.end()) {
        listing.lists.closes[found->second].row = sequence.first_row + begin;
        begin += view.page_tokens;
        continue;
      }
    }
    const int count = std::min<int32_t>(kTileTokens - token % kTileTokens, rest);
    listing.lists.rows.push_back({.row = sequence.first_row + begin,
                                  .slot = entry.slot,
                                  .kind = static_cast<uint8_t>(entry.kind),
                                  .token = static_cast<uint8_t>(token),
                                  .count = static_cast<uint8_t>(count)});
    begin += count;
  }
  return {};
}

}  // namespace

Status list_append_items(const cache::GroupView& view, AppendLists& lists) {
  lists.rows.clear();
  lists.closes.clear();
  Listing listing{.view = view, .lists = lists, .staged = {}};
  for (const cache::CloseItem& item : view.closes) {
    if (!item.source.valid() || !item.target.valid() || item.source.kind == cache::kKindStored ||
        item.target.kind != cache::kKindStored) {
      return Error(ErrorCode::kInternal, "a page to close has no BF16 source or no stored target");
    }
    if (item.source.kind == cache::kKindStaging && !view.strict)
      listing.staged.emplace(item.source.slot, lists.closes.size());
    lists.closes.push_back({.source_slot = item.source.slot,
                            .target_slot = item.target.slot,
                            .source_kind = item.source.kind});
  }
  for (const cache::SequenceView& sequence : view.sequences)
    KVANT_TRY(list_rows(listing, sequence));
  return {};
}

}  // namespace kvant::backend::cuda
