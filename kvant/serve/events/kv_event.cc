#include "kvant/serve/events/kv_event.h"

#define MSGPACK_NO_BOOST
#include <msgpack.hpp>

#include <array>
#include <string_view>

namespace kvant::serve {
namespace {

using Packer = msgpack::packer<msgpack::sbuffer>;

void pack_text(Packer& packer, std::string_view text) {
  packer.pack_str(static_cast<uint32_t>(text.size()));
  packer.pack_str_body(text.data(), static_cast<uint32_t>(text.size()));
}

void pack_hashes(Packer& packer, const std::vector<uint64_t>& hashes) {
  packer.pack_array(static_cast<uint32_t>(hashes.size()));
  for (const uint64_t hash : hashes) packer.pack_fix_uint64(hash);
}

void pack_tokens(Packer& packer, const std::vector<uint32_t>& tokens) {
  packer.pack_array(static_cast<uint32_t>(tokens.size()));
  for (const uint32_t token : tokens) packer.pack_uint32(token);
}

// One entry a block; the salt belongs to the first block of a sequence only (vLLM's rule).
void pack_extra_keys(Packer& packer, const BlockStored& event) {
  packer.pack_array(static_cast<uint32_t>(event.block_hashes.size()));
  packer.pack_array(1);
  pack_text(packer, event.cache_salt);
  for (size_t i = 1; i < event.block_hashes.size(); ++i) packer.pack_nil();
}

bool has_extra_keys(const BlockStored& event) {
  return !event.cache_salt.empty() && !event.parent_block_hash && !event.block_hashes.empty();
}

std::string_view kind_name(const KvGroupKind& group) {
  return group.sliding_window > 0 ? "sliding_window" : "full_attention";
}

void pack_parent(Packer& packer, const BlockStored& event) {
  if (event.parent_block_hash) {
    packer.pack_fix_uint64(*event.parent_block_hash);
  } else {
    packer.pack_nil();
  }
}

// ---- maps: keys that have no value and that readers default are left out ----

void pack_map(Packer& packer, const BlockStored& event) {
  const bool extra = has_extra_keys(event);
  const bool group = event.group.group_idx.has_value();
  const bool window = event.group.sliding_window > 0;
  packer.pack_map(static_cast<uint32_t>(9 + extra + group + window));
  pack_text(packer, "type");
  pack_text(packer, "BlockStored");
  pack_text(packer, "block_hashes");
  pack_hashes(packer, event.block_hashes);
  pack_text(packer, "parent_block_hash");
  pack_parent(packer, event);
  pack_text(packer, "token_ids");
  pack_tokens(packer, event.token_ids);
  pack_text(packer, "block_size");
  packer.pack_int(event.block_size);
  pack_text(packer, "lora_id");
  packer.pack_nil();
  pack_text(packer, "medium");
  pack_text(packer, kv_medium_name(event.medium));
  pack_text(packer, "lora_name");
  packer.pack_nil();
  if (extra) {
    pack_text(packer, "extra_keys");
    pack_extra_keys(packer, event);
  }
  if (group) {
    pack_text(packer, "group_idx");
    packer.pack_int(*event.group.group_idx);
  }
  pack_text(packer, "kv_cache_spec_kind");
  pack_text(packer, kind_name(event.group));
  if (window) {
    pack_text(packer, "kv_cache_spec_sliding_window");
    packer.pack_int(event.group.sliding_window);
  }
}

void pack_map(Packer& packer, const BlockRemoved& event) {
  const bool group = event.group.group_idx.has_value();
  packer.pack_map(static_cast<uint32_t>(3 + group));
  pack_text(packer, "type");
  pack_text(packer, "BlockRemoved");
  pack_text(packer, "block_hashes");
  pack_hashes(packer, event.block_hashes);
  pack_text(packer, "medium");
  pack_text(packer, kv_medium_name(event.medium));
  if (group) {
    pack_text(packer, "group_idx");
    packer.pack_int(*event.group.group_idx);
  }
}

void pack_map(Packer& packer, const AllBlocksCleared&) {
  packer.pack_map(1);
  pack_text(packer, "type");
  pack_text(packer, "AllBlocksCleared");
}

// ---- arrays: old readers know the first fields only, so trailing ones without news are cut off
// ----

void pack_array(Packer& packer, const BlockStored& event) {
  const bool extra = has_extra_keys(event);
  const bool window = event.group.sliding_window > 0;
  const bool group = event.group.group_idx.has_value() || window;
  const int fields = window ? 12 : group ? 11 : extra ? 9 : 7;
  packer.pack_array(static_cast<uint32_t>(fields));
  pack_text(packer, "BlockStored");
  pack_hashes(packer, event.block_hashes);
  pack_parent(packer, event);
  pack_tokens(packer, event.token_ids);
  packer.pack_int(event.block_size);
  packer.pack_nil();  // lora_id
  pack_text(packer, kv_medium_name(event.medium));
  if (fields < 9) return;
  packer.pack_nil();  // lora_name
  if (extra) {
    pack_extra_keys(packer, event);
  } else {
    packer.pack_nil();
  }
  if (fields < 11) return;
  if (event.group.group_idx) {
    packer.pack_int(*event.group.group_idx);
  } else {
    packer.pack_nil();
  }
  pack_text(packer, kind_name(event.group));
  if (window) packer.pack_int(event.group.sliding_window);
}

void pack_array(Packer& packer, const BlockRemoved& event) {
  const bool group = event.group.group_idx.has_value();
  packer.pack_array(static_cast<uint32_t>(3 + group));
  pack_text(packer, "BlockRemoved");
  pack_hashes(packer, event.block_hashes);
  pack_text(packer, kv_medium_name(event.medium));
  if (group) packer.pack_int(*event.group.group_idx);
}

void pack_array(Packer& packer, const AllBlocksCleared&) {
  packer.pack_array(1);
  pack_text(packer, "AllBlocksCleared");
}

}  // namespace

const char* kv_medium_name(KvMedium medium) {
  static constexpr std::array<const char*, kNumKvMedia> kNames = {"GPU", "CPU", "DISK"};
  return kNames[static_cast<size_t>(medium)];
}

std::string encode_kv_events(const KvEventBatch& batch, KvEventEncoding encoding) {
  msgpack::sbuffer buffer;
  Packer packer(buffer);
  packer.pack_array(3);
  packer.pack_double(batch.timestamp);
  packer.pack_array(static_cast<uint32_t>(batch.events.size()));
  for (const KvEvent& event : batch.events) {
    std::visit(
        [&](const auto& one) {
          if (encoding == KvEventEncoding::kMap) {
            pack_map(packer, one);
          } else {
            pack_array(packer, one);
          }
        },
        event);
  }
  packer.pack_int(batch.data_parallel_rank);
  return std::string(buffer.data(), buffer.size());
}

}  // namespace kvant::serve
