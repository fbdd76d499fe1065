// From what happens to pages to KV events: one batch per engine step, parents first, no block told
// twice, and everything told again after a batch was lost.
//
// Engine thread only.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvant/cache/fingerprint.h"
#include "kvant/cache/page_events.h"
#include "kvant/serve/events/kv_event.h"
#include "kvant/serve/events/kv_event_publisher.h"

namespace kvant::serve {

// What routers know a page by: 64 bits of its key; never 0, which llm-d takes for "no parent".
uint64_t kv_block_hash(const cache::PageKey& key);

class KvEventSource final : public cache::PageObserver {
 public:
  // `publisher` must outlive this. `block_size` is page_tokens; `num_groups` are the layer groups
  // of the model, whose pages are told of one by one (group_idx) where there are several.
  KvEventSource(KvEventPublisher& publisher, int block_size, int num_groups = 1);

  // Which pages: of one layer group, whose window is in tokens (0: full attention), at one medium.
  struct Place {
    KvMedium medium = KvMedium::kDevice;
    int group = 0;
    int window = 0;
  };
  // A page with these tokens [block_size] can be reused there from now on. `parent` absent: it
  // begins a sequence. Of several pages, parents come first.
  void stored(uint64_t hash, std::optional<uint64_t> parent, std::span<const uint32_t> tokens,
              Place place, std::string_view cache_salt);
  // Its last copy there is gone. Children come before parents where both go.
  void removed(uint64_t hash, Place place);
  // Nothing is left at that medium. Told at once.
  void cleared(KvMedium medium);
  // Publishes what came since the last call; call it after each step.
  void end_step();

  // What the prefix tree and the tiers tell, in those words. Pages of the remote tier are not
  // announced: they are no worker's own.
  void pages_stored(const cache::StoredPages& pages) override;
  void pages_removed(const cache::RemovedPages& pages) override;
  void all_cleared(cache::Medium medium) override;

  // Blocks that subscribers know, once per group and medium.
  int64_t blocks() const { return blocks_; }

 private:
  struct Block {
    std::optional<uint64_t> parent;
    int64_t depth = 0;  // blocks before it
    uint8_t media = 0;  // bit m: stored at medium m
    std::vector<uint32_t> tokens;
    std::string cache_salt;
  };
  struct Group {
    KvGroupKind kind;
    std::unordered_map<uint64_t, Block> blocks;
  };

  Group& group(const Place& place);
  void add_stored(uint64_t hash, const Block& block, KvMedium medium, const KvGroupKind& kind);
  void add_removed(uint64_t hash, KvMedium medium, const KvGroupKind& kind);
  void join_windows();
  void tell_all();

  KvEventPublisher& publisher_;
  int block_size_;
  std::vector<Group> groups_;  // what subscribers that missed nothing know
  std::vector<KvEvent> pending_;
  // Stored pages of window groups: told after the others, as only full attention has every parent.
  std::vector<KvEvent> windows_;
  int64_t blocks_ = 0;
  bool lost_ = false;  // a batch was dropped: they know something else
};

}  // namespace kvant::serve
