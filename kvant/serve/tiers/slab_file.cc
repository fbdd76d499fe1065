#include "kvant/serve/tiers/slab_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace kvant::serve {

namespace {

constexpr char kMagic[8] = {'K', 'V', 'N', 'T', 'S', 'L', 'A', 'B'};
constexpr uint32_t kVersion = 1;

struct Superblock {
  char magic[8];
  uint32_t version;
  uint32_t reserved;
  uint64_t slot_bytes;
  uint64_t xxh3_64;  // of what precedes it
};

uint64_t checksum(const Superblock& block) {
  return XXH3_64bits(&block, offsetof(Superblock, xxh3_64));
}

Error io_error(const std::string& path, const std::string& what) {
  const int error = errno;
  const bool full = error == ENOSPC || error == EFBIG || error == EDQUOT;
  return Error(full ? ErrorCode::kResourceExhausted : ErrorCode::kIoError,
               path + ": " + what + ": " + std::strerror(error));
}

Error corrupt(const std::string& path, const std::string& what) {
  return Error(ErrorCode::kCorruptData,
               path + ": not a usable slab file: " + what + "; remove it to begin anew");
}

// All of it or an error.
Status write_at(int file, const std::string& path, std::span<const std::byte> bytes,
                int64_t offset) {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(file, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (n == 0) errno = ENOSPC;
      return io_error(path, "cannot write");
    }
    bytes = bytes.subspan(n);
    offset += n;
  }
  return {};
}

// Bytes beyond the end of the file read as zero.
Status read_at(int file, const std::string& path, std::span<std::byte> bytes, int64_t offset) {
  while (!bytes.empty()) {
    const ssize_t n = ::pread(file, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return io_error(path, "cannot read");
    if (n == 0) {
      std::ranges::fill(bytes, std::byte{0});
      return {};
    }
    bytes = bytes.subspan(n);
    offset += n;
  }
  return {};
}

Result<Superblock> parse_superblock(const std::string& path, std::span<const std::byte> bytes) {
  Superblock block;
  std::memcpy(&block, bytes.data(), sizeof(block));
  if (std::memcmp(block.magic, kMagic, sizeof(kMagic)) != 0)
    return corrupt(path, "it does not begin with KVNTSLAB");
  if (block.version != kVersion)
    return corrupt(path, "its version is " + std::to_string(block.version) + ", this build reads " +
                             std::to_string(kVersion));
  if (block.xxh3_64 != checksum(block)) return corrupt(path, "its checksum does not match");
  const int64_t slot = static_cast<int64_t>(block.slot_bytes);
  if (slot < kSlabAlignment || slot > kMaxSlotBytes || slot % kSlabAlignment != 0)
    return corrupt(path, "its slots have " + std::to_string(block.slot_bytes) + " bytes");
  return block;
}

}  // namespace

SlabFile::SlabFile(SlabFile&& other) noexcept {
  *this = std::move(other);
}

SlabFile& SlabFile::operator=(SlabFile&& other) noexcept {
  std::swap(file_, other.file_);
  std::swap(path_, other.path_);
  std::swap(slot_bytes_, other.slot_bytes_);
  std::swap(num_slots_, other.num_slots_);
  return *this;
}

SlabFile::~SlabFile() {
  if (file_ >= 0) ::close(file_);
}

Result<int64_t> SlabFile::read_slot_bytes(const std::string& path) {
  SlabFile slab;
  slab.file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (slab.file_ < 0) return io_error(path, "cannot open");
  std::array<std::byte, sizeof(Superblock)> bytes{};
  KVANT_TRY(read_at(slab.file_, path, bytes, 0));
  KVANT_ASSIGN(const Superblock block, parse_superblock(path, bytes));
  return static_cast<int64_t>(block.slot_bytes);
}

Result<SlabFile> SlabFile::open(const std::string& path, int64_t slot_bytes) {
  SlabFile slab;
  slab.path_ = path;
  slab.slot_bytes_ = slot_bytes;
  slab.file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (slab.file_ < 0) return io_error(path, "cannot open");
  struct stat status;
  if (::fstat(slab.file_, &status) != 0) return io_error(path, "cannot stat");
  // A kill while the superblock was written leaves a file without slots.
  if (status.st_size < kSlabAlignment) {
    Superblock block{};
    std::memcpy(block.magic, kMagic, sizeof(kMagic));
    block.version = kVersion;
    block.slot_bytes = static_cast<uint64_t>(slot_bytes);
    block.xxh3_64 = checksum(block);
    std::array<std::byte, kSlabAlignment> bytes{};
    std::memcpy(bytes.data(), &block, sizeof(block));
    KVANT_TRY(write_at(slab.file_, path, bytes, 0));
    return slab;
  }
  std::array<std::byte, sizeof(Superblock)> bytes{};
  KVANT_TRY(read_at(slab.file_, path, bytes, 0));
  KVANT_ASSIGN(const Superblock block, parse_superblock(path, bytes));
  if (static_cast<int64_t>(block.slot_bytes) != slot_bytes)
    return corrupt(path, "its slots have " + std::to_string(block.slot_bytes) + " bytes, not " +
                             std::to_string(slot_bytes));
  slab.num_slots_ =
      (static_cast<int64_t>(status.st_size) - kSlabAlignment + slot_bytes - 1) / slot_bytes;
  return slab;
}

Result<cache::PageObjectInfo> SlabFile::read_header(int64_t slot) const {
  std::array<std::byte, cache::kPageObjectHeaderBytes> bytes;
  KVANT_TRY(read_at(file_, path_, bytes, offset(slot)));
  if (std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; }))
    return Error(ErrorCode::kNotFound, "the slot is free");
  KVANT_ASSIGN(cache::PageObjectInfo info, cache::parse_page_object_header(bytes));
  const uint64_t room = static_cast<uint64_t>(slot_bytes_ - cache::kPageObjectHeaderBytes);
  if (info.payload_bytes > room)
    return corrupt(path_, "an object of " + std::to_string(info.payload_bytes) +
                              " bytes of payload in slots of " + std::to_string(slot_bytes_));
  return info;
}

Result<std::vector<std::byte>> SlabFile::read(int64_t slot) const {
  KVANT_ASSIGN(const cache::PageObjectInfo info, read_header(slot));
  std::vector<std::byte> object(cache::kPageObjectHeaderBytes + info.payload_bytes);
  KVANT_TRY(read_at(file_, path_, object, offset(slot)));
  const auto parsed = cache::parse_page_object(object);
  if (!parsed) return parsed.error().with_context(path_);
  return object;
}

Status SlabFile::write(int64_t slot, std::span<const std::byte> object) {
  const auto header = object.first(cache::kPageObjectHeaderBytes);
  const auto payload = object.subspan(header.size());
  const int64_t begin = offset(slot);
  Status written = write_at(file_, path_, payload, begin + static_cast<int64_t>(header.size()));
  if (written) written = write_at(file_, path_, header, begin);
  if (!written) {
    // A header of which a part was written is not valid; zeros say that nothing was meant.
    if (slot < num_slots_)
      (void)erase(slot);
    else
      (void)!::ftruncate(file_, begin);
    return written;
  }
  num_slots_ = std::max(num_slots_, slot + 1);
  return {};
}

Status SlabFile::erase(int64_t slot) {
  const std::array<std::byte, cache::kPageObjectHeaderBytes> zeros{};
  KVANT_TRY(write_at(file_, path_, zeros, offset(slot)));
  // Not every file system can; the slot is free all the same.
  (void)::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset(slot), slot_bytes_);
  return {};
}

}  // namespace kvant::serve
