// A file mapped read-only into memory. Used for weights, plans and page files.
//
// The mapping stays valid until the object is destroyed. Reading past the end of a file that
// someone truncates meanwhile raises SIGBUS, as for every mapping: models must not be edited while
// in use.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "kvant/base/result.h"

namespace kvant {

class MappedFile {
 public:
  // kNotFound, kIoError, or kCorruptData for an empty file; each names the path.
  static Result<MappedFile> open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

  // Takes the pages that lie wholly inside `part` of bytes() out of this process's resident memory.
  // The next access finds them in the system's file cache or reads them again.
  void drop_pages(std::span<const std::byte> part) const;

 private:
  MappedFile() = default;
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kvant
