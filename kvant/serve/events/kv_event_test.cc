// Golden bytes of both encodings, made by another msgpack library: testing/kv_event_golden.py.
#include "kvant/serve/events/kv_event.h"

#include <gtest/gtest.h>

#include <string>

namespace kvant::serve {
namespace {

constexpr uint64_t kA = 0x1122334455667788, kB = 0xFFEEDDCCBBAA9988, kParent = 0x8000000000000001;

constexpr const char* kGoldenMap =
    "93cb3ff80000000000009581a474797065b0416c6c426c6f636b73436c656172656489a474797065ab426c6f"
    "636b53746f726564ac626c6f636b5f68617368657392cf1122334455667788cfffeeddccbbaa9988b1706172"
    "656e745f626c6f636b5f68617368cf8000000000000001a9746f6b656e5f6964739401ccc8cd012cce000111"
    "70aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0"
    "b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e8ca474797065ab426c6f"
    "636b53746f726564ac626c6f636b5f68617368657392cf1122334455667788cfffeeddccbbaa9988b1706172"
    "656e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401ccc8cd012cce00011170aa626c6f636b5f"
    "73697a6502a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c0aa65787472615f6b"
    "6579739291a473616c74c0a967726f75705f69647801b26b765f63616368655f737065635f6b696e64ae736c"
    "6964696e675f77696e646f77bc6b765f63616368655f737065635f736c6964696e675f77696e646f77cd0200"
    "83a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391cfffeeddccbbaa9988a66d"
    "656469756da44449534b84a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391cf"
    "1122334455667788a66d656469756da3475055a967726f75705f6964780103";

constexpr const char* kGoldenArray =
    "93cb3ff80000000000009591b0416c6c426c6f636b73436c656172656497ab426c6f636b53746f72656492cf"
    "1122334455667788cfffeeddccbbaa9988cf80000000000000019401ccc8cd012cce0001117002c0a3475055"
    "9cab426c6f636b53746f72656492cf1122334455667788cfffeeddccbbaa9988c09401ccc8cd012cce000111"
    "7002c0a3435055c09291a473616c74c001ae736c6964696e675f77696e646f77cd020093ac426c6f636b5265"
    "6d6f76656491cfffeeddccbbaa9988a44449534b94ac426c6f636b52656d6f76656491cf1122334455667788"
    "a34750550103";

std::string hex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

KvEventBatch golden_batch() {
  KvEventBatch batch{.timestamp = 1.5, .events = {}, .data_parallel_rank = 3};
  BlockStored plain{.block_hashes = {kA, kB},
                    .parent_block_hash = kParent,
                    .token_ids = {1, 200, 300, 70000},
                    .block_size = 2,
                    .medium = KvMedium::kDevice,
                    .group = {},
                    .cache_salt = ""};
  BlockStored rich = plain;
  rich.parent_block_hash.reset();
  rich.medium = KvMedium::kHost;
  rich.group = {.group_idx = 1, .sliding_window = 512};
  rich.cache_salt = "salt";
  batch.events = {
      AllBlocksCleared{}, plain, rich,
      BlockRemoved{.block_hashes = {kB}, .medium = KvMedium::kDisk, .group = {}},
      BlockRemoved{.block_hashes = {kA}, .medium = KvMedium::kDevice, .group = {.group_idx = 1}}};
  return batch;
}

TEST(KvEvent, MapsHaveGoldenBytes) {
  EXPECT_EQ(hex(encode_kv_events(golden_batch(), KvEventEncoding::kMap)), kGoldenMap);
}

TEST(KvEvent, ArraysHaveGoldenBytes) {
  EXPECT_EQ(hex(encode_kv_events(golden_batch(), KvEventEncoding::kArray)), kGoldenArray);
}

// A hash that would fit a byte still takes nine: llm-d refuses the whole batch otherwise.
TEST(KvEvent, SmallHashesTakeNineBytes) {
  for (const KvEventEncoding encoding : {KvEventEncoding::kMap, KvEventEncoding::kArray}) {
    const KvEventBatch batch{
        .timestamp = 0,
        .events = {BlockStored{.block_hashes = {7},
                               .parent_block_hash = 5,
                               .token_ids = {9},
                               .block_size = 1,
                               .medium = KvMedium::kDevice,
                               .group = {},
                               .cache_salt = ""},
                   BlockRemoved{.block_hashes = {6}, .medium = KvMedium::kDevice, .group = {}}},
        .data_parallel_rank = 0};
    const std::string bytes = hex(encode_kv_events(batch, encoding));
    for (const char* hash :
         {"91cf0000000000000007", "cf0000000000000005", "91cf0000000000000006"}) {
      EXPECT_NE(bytes.find(hash), std::string::npos) << hash << " in " << bytes;
    }
    EXPECT_EQ(bytes.substr(bytes.size() - 2), "00");  // the rank is an int, never nil
  }
}

// A salt names a tenant once, at the block that begins the sequence.
TEST(KvEvent, SaltOnlyAtTheStartOfASequence) {
  BlockStored event{.block_hashes = {kA},
                    .parent_block_hash = kParent,
                    .token_ids = {9},
                    .block_size = 1,
                    .medium = KvMedium::kDevice,
                    .group = {},
                    .cache_salt = "secret"};
  KvEventBatch batch{.timestamp = 0, .events = {event}, .data_parallel_rank = 0};
  EXPECT_EQ(encode_kv_events(batch, KvEventEncoding::kMap).find("secret"), std::string::npos);
  event.parent_block_hash.reset();
  batch.events = {event};
  EXPECT_NE(encode_kv_events(batch, KvEventEncoding::kMap).find("secret"), std::string::npos);
}

}  // namespace
}  // namespace kvant::serve
