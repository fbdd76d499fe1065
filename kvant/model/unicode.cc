#include "kvant/model/unicode.h"

#include <utf8proc.h>

#include <algorithm>

namespace kvant::model {
namespace {

// Length that the lead byte promises; 0 for bytes that cannot lead.
size_t sequence_length(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xc0) return 0;
  if (lead < 0xe0) return 2;
  if (lead < 0xf0) return 3;
  if (lead < 0xf8) return 4;
  return 0;
}

bool is_continuation(char byte) {
  return (static_cast<unsigned char>(byte) & 0xc0) == 0x80;
}

// Decodes the sequence at `text[0]`; returns its length, 0 if it is broken.
size_t decode_one(std::string_view text, char32_t& code_point) {
  const unsigned char lead = static_cast<unsigned char>(text[0]);
  const size_t length = sequence_length(lead);
  if (length == 0 || length > text.size()) return 0;
  if (length == 1) {
    code_point = lead;
    return 1;
  }
  char32_t value = lead & (0xffu >> (length + 1));
  for (size_t i = 1; i < length; ++i) {
    if (!is_continuation(text[i])) return 0;
    value = value << 6 | (static_cast<unsigned char>(text[i]) & 0x3fu);
  }
  if (value > 0x10ffff) return 0;
  code_point = value;
  return length;
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

}  // namespace

CharClass char_class(char32_t code_point) {
  if (code_point > 0x10ffff) return CharClass::kOther;
  if (is_white_space(code_point)) return CharClass::kSpace;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code_point))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return CharClass::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO: return CharClass::kNumber;
    case UTF8PROC_CATEGORY_PC:
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO: return CharClass::kPunctuation;
    default: return CharClass::kOther;
  }
}

std::vector<char32_t> decode_utf8(std::string_view text) {
  std::vector<char32_t> out;
  out.reserve(text.size());
  while (!text.empty()) {
    char32_t code_point = kReplacementCharacter;
    const size_t length = decode_one(text, code_point);
    out.push_back(code_point);
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

size_t utf8_sequence(std::string_view text) {
  char32_t code_point = 0;
  return decode_one(text, code_point);
}

void append_utf8(char32_t c, std::string& out) {
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | c >> 6);
    put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3f));
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  }
}

size_t complete_utf8_prefix(std::string_view bytes) {
  // Only the last three bytes can belong to an unfinished sequence.
  for (size_t back = 1; back <= std::min<size_t>(3, bytes.size()); ++back) {
    const char byte = bytes[bytes.size() - back];
    if (is_continuation(byte)) continue;
    const bool unfinished = sequence_length(static_cast<unsigned char>(byte)) > back;
    return unfinished ? bytes.size() - back : bytes.size();
  }
  return bytes.size();
}

}  // namespace kvant::model
