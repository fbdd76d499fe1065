// Code points for the tokenizers: lenient UTF-8 decoding and the few character classes that
// pre-tokenizers ask for. Not installed. Thread-safe (pure functions).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvant::model {

enum class CharClass : uint8_t {
  kOther,        // marks, symbols, controls, unassigned code points
  kPunctuation,  // \p{P}
  kLetter,       // \p{L}
  kNumber,       // \p{N}
  kSpace,        // White_Space
};

// Any value; above U+10FFFF and for surrogates kOther.
CharClass char_class(char32_t code_point);

inline constexpr char32_t kReplacementCharacter = 0xfffd;

// Decodes UTF-8 as llama.cpp does, so that ids agree on broken text: a byte that does not start a
// complete sequence becomes U+FFFD and decoding goes on at the next byte; overlong forms and
// surrogates decode to the value they spell. Values above U+10FFFF count as broken bytes.
std::vector<char32_t> decode_utf8(std::string_view text);

// Length of the sequence at the start of `text` (not empty), 0 if it is broken; by the same rules.
size_t utf8_sequence(std::string_view text);

// Appends the UTF-8 form of a value up to U+10FFFF.
void append_utf8(char32_t code_point, std::string& out);

// Bytes of the longest prefix of `bytes` that ends at the end of a UTF-8 sequence or inside bytes
// that can no longer become one: what may be shown now, the rest waiting for more bytes (at most
// 3).
size_t complete_utf8_prefix(std::string_view bytes);

}  // namespace kvant::model
