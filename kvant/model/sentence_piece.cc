#include "kvant/model/sentence_piece.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvant::model {
namespace {

// Length of the character that a lead byte promises. Nothing is checked: what is no token becomes
// bytes in the end (as in llama.cpp, whose ids on broken text this keeps).
size_t promised_length(char lead) {
  const unsigned char byte = static_cast<unsigned char>(lead);
  if (byte < 0xc0) return 1;
  if (byte < 0xe0) return 2;
  return byte < 0xf0 ? 3 : 4;
}

std::string mark_spaces(std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 2);
  for (const char c : text) {
    if (c == ' ') {
      out += kSpaceMark;
    } else {
      out.push_back(c);
    }
  }
  return out;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

}  // namespace

int SentencePiece::byte_of(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  const int high = hex_digit(text[3]);
  const int low = hex_digit(text[4]);
  return high < 0 || low < 0 ? -1 : 16 * high + low;
}

Result<SentencePiece> SentencePiece::create(const Gguf& gguf, const Vocabulary& vocabulary) {
  SentencePiece out;
  out.vocabulary_ = &vocabulary;
  for (int byte = 0; byte < 256; ++byte) {
    const char as_text = static_cast<char>(byte);
    std::optional<TokenId> token = vocabulary.find(fmt::format("<0x{:02X}>", byte));
    if (!token) token = vocabulary.find(std::string_view(&as_text, 1));
    if (!token) token = vocabulary.unknown();
    if (!token) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("{}: the vocabulary has no token for byte {} and no unknown token",
                               gguf.name(), byte));
    }
    out.byte_tokens_[static_cast<size_t>(byte)] = *token;
  }
  return out;
}

void SentencePiece::add_candidate(std::string_view text, const std::vector<Part>& parts,
                                  int32_t left, int32_t right, std::vector<Candidate>& heap) const {
  if (left < 0 || right < 0) return;
  const Part& a = parts[static_cast<size_t>(left)];
  const size_t length = a.length + parts[static_cast<size_t>(right)].length;
  if (length > vocabulary_->max_text_bytes()) return;
  const auto token = vocabulary_->find(text.substr(a.begin, length));
  if (!token) return;
  heap.push_back({vocabulary_->score(*token), left, right, length});
}

void SentencePiece::encode(std::string_view raw, std::vector<TokenId>& out) const {
  const std::string text = mark_spaces(raw);
  std::vector<Part> parts;
  parts.reserve(text.size());
  for (size_t begin = 0; begin < text.size();) {
    const size_t length = std::min(promised_length(text[begin]), text.size() - begin);
    const int32_t index = static_cast<int32_t>(parts.size());
    parts.push_back({begin, length, index - 1, begin + length < text.size() ? index + 1 : -1});
    begin += length;
  }
  // The best score first, the leftmost of equals: n log n for n characters.
  const auto worse = [](const Candidate& x, const Candidate& y) {
    return x.score != y.score ? x.score < y.score : x.left > y.left;
  };
  std::vector<Candidate> heap;
  for (size_t i = 1; i < parts.size(); ++i) {
    add_candidate(text, parts, static_cast<int32_t>(i) - 1, static_cast<int32_t>(i), heap);
  }
  std::make_heap(heap.begin(), heap.end(), worse);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const Candidate best = heap.back();
    heap.pop_back();
    Part& left = parts[static_cast<size_t>(best.left)];
    Part& right = parts[static_cast<size_t>(best.right)];
    if (left.length == 0 || right.length == 0 || left.length + right.length != best.length) {
      continue;
    }
    left.length = best.length;
    right.length = 0;
    left.next = right.next;
    if (right.next >= 0) parts[static_cast<size_t>(right.next)].previous = best.left;
    const size_t before = heap.size();
    add_candidate(text, parts, left.previous, best.left, heap);
    add_candidate(text, parts, best.left, left.next, heap);
    for (size_t end = before + 1; end <= heap.size(); ++end) {
      std::push_heap(heap.begin(), heap.begin() + static_cast<std::ptrdiff_t>(end), worse);
    }
  }
  for (int32_t i = text.empty() ? -1 : 0; i != -1; i = parts[static_cast<size_t>(i)].next) {
    const Part& part = parts[static_cast<size_t>(i)];
    const std::string_view piece = std::string_view(text).substr(part.begin, part.length);
    if (const auto token = vocabulary_->find(piece)) {
      out.push_back(*token);
      continue;
    }
    for (const char c : piece) out.push_back(byte_tokens_[static_cast<unsigned char>(c)]);
  }
}

}  // namespace kvant::model
