// Hostile inputs of the tiers, by the first byte: slab files, session files, URLs of remote caches.
#include <unistd.h>
#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvant/serve/tiers/disk_store.h"
#include "kvant/serve/tiers/redis_client.h"
#include "kvant/serve/tiers/session_file.h"

namespace {

using namespace kvant;

constexpr size_t kSlot = 4096;
constexpr size_t kPayloadBytesAt = 16;  // in a page object's header (codecs.md section 5)
constexpr size_t kPayloadHashAt = 136;
constexpr size_t kHeaderHashAt = 144;
constexpr size_t kSuperHashAt = 24;  // in the superblock

const std::string& folder() {
  static const std::string path = [] {
    std::string name =
        std::filesystem::exists("/dev/shm") ? "/dev/shm/fuzz-slab-XXXXXX" : "/tmp/fuzz-slab-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    static std::string kept;
    kept = name;
    std::atexit([] {
      std::error_code error;
      std::filesystem::remove_all(kept, error);
    });
    return name;
  }();
  return path;
}

void put(std::span<uint8_t> bytes, size_t offset, uint64_t value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(value));
}

// Fuzzers do not find checksums: those that the bytes ask for, in every slot.
void make_checksums_valid(std::vector<uint8_t>& file) {
  if (file.size() >= kSuperHashAt + 8)
    put(file, kSuperHashAt, XXH3_64bits(file.data(), kSuperHashAt));
  for (size_t slot = kSlot; slot + cache::kPageObjectHeaderBytes <= file.size(); slot += kSlot) {
    const std::span<uint8_t> bytes = std::span(file).subspan(slot);
    uint64_t payload = 0;
    std::memcpy(&payload, bytes.data() + kPayloadBytesAt, sizeof(payload));
    const size_t room = bytes.size() - cache::kPageObjectHeaderBytes;
    if (payload <= room)
      put(bytes, kPayloadHashAt,
          XXH3_64bits(bytes.data() + cache::kPageObjectHeaderBytes, payload));
    put(bytes, kHeaderHashAt, 0);
    put(bytes, kHeaderHashAt, XXH3_64bits(bytes.data(), cache::kPageObjectHeaderBytes));
  }
}

void fuzz_slab(std::vector<uint8_t> file) {
  const std::string path = folder() + "/pages-4096.slab";
  std::FILE* const out = std::fopen(path.c_str(), "wb");
  if (out == nullptr) std::abort();
  if (!file.empty()) (void)!std::fwrite(file.data(), 1, file.size(), out);
  std::fclose(out);
  int64_t pages = 0;
  {
    const auto store = serve::DiskStore::open(folder(), 16 * kSlot);
    if (!store) __builtin_trap();  // a bad file is no reason not to start
    if ((*store)->usage().bytes > static_cast<int64_t>(16 * kSlot)) __builtin_trap();
    for (const cache::PageObjectHeader& header : (*store)->headers()) {
      const serve::PageName name{header.key, header.layer_group};
      // What is put below may evict others.
      if (!(*store)->contains(name)) continue;
      const auto object = (*store)->get(name);
      if (!object) continue;
      const auto parsed = cache::parse_page_object(**object);
      if (!parsed || parsed->header.key != header.key) __builtin_trap();
      serve::PageName other = name;
      other.key[5] ^= 1;
      if ((*store)->contains(other)) continue;
      if (!(*store)->put(other, *object)) __builtin_trap();
    }
    pages = (*store)->usage().pages;
  }
  // What it holds now is found again, except pages stored under a name that is not their own.
  const auto again = serve::DiskStore::open(folder(), 16 * kSlot);
  if (!again || (*again)->usage().pages > pages) __builtin_trap();
  std::filesystem::remove(path);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const uint8_t kind = data[0] % 4;
  const std::span<const uint8_t> rest(data + 1, size - 1);
  if (kind == 0) {
    fuzz_slab({rest.begin(), rest.end()});
  } else if (kind == 1) {
    std::vector<uint8_t> file(rest.begin(), rest.end());
    make_checksums_valid(file);
    fuzz_slab(std::move(file));
  } else if (kind == 2) {
    const auto objects = serve::split_session(std::as_bytes(rest));
    size_t bytes = 0;
    for (size_t i = 0; objects && i < objects->size(); ++i) bytes += (*objects)[i].size();
    if (objects && bytes != rest.size()) __builtin_trap();
  } else {
    const std::string_view text(reinterpret_cast<const char*>(rest.data()), rest.size());
    const auto url = serve::parse_redis_url(text);
    if (url && url->nodes.empty()) __builtin_trap();
    const int slot = serve::redis_slot(text);
    if (slot < 0 || slot >= 16384) __builtin_trap();
  }
  return 0;
}
