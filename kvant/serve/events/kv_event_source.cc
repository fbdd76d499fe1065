#include "kvant/serve/events/kv_event_source.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "kvant/base/check.h"

namespace kvant::serve {
namespace {

// Readers take a whole event at a time; a long prompt is several of them.
constexpr size_t kMaxBlocksPerEvent = 1024;

uint8_t bit_of(KvMedium medium) {
  return static_cast<uint8_t>(1u << static_cast<unsigned>(medium));
}

bool same_kind(const KvGroupKind& a, const KvGroupKind& b) {
  return a.group_idx == b.group_idx && a.sliding_window == b.sliding_window;
}

// The last event if it is of this type and place, so that it can be continued.
template <typename Event>
Event* last_event(std::vector<KvEvent>& events, KvMedium medium, const KvGroupKind& kind) {
  auto* last = events.empty() ? nullptr : std::get_if<Event>(&events.back());
  const bool fits = last != nullptr && last->medium == medium && same_kind(last->group, kind) &&
                    last->block_hashes.size() < kMaxBlocksPerEvent;
  return fits ? last : nullptr;
}

std::optional<KvEventSource::Place> place_of(cache::Medium medium, int group, int window) {
  switch (medium) {
    case cache::Medium::kDevice: return KvEventSource::Place{KvMedium::kDevice, group, window};
    case cache::Medium::kHost: return KvEventSource::Place{KvMedium::kHost, group, window};
    case cache::Medium::kDisk: return KvEventSource::Place{KvMedium::kDisk, group, window};
    case cache::Medium::kRemote: break;
  }
  return std::nullopt;
}

}  // namespace

uint64_t kv_block_hash(const cache::PageKey& key) {
  uint64_t hash = 0;
  for (size_t i = key.size() - 8; i < key.size(); ++i) hash = hash << 8 | key[i];
  return hash == 0 ? 1 : hash;
}

KvEventSource::KvEventSource(KvEventPublisher& publisher, int block_size, int num_groups)
    : publisher_(publisher), block_size_(block_size), groups_(static_cast<size_t>(num_groups)) {
  if (num_groups == 1) return;
  for (int i = 0; i < num_groups; ++i) groups_[static_cast<size_t>(i)].kind.group_idx = i;
}

KvEventSource::Group& KvEventSource::group(const Place& place) {
  Group& group = groups_.at(static_cast<size_t>(place.group));
  group.kind.sliding_window = place.window;
  return group;
}

void KvEventSource::stored(uint64_t hash, std::optional<uint64_t> parent,
                           std::span<const uint32_t> tokens, Place place,
                           std::string_view cache_salt) {
  KVANT_CHECK(static_cast<int>(tokens.size()) == block_size_, "only full blocks are stored");
  Group& in = group(place);
  Block& block = in.blocks[hash];
  if ((block.media & bit_of(place.medium)) != 0) return;
  if (block.media == 0) {
    block.parent = parent;
    const auto above = parent ? in.blocks.find(*parent) : in.blocks.end();
    block.depth = above == in.blocks.end() ? 0 : above->second.depth + 1;
    block.tokens.assign(tokens.begin(), tokens.end());
    block.cache_salt = cache_salt;
  }
  block.media = static_cast<uint8_t>(block.media | bit_of(place.medium));
  ++blocks_;
  add_stored(hash, block, place.medium, in.kind);
}

// Continues the last event where the block is the child of its last one.
void KvEventSource::add_stored(uint64_t hash, const Block& block, KvMedium medium,
                               const KvGroupKind& kind) {
  std::vector<KvEvent>& events = kind.sliding_window > 0 ? windows_ : pending_;
  auto* run = last_event<BlockStored>(events, medium, kind);
  if (run == nullptr || !block.parent || run->block_hashes.back() != *block.parent) {
    events.emplace_back(BlockStored{.block_hashes = {},
                                    .parent_block_hash = block.parent,
                                    .token_ids = {},
                                    .block_size = block_size_,
                                    .medium = medium,
                                    .group = kind,
                                    .cache_salt = block.cache_salt});
    run = &std::get<BlockStored>(events.back());
  }
  run->block_hashes.push_back(hash);
  run->token_ids.insert(run->token_ids.end(), block.tokens.begin(), block.tokens.end());
}

void KvEventSource::removed(uint64_t hash, Place place) {
  Group& in = group(place);
  const auto found = in.blocks.find(hash);
  if (found == in.blocks.end() || (found->second.media & bit_of(place.medium)) == 0) return;
  found->second.media = static_cast<uint8_t>(found->second.media & ~bit_of(place.medium));
  if (found->second.media == 0) in.blocks.erase(found);
  --blocks_;
  add_removed(hash, place.medium, in.kind);
}

void KvEventSource::add_removed(uint64_t hash, KvMedium medium, const KvGroupKind& kind) {
  join_windows();
  auto* run = last_event<BlockRemoved>(pending_, medium, kind);
  if (run == nullptr) {
    pending_.emplace_back(BlockRemoved{.block_hashes = {}, .medium = medium, .group = kind});
    run = &std::get<BlockRemoved>(pending_.back());
  }
  run->block_hashes.push_back(hash);
}

// AllBlocksCleared is about all media: where others still hold blocks, each is removed by name.
void KvEventSource::cleared(KvMedium medium) {
  for (Group& in : groups_) {
    std::vector<uint64_t> gone;
    for (const auto& [hash, block] : in.blocks) {
      if ((block.media & bit_of(medium)) != 0) gone.push_back(hash);
    }
    for (const uint64_t hash : gone) {
      Block& block = in.blocks.at(hash);
      block.media = static_cast<uint8_t>(block.media & ~bit_of(medium));
      if (block.media == 0) in.blocks.erase(hash);
      --blocks_;
      add_removed(hash, medium, in.kind);
    }
  }
  if (blocks_ == 0) {
    windows_.clear();
    pending_.clear();
    pending_.emplace_back(AllBlocksCleared{});
  }
  end_step();
}

void KvEventSource::join_windows() {
  std::move(windows_.begin(), windows_.end(), std::back_inserter(pending_));
  windows_.clear();
}

void KvEventSource::end_step() {
  join_windows();
  if (lost_) return tell_all();
  if (pending_.empty()) return;
  if (!publisher_.publish(std::exchange(pending_, {}))) lost_ = true;
}

// As one batch: until a subscriber has all of it, it shall not route by half of it.
void KvEventSource::tell_all() {
  pending_.clear();
  pending_.emplace_back(AllBlocksCleared{});
  for (const Group& in : groups_) {
    std::vector<std::pair<int64_t, uint64_t>> order;  // depth, hash
    order.reserve(in.blocks.size());
    for (const auto& [hash, block] : in.blocks) order.emplace_back(block.depth, hash);
    std::sort(order.begin(), order.end());
    for (const auto& [depth, hash] : order) {
      const Block& block = in.blocks.at(hash);
      for (int m = 0; m < kNumKvMedia; ++m) {
        const auto medium = static_cast<KvMedium>(m);
        if ((block.media & bit_of(medium)) != 0) add_stored(hash, block, medium, in.kind);
      }
    }
  }
  join_windows();
  lost_ = !publisher_.publish(std::exchange(pending_, {}));
}

void KvEventSource::pages_stored(const cache::StoredPages& pages) {
  const std::optional<Place> place = place_of(pages.medium, pages.group, pages.window);
  if (!place) return;
  std::optional<uint64_t> parent;
  if (pages.parent_key != cache::PageKey{}) parent = kv_block_hash(pages.parent_key);
  const size_t tokens = static_cast<size_t>(block_size_);
  for (size_t i = 0; i < pages.keys.size(); ++i) {
    const uint64_t hash = kv_block_hash(pages.keys[i]);
    stored(hash, parent, pages.token_ids.subspan(i * tokens, tokens), *place, pages.salt);
    parent = hash;
  }
}

void KvEventSource::pages_removed(const cache::RemovedPages& pages) {
  const std::optional<Place> place = place_of(pages.medium, pages.group, pages.window);
  if (!place) return;
  for (const cache::PageKey& key : pages.keys) removed(kv_block_hash(key), *place);
}

void KvEventSource::all_cleared(cache::Medium medium) {
  if (const std::optional<Place> place = place_of(medium, 0, 0)) cleared(place->medium);
}

}  // namespace kvant::serve
