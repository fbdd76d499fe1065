// The stored page object: one closed page of one layer group with everything needed to trust it
// (codecs.md section 5). What disk, remote stores and files hold.
//
// 1,024 bytes of header, little-endian, then the payload: the page's units in planar layout, layer
// after layer, head after head. Thread-safe (pure functions).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/view.h"

namespace kvant::cache {

inline constexpr int64_t kPageObjectHeaderBytes = 1024;
inline constexpr uint32_t kPageObjectVersion = 1;
inline constexpr int kMaxPageTokens = 128;

struct PageObjectHeader {
  std::array<uint8_t, 16> fingerprint{};
  std::array<uint8_t, 32> key{};
  std::array<uint8_t, 32> parent_key{};
  uint32_t page_tokens = 0;
  uint32_t num_tokens = 0;  // tokens held; equal to page_tokens in version 1
  uint32_t layer_group = 0;
  uint32_t first_kv_head = 0;
  uint32_t num_kv_heads = 0;
  Layout layout = Layout::kPlanar;
  uint64_t first_position = 0;
  std::vector<uint32_t> token_ids;  // [num_tokens]
};

struct PageObject {
  PageObjectHeader header;
  std::span<const std::byte> payload;  // into the bytes that were parsed
};

std::vector<std::byte> build_page_object(const PageObjectHeader& header,
                                         std::span<const std::byte> payload);

// Checks magic, version, sizes, both checksums and every field's range: kCorruptData (kUnsupported
// for another version) says which of them is wrong. The bytes must outlive the result.
Result<PageObject> parse_page_object(std::span<const std::byte> bytes);

// The header alone, from the first kPageObjectHeaderBytes bytes: what parse_page_object checks,
// except for the payload.
struct PageObjectInfo {
  PageObjectHeader header;
  uint64_t payload_bytes = 0;
};
Result<PageObjectInfo> parse_page_object_header(std::span<const std::byte> bytes);

// ---- files ----

// Written beside `path` and renamed, so that a reader sees the whole object or none; kIoError for a
// full disk or a path that cannot be written.
Status save_page_file(const std::string& path, std::span<const std::byte> object);
// The bytes of a page file, checked as parse_page_object does.
Result<std::vector<std::byte>> load_page_file(const std::string& path);

}  // namespace kvant::cache
