// Memory for many large buffers that are read over and over, packed so that it can lie on huge
// pages.
//
// A page of 4 KiB costs an address translation every 64 cache lines; where a hypervisor translates
// once more, that took a quarter of the time of reading weights. Buffers of their own mapping are
// often too small or too unaligned for a page of 2 MiB, so they share mappings here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvant {

class HugePageArena {
 public:
  HugePageArena() = default;
  ~HugePageArena();
  HugePageArena(const HugePageArena&) = delete;
  HugePageArena& operator=(const HugePageArena&) = delete;

  // Zero-filled memory aligned to 4 KiB, or null if the system refuses it. Buffers from one arena
  // share pages at 2 MiB granularity, so resident memory is at most 2 MiB per 256 MiB above the
  // sum.
  void* allocate(int64_t bytes);
  // Whether this was a buffer of the arena. The system gets the memory back at once, the addresses
  // when no buffer of the same mapping is left.
  bool deallocate(void* pointer, int64_t bytes);

 private:
  struct Mapping {
    std::byte* base = nullptr;    // of what mmap returned
    int64_t mapped = 0;           // bytes from there
    std::byte* next = nullptr;    // where the next buffer goes
    std::byte* usable = nullptr;  // end of what can be read and written
    int64_t buffers = 0;
  };
  bool add_mapping(int64_t bytes);

  std::vector<Mapping> mappings_;
};

}  // namespace kvant
