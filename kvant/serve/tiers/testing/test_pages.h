// Small page objects whose content follows from a number, and folders that go away with their test.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "kvant/cache/page_object.h"
#include "kvant/serve/tiers/page_store.h"

namespace kvant::serve::testing {

inline PageName test_name(uint32_t number) {
  PageName name;
  for (size_t i = 0; i < name.key.size(); ++i)
    name.key[i] = static_cast<uint8_t>((number * 2654435761u) >> (8 * (i % 4)) ^ (i * 31));
  name.key[31] = static_cast<uint8_t>(number);
  name.key[30] = static_cast<uint8_t>(number >> 8);
  name.group = number % 2;
  return name;
}

inline ObjectBytes test_object(uint32_t number, size_t payload_bytes = 700) {
  cache::PageObjectHeader header;
  const PageName name = test_name(number);
  header.key = name.key;
  header.layer_group = name.group;
  header.page_tokens = header.num_tokens = 16;
  header.num_kv_heads = 1;
  header.first_position = 16 * (number % 100);
  for (uint32_t i = 0; i < 16; ++i) header.token_ids.push_back(number + i);
  std::vector<std::byte> payload(payload_bytes);
  for (size_t i = 0; i < payload.size(); ++i)
    payload[i] = static_cast<std::byte>(number * 7 + i * 13 + i / 256);
  return std::make_shared<const std::vector<std::byte>>(cache::build_page_object(header, payload));
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvant-tiers-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace kvant::serve::testing
