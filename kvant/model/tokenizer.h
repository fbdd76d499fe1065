// Text to token ids and back, as the model's file defines it. Ids are those of llama.cpp on any
// bytes.
//
// Byte-level BPE (`tokenizer.ggml.model` gpt2: SmolLM2, Qwen, Llama 3) and SentencePiece style
// (llama: Llama 2, Gemma). Immutable and thread-safe once created; does not need the Gguf any more.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/gguf.h"

namespace kvant::model {

using TokenId = int32_t;

enum class Bos {
  kNone,
  kAsModel,  // if the file asks for it (Gemma, Llama)
  kAlways,   // kUnsupported if the model has no such token
};

// Which special tokens written out in the text become themselves. Others are ordinary text.
enum class SpecialInText {
  kParse,   // all: control tokens such as <|im_start|> too
  kIgnore,  // only user-defined ones, which are part of ordinary text (Gemma's newline runs)
};

struct EncodeOptions {
  Bos bos = Bos::kNone;
  SpecialInText special = SpecialInText::kParse;
};

// Whether control tokens appear in decoded text.
enum class SpecialInOutput { kShow, kHide };

class Tokenizer {
 public:
  // kNotFound, kCorruptData or kUnsupported; each names the key and what is supported.
  static Result<Tokenizer> create(const Gguf& gguf);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Any bytes. Byte-level BPE reads broken UTF-8 as U+FFFD, SentencePiece keeps the bytes.
  // kInvalidArgument above 1 GiB of text. Time is n log n in the length of the text.
  Result<std::vector<TokenId>> encode(std::string_view text, EncodeOptions options = {}) const;

  // The bytes of `ids`; inverts encode() for valid UTF-8 (and for SentencePiece any text without
  // U+2581, which is what a space is inside tokens). kInvalidArgument for an id outside the
  // vocabulary.
  Result<std::string> decode(std::span<const TokenId> ids,
                             SpecialInOutput special = SpecialInOutput::kShow) const;

  // The bytes of one token, which need not be whole characters; empty for ids outside the
  // vocabulary. Valid as long as the tokenizer.
  std::string_view token_bytes(TokenId id) const;
  // The token as the vocabulary spells it, for messages: "Ġthe", "<0x0A>".
  std::string_view token_text(TokenId id) const;
  // Control tokens and the unknown token: not part of an answer's text.
  bool is_control(TokenId id) const;
  // The token whose spelling is exactly `text`, e.g. "<|im_end|>".
  std::optional<TokenId> find(std::string_view text) const;

  TokenId vocabulary_size() const;
  std::string_view family() const;        // "bpe" or "spm"
  std::string_view pretokenizer() const;  // of BPE, e.g. "qwen2"; otherwise empty
  bool adds_bos() const;                  // the file asks for BOS in front of every text
  bool adds_space_prefix() const;         // SentencePiece: a space is put in front of the text
  std::optional<TokenId> bos() const;
  std::optional<TokenId> eos() const;
  std::optional<TokenId> eot() const;
  std::optional<TokenId> unknown() const;
  std::optional<TokenId> padding() const;
  // Every token after which a model has finished its answer (eos, eot, <|im_end|> ...), ascending.
  std::span<const TokenId> end_of_generation() const;
  bool is_end_of_generation(TokenId id) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Decodes a stream of tokens into text that can be shown at once: bytes of an unfinished UTF-8
// character wait for the tokens that finish it. Single-thread. The tokenizer must outlive it.
class StreamDecoder {
 public:
  // Where the stream begins: at the start of a text, where the space that a SentencePiece tokenizer
  // has put in front is dropped, or after a prompt.
  enum class From { kStart, kMiddle };

  explicit StreamDecoder(const Tokenizer& tokenizer, From from = From::kMiddle,
                         SpecialInOutput special = SpecialInOutput::kHide);

  // The text that has become complete with this token; often empty. Ids outside the vocabulary give
  // nothing.
  std::string push(TokenId id);
  // The bytes that are still waiting, complete or not. Call at the end.
  std::string finish();

 private:
  const Tokenizer* tokenizer_;
  SpecialInOutput special_;
  bool drop_space_;      // the next token's leading space was not in the text
  std::string waiting_;  // bytes of an unfinished character
};

}  // namespace kvant::model
