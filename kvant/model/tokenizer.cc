#include "kvant/model/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kvant/model/byte_pairs.h"
#include "kvant/model/sentence_piece.h"
#include "kvant/model/special_tokens.h"
#include "kvant/model/unicode.h"
#include "kvant/model/vocabulary.h"

namespace kvant::model {
namespace {

constexpr size_t kMaxTextBytes = size_t{1} << 30;  // positions in a text are 32 bits

std::string unmark_spaces(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    if (text.starts_with(kSpaceMark)) {
      out.push_back(' ');
      text.remove_prefix(kSpaceMark.size());
    } else {
      out.push_back(text.front());
      text.remove_prefix(1);
    }
  }
  return out;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(Vocabulary v) : vocabulary(std::move(v)), specials(vocabulary) {}

  Vocabulary vocabulary;
  SpecialTokens specials;
  std::optional<BytePairs> byte_pairs;  // one of the two, by family
  std::optional<SentencePiece> sentence_piece;
  bool add_bos = false;
  bool add_space_prefix = false;
  // What every token decodes to, one after another.
  std::string bytes;
  std::vector<size_t> byte_ends;  // [vocabulary size]

  void decode_all_tokens();
  std::string decode_token(TokenId id) const;
  bool is_byte_token(TokenId id) const {
    return sentence_piece.has_value() && (vocabulary.kind(id) & kTokenByte) != 0;
  }
};

std::string Tokenizer::Impl::decode_token(TokenId id) const {
  const std::string_view text = vocabulary.text(id);
  if (vocabulary.is_special(id)) return std::string(text);
  const int byte = (vocabulary.kind(id) & kTokenByte) != 0 ? SentencePiece::byte_of(text) : -1;
  if (byte >= 0) return std::string(1, static_cast<char>(byte));
  return byte_pairs ? BytePairs::decode(text) : unmark_spaces(text);
}

void Tokenizer::Impl::decode_all_tokens() {
  byte_ends.reserve(static_cast<size_t>(vocabulary.size()));
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    bytes += decode_token(id);
    byte_ends.push_back(bytes.size());
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::create(const Gguf& gguf) {
  KVANT_ASSIGN(Vocabulary vocabulary, Vocabulary::create(gguf));
  auto impl = std::make_unique<Impl>(std::move(vocabulary));
  if (impl->vocabulary.family() == Vocabulary::Family::kBytePairs) {
    KVANT_ASSIGN(impl->byte_pairs, BytePairs::create(gguf, impl->vocabulary));
    impl->add_bos = impl->byte_pairs->pretokenizer().add_bos;
  } else {
    KVANT_ASSIGN(impl->sentence_piece, SentencePiece::create(gguf, impl->vocabulary));
    impl->add_bos = true;
    KVANT_ASSIGN(impl->add_space_prefix, gguf.boolean_or("tokenizer.ggml.add_space_prefix", true));
  }
  KVANT_ASSIGN(impl->add_bos, gguf.boolean_or("tokenizer.ggml.add_bos_token", impl->add_bos));
  if (impl->add_bos && !impl->vocabulary.bos()) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{}: the file asks for a BOS token but names none", gguf.name()));
  }
  impl->decode_all_tokens();
  return Tokenizer(std::move(impl));
}

Result<std::vector<TokenId>> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kMaxTextBytes) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("a text of {} bytes is too long to tokenize at once; the limit is {}",
                             text.size(), kMaxTextBytes));
  }
  std::vector<TokenId> ids;
  if (options.bos == Bos::kAlways && !bos()) {
    return Error(ErrorCode::kUnsupported, "the model has no BOS token");
  }
  if (options.bos == Bos::kAlways || (options.bos == Bos::kAsModel && adds_bos())) {
    ids.push_back(*bos());
  }
  bool after_special = true;  // and at the start
  const ParseSpecial parse =
      options.special == SpecialInText::kParse ? ParseSpecial::kAll : ParseSpecial::kUserDefined;
  for (const SpecialTokens::Fragment& fragment : impl_->specials.split(text, parse)) {
    const std::string_view part = text.substr(fragment.begin, fragment.end - fragment.begin);
    if (fragment.token >= 0) {
      ids.push_back(fragment.token);
    } else if (impl_->byte_pairs) {
      impl_->byte_pairs->encode(part, ids);
    } else if (impl_->add_space_prefix && after_special) {
      impl_->sentence_piece->encode(' ' + std::string(part), ids);
    } else {
      impl_->sentence_piece->encode(part, ids);
    }
    after_special = fragment.token >= 0;
  }
  return ids;
}

Result<std::string> Tokenizer::decode(std::span<const TokenId> ids, SpecialInOutput special) const {
  StreamDecoder decoder(*this, StreamDecoder::From::kStart, special);
  std::string out;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary_size()) {
      return Error(ErrorCode::kInvalidArgument,
                   fmt::format("token id {} at position {} is outside the vocabulary of {}", ids[i],
                               i, vocabulary_size()));
    }
    out += decoder.push(ids[i]);
  }
  return out + decoder.finish();
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
  if (id < 0 || id >= vocabulary_size()) return {};
  const size_t i = static_cast<size_t>(id);
  const size_t begin = i == 0 ? 0 : impl_->byte_ends[i - 1];
  return std::string_view(impl_->bytes).substr(begin, impl_->byte_ends[i] - begin);
}

std::string_view Tokenizer::token_text(TokenId id) const {
  if (id < 0 || id >= vocabulary_size()) return {};
  return impl_->vocabulary.text(id);
}

bool Tokenizer::is_control(TokenId id) const {
  return id >= 0 && id < vocabulary_size() &&
         (impl_->vocabulary.kind(id) & (kTokenControl | kTokenUnknown)) != 0;
}

std::optional<TokenId> Tokenizer::find(std::string_view text) const {
  return impl_->vocabulary.find(text);
}

TokenId Tokenizer::vocabulary_size() const {
  return impl_->vocabulary.size();
}
std::string_view Tokenizer::family() const {
  return impl_->byte_pairs ? "bpe" : "spm";
}
std::string_view Tokenizer::pretokenizer() const {
  return impl_->byte_pairs ? impl_->byte_pairs->pretokenizer().name : std::string_view();
}
bool Tokenizer::adds_bos() const {
  return impl_->add_bos;
}
bool Tokenizer::adds_space_prefix() const {
  return impl_->add_space_prefix;
}
std::optional<TokenId> Tokenizer::bos() const {
  return impl_->vocabulary.bos();
}
std::optional<TokenId> Tokenizer::eos() const {
  return impl_->vocabulary.eos();
}
std::optional<TokenId> Tokenizer::eot() const {
  return impl_->vocabulary.eot();
}
std::optional<TokenId> Tokenizer::unknown() const {
  return impl_->vocabulary.unknown();
}
std::optional<TokenId> Tokenizer::padding() const {
  return impl_->vocabulary.padding();
}
std::span<const TokenId> Tokenizer::end_of_generation() const {
  return impl_->vocabulary.end_of_generation();
}
bool Tokenizer::is_end_of_generation(TokenId id) const {
  const std::vector<TokenId>& ends = impl_->vocabulary.end_of_generation();
  return std::binary_search(ends.begin(), ends.end(), id);
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, From from, SpecialInOutput special)
    : tokenizer_(&tokenizer),
      special_(special),
      drop_space_(tokenizer.adds_space_prefix() && from == From::kStart) {}

std::string StreamDecoder::push(TokenId id) {
  if (id < 0 || id >= tokenizer_->vocabulary_size()) return {};
  const Tokenizer::Impl& impl = *tokenizer_->impl_;
  std::string_view bytes = tokenizer_->token_bytes(id);
  if (drop_space_ && !impl.vocabulary.is_special(id) && bytes.starts_with(' ')) {
    bytes.remove_prefix(1);
  }
  drop_space_ = impl.add_space_prefix && impl.vocabulary.is_special(id);
  if (special_ == SpecialInOutput::kHide && tokenizer_->is_control(id)) bytes = {};

  waiting_ += bytes;
  // Spaces are marked before the text is cut into characters, so a mark that follows a broken
  // sequence can end up as three byte tokens. A mark of the text itself never becomes byte tokens.
  if (impl.is_byte_token(id) && waiting_.ends_with(kSpaceMark)) {
    waiting_.replace(waiting_.size() - kSpaceMark.size(), kSpaceMark.size(), " ");
  }
  const size_t complete = complete_utf8_prefix(waiting_);
  std::string out = waiting_.substr(0, complete);
  waiting_.erase(0, complete);
  return out;
}

std::string StreamDecoder::finish() {
  return std::exchange(waiting_, {});
}

}  // namespace kvant::model
