// What a worker tells routers about its prefix cache: vLLM's KV events (the protocol that llm-d,
// Dynamo, Mooncake Conductor and AIBrix read), as values.
//
// A "block" of the protocol is a closed page of kvant; block_size is page_tokens. Facts and
// sources: docs/kv-events.md. Plain values, thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace kvant::serve {

// Where a block lies, in the protocol's words. The engine's own tier is "GPU" whatever the machine
// is: routers weigh by that word, not by the hardware. Pages in a store that several workers share
// are nobody's, and are not announced.
enum class KvMedium : uint8_t { kDevice, kHost, kDisk };
inline constexpr int kNumKvMedia = 3;
// "GPU", "CPU", "DISK".
const char* kv_medium_name(KvMedium medium);

// The attention of the layers that a block belongs to.
struct KvGroupKind {
  std::optional<int> group_idx;  // set for models with several groups
  int sliding_window = 0;        // tokens; 0: full attention
};

// One or more consecutive blocks became full and reusable at `medium`.
struct BlockStored {
  std::vector<uint64_t> block_hashes;         // a parent before its child; none is 0; no repeats
  std::optional<uint64_t> parent_block_hash;  // of the first; absent: it begins a sequence
  std::vector<uint32_t> token_ids;            // [block_hashes.size() * block_size]
  int block_size = 0;
  KvMedium medium = KvMedium::kDevice;
  KvGroupKind group;
  std::string cache_salt;  // in extra_keys of the first block of a sequence; empty: none
};

// The last copies of these blocks at `medium` are gone.
struct BlockRemoved {
  std::vector<uint64_t> block_hashes;
  KvMedium medium = KvMedium::kDevice;
  KvGroupKind group;
};

// Nothing is cached, at any medium: at start-up and after a reset.
struct AllBlocksCleared {};

using KvEvent = std::variant<BlockStored, BlockRemoved, AllBlocksCleared>;

// The events of one engine step.
struct KvEventBatch {
  double timestamp = 0;  // seconds since 1970
  std::vector<KvEvent> events;
  int data_parallel_rank = 0;
};

// Inner events as maps (vLLM since mid-2026) or as positional arrays (before; AIBrix). The batch
// itself is an array in both.
enum class KvEventEncoding : uint8_t { kMap, kArray };

// The payload frame: msgpack of [timestamp, events, rank]. Hashes are always nine bytes (0xCF and
// 64 bits), since some readers refuse whole batches with narrower ones; the rank is always an int.
std::string encode_kv_events(const KvEventBatch& batch, KvEventEncoding encoding);

}  // namespace kvant::serve
