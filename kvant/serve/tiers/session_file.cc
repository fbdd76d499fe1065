#include "kvant/serve/tiers/session_file.h"

#include <algorithm>

#include "kvant/base/mapped_file.h"
#include "kvant/cache/fingerprint.h"
#include "kvant/cache/page_object.h"

namespace kvant::serve {

using cache::PageKey;

Result<int64_t> save_session(const std::string& path, const cache::KvCache& cache,
                             cache::SequenceId id, std::span<const int32_t> tokens,
                             std::string_view salt) {
  const int64_t t = cache.config().page_tokens;
  const int64_t pages = cache.length(id) / t;
  if (static_cast<int64_t>(tokens.size()) < pages * t) {
    return Error(ErrorCode::kInvalidArgument, std::to_string(tokens.size()) +
                                                  " tokens were given for a sequence of " +
                                                  std::to_string(cache.length(id)));
  }
  if (pages == 0) {
    return Error(ErrorCode::kInvalidArgument,
                 "the session has no closed page yet: its " + std::to_string(cache.length(id)) +
                     " tokens are all in the open one, which is recomputed");
  }
  std::vector<std::byte> file;
  PageKey parent{};
  for (int64_t page = 0; page < pages; ++page) {
    const auto ids = tokens.subspan(page * t, t);
    const std::vector<uint32_t> page_ids(ids.begin(), ids.end());
    const PageKey key = cache::page_key(parent, cache.fingerprint(), salt, page_ids);
    cache::KvCache::PageIdentity identity{};
    std::ranges::copy(key, identity.key);
    std::ranges::copy(parent, identity.parent_key);
    identity.token_ids = page_ids;
    for (int g = 0; g < cache.num_groups(); ++g) {
      // Behind the window nothing is left, and nothing of it is read.
      if (page < cache.first_needed_page(g, pages)) continue;
      KVANT_ASSIGN(const std::vector<std::byte> object, cache.export_page(id, g, page, identity));
      file.insert(file.end(), object.begin(), object.end());
    }
    parent = key;
  }
  KVANT_TRY(cache::save_page_file(path, file));
  return pages * t;
}

Result<std::vector<std::span<const std::byte>>> split_session(std::span<const std::byte> bytes) {
  std::vector<std::span<const std::byte>> objects;
  while (!bytes.empty()) {
    const std::string where = "page object " + std::to_string(objects.size()) + " of the session";
    const auto info = cache::parse_page_object_header(bytes);
    if (!info) return info.error().with_context(where);
    const uint64_t room = bytes.size() - cache::kPageObjectHeaderBytes;
    if (info->payload_bytes > room) {
      return Error(ErrorCode::kCorruptData,
                   where + ": its payload should have " + std::to_string(info->payload_bytes) +
                       " bytes, the file ends after " + std::to_string(room));
    }
    const auto object = bytes.first(cache::kPageObjectHeaderBytes + info->payload_bytes);
    const auto parsed = cache::parse_page_object(object);
    if (!parsed) return parsed.error().with_context(where);
    objects.push_back(object);
    bytes = bytes.subspan(object.size());
  }
  return objects;
}

namespace {

Result<std::vector<int32_t>> fill(cache::KvCache& cache, cache::SequenceId id,
                                  std::span<const std::span<const std::byte>> objects,
                                  std::string_view salt) {
  const uint32_t t = static_cast<uint32_t>(cache.config().page_tokens);
  const int64_t longest = cache.config().max_sequence_tokens;
  const auto room = static_cast<size_t>(longest > 0 ? longest : cache.config().max_tokens);
  std::vector<int32_t> tokens;
  PageKey parent{};
  size_t next = 0;
  while (next < objects.size()) {
    const size_t first = next;
    std::vector<std::span<const std::byte>> page(cache.num_groups());
    std::vector<uint32_t> ids;
    PageKey key{};
    while (next < objects.size()) {
      KVANT_ASSIGN(const cache::PageObject object, cache::parse_page_object(objects[next]));
      const cache::PageObjectHeader& header = object.header;
      if (!std::ranges::equal(header.fingerprint, cache.fingerprint())) {
        return Error(ErrorCode::kInvalidArgument,
                     "the session was made by another model, or with other weights, another cache "
                     "format, plan or page size; only the same can go on from it");
      }
      if (header.first_position != tokens.size() || header.layer_group >= page.size()) break;
      if (header.num_tokens != t || (next > first && header.key != key)) break;
      page[header.layer_group] = objects[next];
      ids = header.token_ids;
      key = header.key;
      ++next;
    }
    const std::string where = "page " + std::to_string(tokens.size() / t) + " of the session";
    if (next == first) {
      return Error(ErrorCode::kInvalidArgument,
                   where + " is missing, or was made with another page size or model");
    }
    if (tokens.size() + t > room) {
      return Error(ErrorCode::kResourceExhausted,
                   "the session has more tokens than the " + std::to_string(room) +
                       " that a sequence may have here; raise the context");
    }
    if (key != cache::page_key(parent, cache.fingerprint(), salt, ids)) {
      return Error(ErrorCode::kInvalidArgument,
                   where +
                       ": its key is another one: it was made with another salt, or is not the "
                       "next page");
    }
    const Status imported = cache.import_page(id, page);
    if (!imported) return imported.error().with_context(where);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    parent = key;
  }
  return tokens;
}

}  // namespace

Result<std::vector<int32_t>> restore_session(const std::string& path, cache::KvCache& cache,
                                             cache::SequenceId id, std::string_view salt) {
  if (cache.length(id) != 0)
    return Error(ErrorCode::kInvalidArgument, "a session is restored into an empty sequence");
  KVANT_ASSIGN(const MappedFile file, MappedFile::open(path));
  const auto objects = split_session(file.bytes());
  if (!objects) return objects.error().with_context(path);
  auto tokens = fill(cache, id, *objects, salt);
  if (tokens) return tokens;
  KVANT_TRY(cache.truncate(id, 0));
  return tokens.error().with_context(path);
}

}  // namespace kvant::serve
