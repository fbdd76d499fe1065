#include "kvant/model/byte_pairs.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvant::model {
namespace {

// GPT-2 writes every byte as a printable code point: printable Latin-1 stands for itself, the other
// 68 bytes, in ascending order, for U+0100 and on.
bool stands_for_itself(char32_t byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) ||
         (byte >= 0xae && byte <= 0xff);
}

struct ByteAlphabet {
  std::array<std::string, 256> text;  // UTF-8 of the code point for a byte
  std::array<int, 512> byte;          // for a code point below 512; -1: none

  ByteAlphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const char32_t c =
          stands_for_itself(static_cast<char32_t>(b)) ? static_cast<char32_t>(b) : next++;
      append_utf8(c, text[static_cast<size_t>(b)]);
      byte[c] = b;
    }
  }
};

const ByteAlphabet& alphabet() {
  static const ByteAlphabet instance;
  return instance;
}

// Bytes to the text that tokens have for them.
std::string disguise(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += alphabet().text[static_cast<unsigned char>(c)];
  return out;
}

}  // namespace

Result<BytePairs> BytePairs::create(const Gguf& gguf, const Vocabulary& vocabulary) {
  BytePairs out;
  out.vocabulary_ = &vocabulary;
  KVANT_ASSIGN(const std::string_view pre, gguf.string_or("tokenizer.ggml.pre", "default"));
  Result<const PreTokenizer*> found = find_pretokenizer(pre);
  if (!found) return found.error().with_context(gguf.name());
  out.pretokenizer_ = *found;
  KVANT_TRY(out.read_merges(gguf, vocabulary));
  return out;
}

BytePairs::Symbol BytePairs::intern(const std::string& text, const Vocabulary& vocabulary,
                                    std::unordered_map<std::string, Symbol>& others) {
  if (const auto token = vocabulary.find(text)) return static_cast<Symbol>(*token);
  const Symbol next = static_cast<Symbol>(vocabulary.size()) + static_cast<Symbol>(others.size());
  const auto [it, inserted] = others.emplace(text, next);
  if (inserted) other_symbols_.push_back(text);
  return it->second;
}

Status BytePairs::read_merges(const Gguf& gguf, const Vocabulary& vocabulary) {
  KVANT_ASSIGN(const std::vector<std::string_view> merges,
               gguf.string_array("tokenizer.ggml.merges"));
  std::unordered_map<std::string, Symbol> others;
  for (size_t b = 0; b < 256; ++b) {
    byte_symbols_[b] = intern(alphabet().text[b], vocabulary, others);
  }
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    // "left right"; the first character is never the separator.
    const size_t space = merges[rank].find(' ', 1);
    if (space == std::string_view::npos) {
      return Error(ErrorCode::kCorruptData,
                   fmt::format("{}: item {} of tokenizer.ggml.merges is not two parts with a space "
                               "between them",
                               gguf.name(), rank));
    }
    const std::string left(merges[rank].substr(0, space));
    const std::string right(merges[rank].substr(space + 1));
    const uint64_t key =
        uint64_t{intern(left, vocabulary, others)} << 32 | intern(right, vocabulary, others);
    merges_.emplace(key,
                    Merge{static_cast<uint32_t>(rank), intern(left + right, vocabulary, others)});
  }
  return {};
}

void BytePairs::encode(std::string_view text, std::vector<TokenId>& out) const {
  const ClassifiedText classified(decode_utf8(text));
  Work work;
  std::string bytes;
  for (const Piece piece : pretokenizer_->split(classified)) {
    bytes.clear();
    for (size_t i = piece.begin; i < piece.end; ++i) append_utf8(classified.code_points[i], bytes);
    if (pretokenizer_->ignore_merges) {
      if (const auto token = vocabulary_->find(disguise(bytes))) {
        out.push_back(*token);
        continue;
      }
    }
    encode_piece(bytes, work, out);
  }
}

void BytePairs::encode_piece(std::string_view bytes, Work& work, std::vector<TokenId>& out) const {
  work.parts.clear();
  for (size_t i = 0; i < bytes.size(); ++i) {
    const int32_t index = static_cast<int32_t>(i);
    work.parts.push_back({.symbol = byte_symbols_[static_cast<unsigned char>(bytes[i])],
                          .previous = index - 1,
                          .next = i + 1 < bytes.size() ? index + 1 : -1});
  }
  merge_all(work);
  for (int32_t i = 0; i != -1; i = work.parts[static_cast<size_t>(i)].next) {
    const Symbol symbol = work.parts[static_cast<size_t>(i)].symbol;
    const Symbol num_tokens = static_cast<Symbol>(vocabulary_->size());
    if (symbol < num_tokens) {
      out.push_back(static_cast<TokenId>(symbol));
      continue;
    }
    // No token: its characters one by one, those that are tokens themselves (as llama.cpp does).
    for (const char c : other_symbols_[symbol - num_tokens]) {
      if (const auto token = vocabulary_->find(std::string_view(&c, 1))) out.push_back(*token);
    }
  }
}

void BytePairs::add_candidate(int32_t left, int32_t right, Work& work) const {
  if (left < 0 || right < 0) return;
  const Part& a = work.parts[static_cast<size_t>(left)];
  const Part& b = work.parts[static_cast<size_t>(right)];
  const auto it = merges_.find(uint64_t{a.symbol} << 32 | b.symbol);
  if (it == merges_.end()) return;
  work.heap.push_back(
      {it->second.rank, left, right, a.generation, b.generation, it->second.result});
  std::push_heap(work.heap.begin(), work.heap.end(), [](const Candidate& x, const Candidate& y) {
    return x.rank != y.rank ? x.rank > y.rank : x.left > y.left;
  });
}

// Applies the merge of lowest rank, the leftmost of equals, until none applies: n log n for n
// bytes.
void BytePairs::merge_all(Work& work) const {
  std::vector<Part>& parts = work.parts;
  work.heap.clear();
  for (size_t i = 1; i < parts.size(); ++i) {
    add_candidate(static_cast<int32_t>(i) - 1, static_cast<int32_t>(i), work);
  }
  while (!work.heap.empty()) {
    std::pop_heap(work.heap.begin(), work.heap.end(), [](const Candidate& x, const Candidate& y) {
      return x.rank != y.rank ? x.rank > y.rank : x.left > y.left;
    });
    const Candidate best = work.heap.back();
    work.heap.pop_back();
    Part& left = parts[static_cast<size_t>(best.left)];
    Part& right = parts[static_cast<size_t>(best.right)];
    if (left.generation != best.left_generation || right.generation != best.right_generation) {
      continue;
    }
    left.symbol = best.result;
    ++left.generation;
    ++right.generation;  // gone
    left.next = right.next;
    if (right.next >= 0) parts[static_cast<size_t>(right.next)].previous = best.left;
    add_candidate(left.previous, best.left, work);
    add_candidate(best.left, left.next, work);
  }
}

std::string BytePairs::decode(std::string_view token_text) {
  std::string out;
  for (const char32_t c : decode_utf8(token_text)) {
    const int byte = c < alphabet().byte.size() ? alphabet().byte[c] : -1;
    if (byte >= 0) {
      out.push_back(static_cast<char>(byte));
    } else {
      append_utf8(c, out);
    }
  }
  return out;
}

}  // namespace kvant::model
