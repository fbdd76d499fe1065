// Slab files, a session and URLs for fuzz_tiers to start from.
//
// Usage: seeds_tiers FOLDER
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "kvant/cache/page_object.h"
#include "kvant/serve/tiers/disk_store.h"

namespace {

using namespace kvant;

std::vector<std::byte> small_object(uint8_t number) {
  cache::PageObjectHeader header;
  header.key[0] = number;
  header.page_tokens = header.num_tokens = 16;
  header.num_kv_heads = 1;
  header.first_position = 16 * number;
  header.token_ids.assign(16, number);
  return cache::build_page_object(header, std::vector<std::byte>(600, std::byte{number}));
}

void write(const std::string& path, char kind, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.put(kind);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

Status write_seeds(const std::string& folder) {
  const std::string work = folder + "/work";
  {
    KVANT_ASSIGN(const auto store, serve::DiskStore::open(work, 1 << 20));
    for (uint8_t i = 0; i < 3; ++i) {
      const auto object = std::make_shared<const std::vector<std::byte>>(small_object(i));
      const auto parsed = cache::parse_page_object(*object);
      KVANT_ASSIGN(const auto put, store->put({parsed->header.key, 0}, object));
      (void)put;
    }
  }
  std::vector<char> slab;
  {
    std::ifstream file(work + "/pages-4096.slab", std::ios::binary);
    slab.assign(std::istreambuf_iterator<char>(file), {});
  }
  std::filesystem::remove_all(work);
  std::vector<char> session;
  for (uint8_t i = 0; i < 2; ++i) {
    for (const std::byte byte : small_object(i)) session.push_back(static_cast<char>(byte));
  }
  const std::string url = "redis://joe:secret@10.0.0.1:7000,[::1]:7001/2";
  write(folder + "/slab", 0, slab);
  write(folder + "/slab-checksums", 1, slab);
  write(folder + "/session", 2, session);
  write(folder + "/url", 3, {url.begin(), url.end()});
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 64;
  }
  const Status written = write_seeds(argv[1]);
  if (!written) std::fprintf(stderr, "%s: %s\n", argv[0], written.error().message().c_str());
  return written ? 0 : 74;
}
