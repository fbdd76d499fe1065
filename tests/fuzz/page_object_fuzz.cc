// Hostile page objects: parsing, and importing them into caches whose pages they claim to be.
#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "kvant/cache/page_object.h"
#include "tests/fuzz/page_object_caches.h"

namespace {

using namespace kvant;

// Offsets in the header (codecs.md section 5).
constexpr size_t kPayloadBytesAt = 16;
constexpr size_t kFingerprintAt = 24;
constexpr size_t kPayloadHashAt = 136;
constexpr size_t kHeaderHashAt = 144;

const std::vector<fuzz::ImportCache>& caches() {
  static HostMemory memory;
  static const std::vector<fuzz::ImportCache> made = fuzz::make_import_caches(memory);
  return made;
}

void put(std::vector<std::byte>& bytes, size_t offset, uint64_t value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(value));
}

// Fuzzers do not find checksums: the same object with those that its bytes ask for.
std::vector<std::byte> with_valid_checksums(std::span<const std::byte> object) {
  std::vector<std::byte> bytes(object.begin(), object.end());
  if (bytes.size() < cache::kPageObjectHeaderBytes) return bytes;
  const std::span<const std::byte> payload = object.subspan(cache::kPageObjectHeaderBytes);
  put(bytes, kPayloadBytesAt, payload.size());
  put(bytes, kPayloadHashAt, XXH3_64bits(payload.data(), payload.size()));
  put(bytes, kHeaderHashAt, 0);
  put(bytes, kHeaderHashAt, XXH3_64bits(bytes.data(), cache::kPageObjectHeaderBytes));
  return bytes;
}

// Few inputs keep the shape of an object: header fields from the first bytes, payload from the
// rest.
std::vector<std::byte> object_from_fields(std::span<const std::byte> bytes) {
  const auto at = [&](size_t i) {
    return i < bytes.size() ? std::to_integer<uint32_t>(bytes[i]) : 0u;
  };
  const cache::KvCache& kv = *caches()[at(0) % caches().size()].kv;
  cache::PageObjectHeader header;
  std::copy(kv.fingerprint().begin(), kv.fingerprint().end(), header.fingerprint.begin());
  if (at(0) == 255) header.fingerprint[0] ^= 1;
  header.page_tokens = header.num_tokens = 16u << (at(1) % 4);
  header.layer_group = at(2) % 4;
  header.first_kv_head = at(3) % 2;
  header.num_kv_heads = 1 + at(4) % 2;
  header.layout = static_cast<cache::Layout>(at(5) % 3);
  header.first_position = static_cast<uint64_t>(at(6) % 4) * header.page_tokens;
  header.token_ids.resize(header.num_tokens);
  const std::span<const std::byte> rest = bytes.subspan(std::min<size_t>(bytes.size(), 8));
  std::vector<std::byte> payload(rest.begin(), rest.end());
  // Mostly of a size that the cache expects.
  const cache::GroupBytes planned = (*cache::plan_group_bytes(kv.config()))[0];
  if (at(7) < 192) payload.resize(planned.stored_page_bytes);
  if (at(7) >= 192 && at(7) < 255) payload.resize(planned.bf16_page_bytes);
  return cache::build_page_object(header, payload);
}

// The cache whose pages it claims to be, else the first one.
const fuzz::ImportCache& claimed_cache(std::span<const std::byte> object) {
  for (const fuzz::ImportCache& into : caches()) {
    const auto fingerprint = into.kv->fingerprint();
    if (object.size() >= kFingerprintAt + fingerprint.size() &&
        std::memcmp(object.data() + kFingerprintAt, fingerprint.data(), fingerprint.size()) == 0)
      return into;
  }
  return caches()[0];
}

// As page `page` of a sequence.
void import_as(const fuzz::ImportCache& into, int64_t page, std::span<const std::byte> object) {
  cache::KvCache& kv = *into.kv;
  const int64_t t = kv.config().page_tokens;
  const cache::SequenceId id = *kv.fork(into.two_pages);
  if (*kv.truncate(id, page * t) != page * t) std::abort();
  const Status imported = kv.import_page(id, std::span(&object, 1));
  if (kv.length(id) != (imported ? page + 1 : page) * t) std::abort();
  if (imported) {
    // What comes out goes in and comes out the same (hostile bytes in padding do not come out).
    const auto parsed = cache::parse_page_object(object);
    cache::KvCache::PageIdentity identity{};
    identity.token_ids = parsed->header.token_ids;
    const auto out = kv.export_page(id, 0, page, identity);
    if (!out || out->size() != object.size()) std::abort();
    if (*kv.truncate(id, page * t) != page * t) std::abort();
    const std::span<const std::byte> again = *out;
    if (!kv.import_page(id, std::span(&again, 1))) std::abort();
    if (*kv.export_page(id, 0, page, identity) != *out) std::abort();
  }
  kv.remove_sequence(id);
  if (!kv.check_integrity()) std::abort();
}

void import(std::span<const std::byte> object) {
  const fuzz::ImportCache& into = claimed_cache(object);
  for (const int64_t page : {0, 1}) import_as(into, page, object);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const Result<cache::PageObject> parsed = cache::parse_page_object(bytes);
  if (parsed && parsed->header.token_ids.size() != parsed->header.page_tokens) std::abort();
  import(bytes);
  import(with_valid_checksums(bytes));
  import(object_from_fields(bytes));
  return 0;
}
