#include "kvant/cache/page_object.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "kvant/base/check.h"
#include "kvant/base/mapped_file.h"

namespace kvant::cache {

namespace {

constexpr char kMagic[8] = {'K', 'V', 'N', 'T', 'P', 'A', 'G', 'E'};

// The header as it lies in the file.
struct RawHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint64_t payload_bytes;
  uint8_t fingerprint[16];
  uint8_t key[32];
  uint8_t parent_key[32];
  uint32_t page_tokens;
  uint32_t num_tokens;
  uint32_t layer_group;
  uint32_t first_kv_head;
  uint32_t num_kv_heads;
  uint32_t layout;
  uint64_t first_position;
  uint64_t payload_xxh3_64;
  uint64_t header_xxh3_64;  // of the header with this field zero
  uint32_t token_ids[kMaxPageTokens];
  uint8_t rest[360];
};
static_assert(sizeof(RawHeader) == kPageObjectHeaderBytes);

Error corrupt(const std::string& what) {
  return Error(ErrorCode::kCorruptData, "not a usable page object: " + what);
}

uint64_t header_hash(RawHeader raw) {
  raw.header_xxh3_64 = 0;
  return XXH3_64bits(&raw, sizeof(raw));
}

bool is_page_size(uint32_t tokens) {
  return tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128;
}

Status check_fields(const RawHeader& raw) {
  if (!is_page_size(raw.page_tokens))
    return corrupt("page_tokens is " + std::to_string(raw.page_tokens));
  if (raw.num_tokens != raw.page_tokens) {
    return corrupt("it holds " + std::to_string(raw.num_tokens) + " tokens, a closed page holds " +
                   std::to_string(raw.page_tokens));
  }
  if (raw.layout > static_cast<uint32_t>(Layout::kSm90))
    return corrupt("layout " + std::to_string(raw.layout) + " does not exist");
  if (raw.num_kv_heads == 0) return corrupt("it has no KV heads");
  if (raw.first_position % raw.page_tokens != 0)
    return corrupt("first_position is not the start of a page");
  const bool padded = std::all_of(std::begin(raw.rest), std::end(raw.rest),
                                  [](uint8_t byte) { return byte == 0; }) &&
                      std::all_of(raw.token_ids + raw.num_tokens, std::end(raw.token_ids),
                                  [](uint32_t id) { return id == 0; });
  if (!padded) return corrupt("reserved header bytes are not zero");
  return {};
}

// Closes on destruction.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

Error io_error(const std::string& path, const char* doing) {
  return Error(ErrorCode::kIoError,
               path + ": " + doing + ": " + std::generic_category().message(errno));
}

Status write_all(int fd, const std::string& path, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return io_error(path, "cannot write");
    }
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  if (::fsync(fd) != 0 && errno != EINVAL) return io_error(path, "cannot write");
  return {};
}

}  // namespace

std::vector<std::byte> build_page_object(const PageObjectHeader& header,
                                         std::span<const std::byte> payload) {
  KVANT_CHECK(is_page_size(header.page_tokens) && header.num_tokens == header.page_tokens &&
                  header.token_ids.size() == header.num_tokens,
              "page objects hold closed pages with all their token ids");
  RawHeader raw{};
  std::memcpy(raw.magic, kMagic, sizeof(kMagic));
  raw.version = kPageObjectVersion;
  raw.header_bytes = kPageObjectHeaderBytes;
  raw.payload_bytes = payload.size();
  std::memcpy(raw.fingerprint, header.fingerprint.data(), sizeof(raw.fingerprint));
  std::memcpy(raw.key, header.key.data(), sizeof(raw.key));
  std::memcpy(raw.parent_key, header.parent_key.data(), sizeof(raw.parent_key));
  raw.page_tokens = header.page_tokens;
  raw.num_tokens = header.num_tokens;
  raw.layer_group = header.layer_group;
  raw.first_kv_head = header.first_kv_head;
  raw.num_kv_heads = header.num_kv_heads;
  raw.layout = static_cast<uint32_t>(header.layout);
  raw.first_position = header.first_position;
  raw.payload_xxh3_64 = XXH3_64bits(payload.data(), payload.size());
  std::copy(header.token_ids.begin(), header.token_ids.end(), raw.token_ids);
  raw.header_xxh3_64 = header_hash(raw);

  std::vector<std::byte> object(sizeof(raw) + payload.size());
  std::memcpy(object.data(), &raw, sizeof(raw));
  if (!payload.empty()) std::memcpy(object.data() + sizeof(raw), payload.data(), payload.size());
  return object;
}

namespace {

// Everything but the payload.
Result<RawHeader> read_header(std::span<const std::byte> bytes) {
  RawHeader raw;
  if (bytes.size() < sizeof(raw)) {
    return corrupt("it has " + std::to_string(bytes.size()) + " bytes, the header alone has " +
                   std::to_string(sizeof(raw)));
  }
  std::memcpy(&raw, bytes.data(), sizeof(raw));
  if (std::memcmp(raw.magic, kMagic, sizeof(kMagic)) != 0)
    return corrupt("it does not begin with KVNTPAGE");
  if (raw.version != kPageObjectVersion) {
    return Error(ErrorCode::kUnsupported,
                 "page object version " + std::to_string(raw.version) + "; this build reads " +
                     std::to_string(kPageObjectVersion) + ". The page must be recomputed");
  }
  if (raw.header_bytes != kPageObjectHeaderBytes)
    return corrupt("header_bytes is " + std::to_string(raw.header_bytes));
  if (raw.header_xxh3_64 != header_hash(raw))
    return corrupt("the header's checksum does not match");
  KVANT_TRY(check_fields(raw));
  return raw;
}

PageObjectHeader header_of(const RawHeader& raw) {
  PageObjectHeader header;
  std::memcpy(header.fingerprint.data(), raw.fingerprint, sizeof(raw.fingerprint));
  std::memcpy(header.key.data(), raw.key, sizeof(raw.key));
  std::memcpy(header.parent_key.data(), raw.parent_key, sizeof(raw.parent_key));
  header.page_tokens = raw.page_tokens;
  header.num_tokens = raw.num_tokens;
  header.layer_group = raw.layer_group;
  header.first_kv_head = raw.first_kv_head;
  header.num_kv_heads = raw.num_kv_heads;
  header.layout = static_cast<Layout>(raw.layout);
  header.first_position = raw.first_position;
  header.token_ids.assign(raw.token_ids, raw.token_ids + raw.num_tokens);
  return header;
}

}  // namespace

Result<PageObjectInfo> parse_page_object_header(std::span<const std::byte> bytes) {
  KVANT_ASSIGN(const RawHeader raw, read_header(bytes));
  return PageObjectInfo{header_of(raw), raw.payload_bytes};
}

Result<PageObject> parse_page_object(std::span<const std::byte> bytes) {
  KVANT_ASSIGN(const RawHeader raw, read_header(bytes));
  const std::span<const std::byte> payload = bytes.subspan(sizeof(raw));
  if (raw.payload_bytes != payload.size()) {
    return corrupt("the payload should have " + std::to_string(raw.payload_bytes) +
                   " bytes and has " + std::to_string(payload.size()));
  }
  if (raw.payload_xxh3_64 != XXH3_64bits(payload.data(), payload.size()))
    return corrupt("the payload's checksum does not match");
  return PageObject{header_of(raw), payload};
}

Status save_page_file(const std::string& path, std::span<const std::byte> object) {
  const std::string temporary = path + ".tmp" + std::to_string(::getpid());
  Status written;
  {
    const FileDescriptor file(
        ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (file.get() < 0) return io_error(path, "cannot create");
    written = write_all(file.get(), path, object);
  }
  if (written && ::rename(temporary.c_str(), path.c_str()) != 0)
    written = io_error(path, "cannot rename the finished file");
  if (!written) ::unlink(temporary.c_str());
  return written;
}

Result<std::vector<std::byte>> load_page_file(const std::string& path) {
  KVANT_ASSIGN(const MappedFile file, MappedFile::open(path));
  const std::span<const std::byte> bytes = file.bytes();
  const auto object = parse_page_object(bytes);
  if (!object) return object.error().with_context(path);
  return std::vector<std::byte>(bytes.begin(), bytes.end());
}

}  // namespace kvant::cache
