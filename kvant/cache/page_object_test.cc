#include "kvant/cache/page_object.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kvant/cache/fingerprint.h"
#include "kvant/cache/testing/cache_harness.h"

namespace kvant::cache {
namespace {

using testing::CacheHarness;
using testing::random_tokens;

PageObjectHeader header_of(uint32_t page_tokens) {
  PageObjectHeader header;
  for (size_t i = 0; i < header.fingerprint.size(); ++i)
    header.fingerprint[i] = static_cast<uint8_t>(i + 1);
  for (size_t i = 0; i < header.key.size(); ++i) {
    header.key[i] = static_cast<uint8_t>(i + 50);
    header.parent_key[i] = static_cast<uint8_t>(i + 100);
  }
  header.page_tokens = header.num_tokens = page_tokens;
  header.layer_group = 1;
  header.num_kv_heads = 3;
  header.first_position = 5 * page_tokens;
  for (uint32_t i = 0; i < page_tokens; ++i) header.token_ids.push_back(1000 + i);
  return header;
}

std::vector<std::byte> payload_of(size_t bytes) {
  std::vector<std::byte> payload(bytes);
  uint64_t seed = 9;
  for (std::byte& byte : payload) byte = static_cast<std::byte>(testing::next_random(seed) >> 56);
  return payload;
}

TEST(PageObject, WhatIsBuiltIsWhatIsParsed) {
  for (const uint32_t page_tokens : {16u, 32u, 64u, 128u}) {
    const PageObjectHeader header = header_of(page_tokens);
    const std::vector<std::byte> payload = payload_of(4096);
    const std::vector<std::byte> object = build_page_object(header, payload);
    ASSERT_EQ(object.size(), 1024u + 4096u);
    const auto parsed = parse_page_object(object);
    ASSERT_TRUE(parsed.has_value()) << parsed.error().message();
    EXPECT_EQ(parsed->header.fingerprint, header.fingerprint);
    EXPECT_EQ(parsed->header.key, header.key);
    EXPECT_EQ(parsed->header.parent_key, header.parent_key);
    EXPECT_EQ(parsed->header.page_tokens, page_tokens);
    EXPECT_EQ(parsed->header.layer_group, 1u);
    EXPECT_EQ(parsed->header.num_kv_heads, 3u);
    EXPECT_EQ(parsed->header.first_position, 5u * page_tokens);
    EXPECT_EQ(parsed->header.token_ids, header.token_ids);
    ASSERT_EQ(parsed->payload.size(), payload.size());
    EXPECT_EQ(std::memcmp(parsed->payload.data(), payload.data(), payload.size()), 0);
  }
}

// Offsets that other programs rely on (codecs.md section 5).
TEST(PageObject, HeaderFieldsLieWhereTheSpecificationSays) {
  const std::vector<std::byte> object = build_page_object(header_of(16), payload_of(128));
  const auto u32 = [&](size_t offset) {
    uint32_t value;
    std::memcpy(&value, object.data() + offset, 4);
    return value;
  };
  EXPECT_EQ(std::memcmp(object.data(), "KVNTPAGE", 8), 0);
  EXPECT_EQ(u32(8), 1u);                             // version
  EXPECT_EQ(u32(12), 1024u);                         // header_bytes
  EXPECT_EQ(u32(16), 128u);                          // payload_bytes
  EXPECT_EQ(std::to_integer<int>(object[24]), 1);    // fingerprint
  EXPECT_EQ(std::to_integer<int>(object[40]), 50);   // key
  EXPECT_EQ(std::to_integer<int>(object[72]), 100);  // parent key
  EXPECT_EQ(u32(104), 16u);                          // page_tokens
  EXPECT_EQ(u32(108), 16u);                          // num_tokens
  EXPECT_EQ(u32(112), 1u);                           // layer_group
  EXPECT_EQ(u32(116), 0u);                           // first_kv_head
  EXPECT_EQ(u32(120), 3u);                           // num_kv_heads
  EXPECT_EQ(u32(124), 0u);                           // layout
  EXPECT_EQ(u32(128), 80u);                          // first_position
  EXPECT_EQ(u32(152), 1000u);                        // token_ids
}

TEST(PageObject, EveryFlippedBitAndEveryTruncationIsNoticed) {
  const std::vector<std::byte> object = build_page_object(header_of(16), payload_of(256));
  for (size_t bit = 0; bit < object.size() * 8; ++bit) {
    std::vector<std::byte> broken = object;
    broken[bit / 8] ^= std::byte{1} << (bit % 8);
    const auto parsed = parse_page_object(broken);
    ASSERT_FALSE(parsed.has_value()) << "bit " << bit;
    ASSERT_FALSE(parsed.error().message().empty());
  }
  for (size_t size = 0; size < object.size(); ++size)
    ASSERT_FALSE(parse_page_object(std::span(object).first(size)).has_value()) << size;
  std::vector<std::byte> longer = object;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(parse_page_object(longer).has_value());
}

TEST(PageObject, ErrorsSayWhatIsWrong) {
  const std::vector<std::byte> object = build_page_object(header_of(16), payload_of(256));
  const auto message = [&](size_t offset, uint8_t value) {
    std::vector<std::byte> broken = object;
    broken[offset] = std::byte{value};
    const auto parsed = parse_page_object(broken);
    return parsed ? std::string() : parsed.error().message();
  };
  EXPECT_NE(message(0, 'X').find("KVNTPAGE"), std::string::npos);
  EXPECT_NE(message(8, 9).find("version 9"), std::string::npos);
  EXPECT_NE(message(200, 9).find("header's checksum"), std::string::npos);
  EXPECT_NE(message(1024, static_cast<uint8_t>(~std::to_integer<int>(object[1024])))
                .find("payload's checksum"),
            std::string::npos);
  EXPECT_NE(parse_page_object(std::span(object).first(1100)).error().message().find("payload"),
            std::string::npos);
}

// Known answer: SHA-256 over 32 zero bytes, 16 zero bytes, "tenant" and the ids 1, 2, 3.
TEST(PageObject, KeysAreThoseOfTheSpecification) {
  const std::array<uint8_t, 16> fingerprint{};
  const uint32_t ids[] = {1, 2, 3};
  const PageKey key = page_key(PageKey{}, fingerprint, "tenant", ids);
  std::string hex;
  for (const uint8_t byte : key) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", byte);
    hex += digits;
  }
  EXPECT_EQ(hex, "11314ba3abd7c6f84180b9e6646a91d0cac82edd8e416988198d2a2ac28e3f13");
  EXPECT_NE(page_key(PageKey{}, fingerprint, "other", ids), key);
  EXPECT_NE(page_key(key, fingerprint, "tenant", ids), key);
}

std::string temporary_path(const char* name) {
  return ::testing::TempDir() + name;
}

TEST(PageFile, IsSavedWholeAndLoadedChecked) {
  const std::string path = temporary_path("kvant_page_file_test.page");
  const std::vector<std::byte> object = build_page_object(header_of(32), payload_of(1000));
  ASSERT_TRUE(save_page_file(path, object).has_value());
  const auto loaded = load_page_file(path);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().message();
  EXPECT_TRUE(*loaded == object);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(1500);
  file.put('\x7f');
  file.close();
  const auto broken = load_page_file(path);
  ASSERT_FALSE(broken.has_value());
  EXPECT_EQ(broken.error().code(), ErrorCode::kCorruptData);
  EXPECT_NE(broken.error().message().find(path), std::string::npos);
  std::remove(path.c_str());
  EXPECT_EQ(load_page_file(path).error().code(), ErrorCode::kNotFound);
  EXPECT_EQ(save_page_file("/nonexistent/directory/page", object).error().code(),
            ErrorCode::kIoError);
}

// A file-size limit stands for a full disk: the write fails half-way.
TEST(PageFile, AFullDiskIsAnErrorAndLeavesNothingBehind) {
  const std::string path = temporary_path("kvant_page_file_full.page");
  const std::vector<std::byte> object = build_page_object(header_of(16), payload_of(1 << 16));
  rlimit old_limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{8192, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const Status status = save_page_file(path, object);
  setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, old_handler);
  ASSERT_FALSE(status.has_value());
  EXPECT_EQ(status.error().code(), ErrorCode::kIoError);
  EXPECT_EQ(load_page_file(path).error().code(), ErrorCode::kNotFound);
}

// ---- into and out of a cache ----

CacheConfig config_of(const char* spec) {
  CacheConfig config;
  config.layers = {{.num_kv_heads = 2, .head_dim = 32},
                   {.num_kv_heads = 1, .head_dim = 16, .window = 24}};
  config.format = *formats::parse_cache_format(spec);
  config.page_tokens = 16;
  config.max_tokens = 128;
  config.max_sequences = 2;
  config.max_step_tokens = 64;
  return config;
}

TEST(PageObject, TravelsBetweenCachesOfDifferentLayouts) {
  std::vector<std::vector<std::vector<std::byte>>> objects;
  uint64_t seed = 3;
  const std::vector<uint32_t> tokens = random_tokens(seed, 50);
  for (const Layout layout : {Layout::kCpu, Layout::kSm90, Layout::kPlanar}) {
    CacheConfig config = config_of("4bit");
    config.layout = layout;
    const auto harness = CacheHarness::create(config);
    ASSERT_TRUE(harness.has_value());
    CacheHarness& h = **harness;
    const SequenceId a = *h.add();
    ASSERT_TRUE(h.extend(a, std::span(tokens).first(50)).has_value());
    std::vector<std::vector<std::byte>> pages;
    for (int64_t page = 0; page < 3; ++page) {
      auto exported = h.export_page(a, page);
      ASSERT_TRUE(exported.has_value()) << exported.error().message();
      for (auto& object : *exported) pages.push_back(std::move(object));
    }
    objects.push_back(std::move(pages));
    // What the first layout exported is imported here.
    const SequenceId b = *h.add();
    for (size_t page = 0; page < 3; ++page) {
      const Status status = h.import_page(b, {objects[0][2 * page], objects[0][2 * page + 1]},
                                          std::span(tokens).subspan(page * 16, 16));
      ASSERT_TRUE(status.has_value()) << status.error().message();
    }
    // The harness compares every page that the new tokens read.
    ASSERT_TRUE(h.extend(b, random_tokens(seed, 20)).has_value());
    EXPECT_EQ(h.check(), "");
  }
  EXPECT_TRUE(objects[0] == objects[1]);
  EXPECT_TRUE(objects[0] == objects[2]);
}

TEST(PageObject, AnythingThatDoesNotMatchIsRefusedAndNothingChanges) {
  const auto source = CacheHarness::create(config_of("4bit"));
  uint64_t seed = 4;
  const std::vector<uint32_t> tokens = random_tokens(seed, 32);
  const SequenceId a = *(*source)->add();
  ASSERT_TRUE((*source)->extend(a, tokens).has_value());
  const auto first = *(*source)->export_page(a, 0);
  const auto second = *(*source)->export_page(a, 1);

  const auto refusal = [&](const char* spec, const std::vector<std::vector<std::byte>>& objects) {
    const auto target = CacheHarness::create(config_of(spec));
    const SequenceId id = *(*target)->add();
    const Status status = (*target)->import_page(id, objects, std::span(tokens).first(16));
    EXPECT_EQ((*target)->check(), status ? "" : (*target)->check());
    EXPECT_EQ((*target)->cache().length(id), status ? 16 : 0);
    return status ? std::string() : status.error().message();
  };
  EXPECT_EQ(refusal("4bit", first), "");
  EXPECT_NE(refusal("8bit", first).find("fingerprint"), std::string::npos);
  EXPECT_NE(refusal("4bit", second).find("first_position"), std::string::npos);
  EXPECT_NE(refusal("4bit", {first[1], first[0]}).find("layer_group"), std::string::npos);
  EXPECT_NE(refusal("4bit", {first[0]}).find("layer groups"), std::string::npos);
  auto corrupt = first;
  corrupt[0][2000] ^= std::byte{1};
  EXPECT_NE(refusal("4bit", corrupt).find("checksum"), std::string::npos);
  // A well-formed object with another payload size.
  auto parsed = parse_page_object(first[0]);
  const auto shorter = build_page_object(parsed->header, parsed->payload.first(128));
  EXPECT_NE(refusal("4bit", {shorter, first[1]}).find("payload size"), std::string::npos);
  EXPECT_NE(refusal("4bit", {{}, first[1]}).find("bytes"), std::string::npos);

  KvCache::PageIdentity identity{};
  EXPECT_FALSE((*source)->cache().export_page(a, 0, 0, identity).has_value());  // no token ids
  identity.token_ids = std::span(tokens).first(16);
  EXPECT_FALSE((*source)->cache().export_page(a, 7, 0, identity).has_value());
  EXPECT_FALSE((*source)->cache().export_page(a, 0, 2, identity).has_value());
  EXPECT_FALSE((*source)->cache().export_page(a + 1, 0, 0, identity).has_value());
}

// A window group may lack pages that no later query reads, but not others.
TEST(PageObject, AMissingWindowPageIsNoticedWhenItWouldBeRead) {
  const auto source = CacheHarness::create(config_of("4bit"));
  uint64_t seed = 5;
  const std::vector<uint32_t> tokens = random_tokens(seed, 48);
  const SequenceId a = *(*source)->add();
  std::vector<std::vector<std::vector<std::byte>>> pages;
  for (int64_t page = 0; page < 3; ++page) {
    ASSERT_TRUE((*source)->extend(a, std::span(tokens).subspan(page * 16, 16)).has_value());
    pages.push_back(*(*source)->export_page(a, page));
  }
  for (const size_t missing : {0u, 1u}) {
    const auto target = CacheHarness::create(config_of("4bit"));
    const SequenceId id = *(*target)->add();
    for (size_t page = 0; page < 3; ++page) {
      auto objects = pages[page];
      if (page <= missing) objects[1].clear();
      ASSERT_TRUE((*target)
                      ->import_page(id, objects, std::span(tokens).subspan(page * 16, 16))
                      .has_value());
    }
    EXPECT_EQ((*target)->check(), "");
    // The window of 24 tokens ends in page 1: page 0 may be missing, page 1 may not.
    const Status status = (*target)->extend(id, random_tokens(seed, 4));
    EXPECT_EQ(status.has_value(), missing == 0);
    if (!status) {
      EXPECT_EQ(status.error().code(), ErrorCode::kInvalidArgument);
    }
  }
}

}  // namespace
}  // namespace kvant::cache
