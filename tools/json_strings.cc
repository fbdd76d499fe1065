#include "tools/json_strings.h"

#include <fmt/format.h>

#include <optional>

#include "kvant/model/unicode.h"

namespace kvant::tools {
namespace {

bool is_json_space(char c) {
  return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

// The four hexadecimal digits at `text[at]`.
std::optional<uint32_t> parse_hex4(std::string_view text, size_t at) {
  if (at + 4 > text.size()) return std::nullopt;
  uint32_t value = 0;
  for (const char c : text.substr(at, 4)) {
    if (c >= '0' && c <= '9') {
      value = value << 4 | static_cast<uint32_t>(c - '0');
    } else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f') {
      value = value << 4 | static_cast<uint32_t>((c | 0x20) - 'a' + 10);
    } else {
      return std::nullopt;
    }
  }
  return value;
}

// Reads the \u escape whose digits start at `text[at]`; returns the position after it.
Result<size_t> parse_unicode_escape(std::string_view text, size_t at, std::string& out) {
  const std::optional<uint32_t> unit = parse_hex4(text, at);
  if (!unit) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("\\u without four hexadecimal digits at byte {}", at));
  }
  uint32_t code_point = *unit;
  at += 4;
  if (code_point >= 0xd800 && code_point < 0xdc00 && text.substr(at, 2) == "\\u") {
    const std::optional<uint32_t> low = parse_hex4(text, at + 2);
    if (low && *low >= 0xdc00 && *low < 0xe000) {
      code_point = 0x10000 + ((code_point - 0xd800) << 10 | (*low - 0xdc00));
      at += 6;
    }
  }
  if (code_point >= 0xdc80 && code_point <= 0xdcff) {
    out.push_back(static_cast<char>(code_point - 0xdc00));
  } else {
    model::append_utf8(code_point, out);
  }
  return at;
}

// Length of the well-formed UTF-8 sequence (RFC 3629) at `text[0]`, 0 if there is none.
size_t valid_sequence(std::string_view text) {
  const auto byte = [text](size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
  };
  const int lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  const bool overlong = (lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xf0 && byte(1) < 0x90);
  const bool outside = (lead == 0xed && byte(1) >= 0xa0) || (lead == 0xf4 && byte(1) >= 0x90);
  return overlong || outside ? 0 : length;
}

}  // namespace

Result<std::string> parse_json_string(std::string_view text) {
  const auto wrong = [](std::string what) {
    return Error(ErrorCode::kCorruptData, "expected a JSON string: " + std::move(what));
  };
  while (!text.empty() && is_json_space(text.back())) text.remove_suffix(1);
  size_t at = 0;
  while (at < text.size() && is_json_space(text[at])) ++at;
  if (at == text.size() || text[at] != '"') return wrong("it does not start with a quote");
  std::string out;
  for (++at; at < text.size() && text[at] != '"';) {
    const char c = text[at];
    if (static_cast<unsigned char>(c) < 0x20) {
      return wrong(fmt::format("control character at byte {}; write it as an escape", at));
    }
    if (c != '\\') {
      out.push_back(c);
      ++at;
      continue;
    }
    const char escape = at + 1 < text.size() ? text[at + 1] : '\0';
    at += 2;
    switch (escape) {
      case '"':
      case '\\':
      case '/': out.push_back(escape); break;
      case 'b': out.push_back('\b'); break;
      case 'f': out.push_back('\f'); break;
      case 'n': out.push_back('\n'); break;
      case 'r': out.push_back('\r'); break;
      case 't': out.push_back('\t'); break;
      case 'u': {
        Result<size_t> next = parse_unicode_escape(text, at, out);
        if (!next) return wrong(next.error().message());
        at = *next;
        break;
      }
      default: return wrong(fmt::format("unknown escape at byte {}", at - 2));
    }
  }
  if (at >= text.size()) return wrong("it does not end with a quote");
  if (at + 1 != text.size()) return wrong(fmt::format("something follows it at byte {}", at + 1));
  return out;
}

std::string write_json_string(std::string_view bytes) {
  std::string out = "\"";
  while (!bytes.empty()) {
    const size_t length = valid_sequence(bytes);
    const unsigned char c = static_cast<unsigned char>(bytes[0]);
    if (length == 0) {
      out += fmt::format("\\udc{:02x}", c);
    } else if (c == '"' || c == '\\') {
      out += {'\\', bytes[0]};
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c < 0x20 || c == 0x7f) {
      out += fmt::format("\\u{:04x}", c);
    } else {
      out += bytes.substr(0, length);
    }
    bytes.remove_prefix(length == 0 ? 1 : length);
  }
  return out + '"';
}

}  // namespace kvant::tools
