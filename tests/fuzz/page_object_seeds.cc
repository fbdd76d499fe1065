// Writes stored pages of every cache that fuzz_page_object imports into.
//
// Usage: seeds_page_object FOLDER
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "kvant/cache/page_object.h"
#include "tests/fuzz/page_object_caches.h"

namespace {

using namespace kvant;

Status write_seeds(const std::string& folder) {
  HostMemory memory;
  for (const fuzz::ImportCache& from : fuzz::make_import_caches(memory)) {
    std::vector<uint32_t> ids(static_cast<size_t>(from.kv->config().page_tokens));
    std::iota(ids.begin(), ids.end(), 100u);
    cache::KvCache::PageIdentity identity{};
    std::memset(identity.key, 1, sizeof(identity.key));
    identity.token_ids = ids;
    for (const int64_t page : {0, 1}) {
      KVANT_ASSIGN(const auto object, from.kv->export_page(from.two_pages, 0, page, identity));
      const std::string name = std::string(from.name) + "-" + std::to_string(page);
      KVANT_TRY(cache::save_page_file(folder + "/" + name, object));
    }
  }
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
