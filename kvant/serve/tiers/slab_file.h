// A file of equal slots, each holding one page object or nothing, that survives a kill at any
// point.
//
// 4 KiB of superblock (magic KVNTSLAB, version, slot bytes, XXH3 of what precedes it), then slots
// of a multiple of 4 KiB. A slot is written payload first and header last, and its header is zeroed
// before it is used again, so that a slot whose header is valid holds what the header says, unless
// the file was damaged: then the payload's checksum says so when it is read. Single-thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/page_object.h"

namespace kvant::serve {

inline constexpr int64_t kSlabAlignment = 4096;
// Slot size for an object, and the reverse limit: an object of 64 MiB is none of ours.
inline constexpr int64_t kMaxSlotBytes = int64_t{64} << 20;
inline int64_t slot_bytes_of(int64_t object_bytes) {
  return (object_bytes + kSlabAlignment - 1) / kSlabAlignment * kSlabAlignment;
}

class SlabFile {
 public:
  // Creates the file, or opens it: kCorruptData if it is not a slab file of slots of this size.
  static Result<SlabFile> open(const std::string& path, int64_t slot_bytes);
  // The slot size that a file says it has; kCorruptData if it is not a slab file.
  static Result<int64_t> read_slot_bytes(const std::string& path);

  SlabFile(SlabFile&& other) noexcept;
  SlabFile& operator=(SlabFile&& other) noexcept;
  ~SlabFile();

  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t num_slots() const { return num_slots_; }  // in the file now; write may add one

  // The header of the object in a slot; kNotFound if it is free, kCorruptData if it is torn.
  Result<cache::PageObjectInfo> read_header(int64_t slot) const;
  // The object, with both checksums verified.
  Result<std::vector<std::byte>> read(int64_t slot) const;
  // `slot` <= num_slots(), free. kResourceExhausted if the disk or a limit is full; the slot is
  // free then.
  Status write(int64_t slot, std::span<const std::byte> object);
  // Frees a slot, and its blocks where the file system can.
  Status erase(int64_t slot);

 private:
  SlabFile() = default;
  int64_t offset(int64_t slot) const { return kSlabAlignment + slot * slot_bytes_; }
  int file_ = -1;
  std::string path_;
  int64_t slot_bytes_ = 0;
  int64_t num_slots_ = 0;
};

}  // namespace kvant::serve
