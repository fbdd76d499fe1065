#include "kvant/model/vocabulary.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <span>

namespace kvant::model {
namespace {

// Files do not say which tokens end an answer, so engines know them by name (as llama.cpp does).
constexpr std::string_view kEndOfTurn[] = {
    "<|eot_id|>",         "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>",    "<EOT>",      "_<EOT>",  "[EOT]",         "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
};
constexpr std::string_view kEndOfGeneration[] = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
};
// Tokens for fill-in-the-middle and the like: the file names them by key, or they are known by
// text. They are control tokens; a model has finished when it emits one of those that `end`.
struct KnownToken {
  std::string_view key;
  bool ends;
  std::span<const std::string_view> texts;
};
constexpr std::string_view kFimPrefix[] = {"<|fim_prefix|>",  "<fim-prefix>", "<fim_prefix>",
                                           "<｜fim▁begin｜>", "<PRE>",        "▁<PRE>",
                                           "<|code_prefix|>"};
constexpr std::string_view kFimSuffix[] = {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
                                           "<｜fim▁hole｜>", "<SUF>",        "▁<SUF>",
                                           "<|code_suffix|>"};
constexpr std::string_view kFimMiddle[] = {"<|fim_middle|>", "<fim-middle>", "<fim_middle>",
                                           "<｜fim▁end｜>",  "<MID>",        "▁<MID>",
                                           "<|code_middle|>"};
constexpr std::string_view kFimPadding[] = {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>",
                                            "[PAD]"};
constexpr std::string_view kRepository[] = {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
                                            "<reponame>"};
constexpr std::string_view kFileSeparator[] = {"<|file_sep|>"};
constexpr std::string_view kEndOfMessage[] = {"<|eom_id|>"};
constexpr KnownToken kKnownTokens[] = {
    {"tokenizer.ggml.eom_token_id", true, kEndOfMessage},
    {"tokenizer.ggml.fim_pre_token_id", false, kFimPrefix},
    {"tokenizer.ggml.fim_suf_token_id", false, kFimSuffix},
    {"tokenizer.ggml.fim_mid_token_id", false, kFimMiddle},
    {"tokenizer.ggml.fim_pad_token_id", true, kFimPadding},
    {"tokenizer.ggml.fim_rep_token_id", true, kRepository},
    {"tokenizer.ggml.fim_sep_token_id", true, kFileSeparator},
};

}  // namespace

Result<Vocabulary> Vocabulary::create(const Gguf& gguf) {
  Vocabulary out;
  KVANT_ASSIGN(const std::string_view model, gguf.string("tokenizer.ggml.model"));
  if (model == "gpt2") {
    out.family_ = Family::kBytePairs;
  } else if (model == "llama") {
    out.family_ = Family::kSentencePiece;
  } else {
    return Error(ErrorCode::kUnsupported,
                 fmt::format("{}: the tokenizer model \"{}\" is not supported; supported: gpt2 "
                             "(byte-level BPE), llama (SentencePiece)",
                             gguf.name(), model));
  }
  KVANT_TRY(out.read_tokens(gguf));
  KVANT_TRY(out.read_kinds(gguf));
  KVANT_TRY(out.read_special_ids(gguf));
  KVANT_TRY(out.find_known_tokens(gguf));
  out.find_special_by_text();
  return out;
}

Status Vocabulary::read_tokens(const Gguf& gguf) {
  KVANT_ASSIGN(std::vector<std::string_view> tokens, gguf.string_array("tokenizer.ggml.tokens"));
  const auto corrupt = [&gguf](std::string_view what) {
    return Error(ErrorCode::kCorruptData, fmt::format("{}: {}", gguf.name(), what));
  };
  if (tokens.empty()) return corrupt("the vocabulary is empty");
  if (tokens.size() > (size_t{1} << 30)) return corrupt("the vocabulary has too many tokens");
  std::vector<std::string> replaced;  // names for tokens without text, as llama.cpp gives them
  size_t total = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].empty()) replaced.push_back(fmt::format("[EMPTY_{}]", i));
    total += tokens[i].size();
  }
  for (const std::string& name : replaced) total += name.size();
  arena_.reserve(total);
  texts_.reserve(tokens.size());
  ids_.reserve(tokens.size());
  size_t next_replaced = 0;
  for (const std::string_view token : tokens) {
    const std::string_view text = token.empty() ? replaced[next_replaced++] : token;
    const size_t start = arena_.size();
    arena_.insert(arena_.end(), text.begin(), text.end());
    texts_.emplace_back(arena_.data() + start, text.size());
    max_text_bytes_ = std::max(max_text_bytes_, text.size());
    const auto [it, inserted] = ids_.emplace(texts_.back(), size() - 1);
    if (!inserted) {
      return corrupt(
          fmt::format("the tokens {} and {} have the same text", it->second, size() - 1));
    }
  }

  if (gguf.has("tokenizer.ggml.scores")) {
    KVANT_ASSIGN(scores_, gguf.f32_array("tokenizer.ggml.scores"));
    if (scores_.size() < texts_.size()) return corrupt("tokenizer.ggml.scores has too few items");
    if (std::any_of(scores_.begin(), scores_.end(), [](float s) { return std::isnan(s); })) {
      return corrupt("tokenizer.ggml.scores contains NaN");
    }
  } else {
    scores_.assign(texts_.size(), 0.0f);
  }
  return {};
}

Status Vocabulary::read_kinds(const Gguf& gguf) {
  kinds_.assign(texts_.size(), kTokenNormal);
  if (!gguf.has("tokenizer.ggml.token_type")) return {};
  KVANT_ASSIGN(const std::vector<int32_t> types, gguf.i32_array("tokenizer.ggml.token_type"));
  if (types.size() < texts_.size()) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("{}: tokenizer.ggml.token_type has {} items for {} tokens",
                             gguf.name(), types.size(), texts_.size()));
  }
  // By the number in the file; other numbers are left without a kind.
  constexpr TokenKind kKinds[] = {
      0, kTokenNormal, kTokenUnknown, kTokenControl, kTokenUserDefined, kTokenUnused, kTokenByte};
  for (size_t i = 0; i < kinds_.size(); ++i) {
    const bool known = types[i] > 0 && types[i] < static_cast<int32_t>(std::size(kKinds));
    kinds_[i] = known ? kKinds[types[i]] : TokenKind{0};
  }
  return {};
}

Status Vocabulary::read_special_ids(const Gguf& gguf) {
  const bool byte_pairs = family_ == Family::kBytePairs;
  struct Entry {
    std::string_view key;
    std::optional<TokenId>& id;
    std::optional<TokenId> fallback;  // what the tokenizer family uses when the file does not say
  };
  const Entry entries[] = {
      {"tokenizer.ggml.bos_token_id", bos_, byte_pairs ? 11 : 1},
      {"tokenizer.ggml.eos_token_id", eos_, byte_pairs ? 11 : 2},
      {"tokenizer.ggml.eot_token_id", eot_, std::nullopt},
      {"tokenizer.ggml.unknown_token_id", unknown_,
       byte_pairs ? std::nullopt : std::optional<TokenId>(0)},
      {"tokenizer.ggml.padding_token_id", padding_, std::nullopt},
  };
  for (const Entry& entry : entries) {
    entry.id = entry.fallback && *entry.fallback < size() ? entry.fallback : std::nullopt;
    if (!gguf.has(entry.key)) continue;
    KVANT_ASSIGN(const uint32_t id, gguf.u32(entry.key));
    if (id < static_cast<uint32_t>(size())) entry.id = static_cast<TokenId>(id);
  }
  return {};
}

Status Vocabulary::find_known_tokens(const Gguf& gguf) {
  for (const KnownToken& known : kKnownTokens) {
    std::optional<TokenId> id;
    if (gguf.has(known.key)) {
      KVANT_ASSIGN(const uint32_t in_file, gguf.u32(known.key));
      if (in_file < static_cast<uint32_t>(size())) id = static_cast<TokenId>(in_file);
    }
    for (size_t i = 0; i < known.texts.size() && !id; ++i) {
      id = find(known.texts[i]);
      if (id) kinds_[static_cast<size_t>(*id)] |= kTokenControl;
    }
    if (id && known.ends) end_of_generation_.push_back(*id);
  }
  return {};
}

void Vocabulary::find_special_by_text() {
  std::vector<TokenId>& ends = end_of_generation_;
  for (const std::string_view name : kEndOfTurn) {
    if (!eot_) eot_ = find(name);
  }
  for (const std::string_view name : kEndOfGeneration) {
    if (const auto id = find(name)) {
      kinds_[static_cast<size_t>(*id)] |= kTokenControl;
      ends.push_back(*id);
    }
  }
  for (const std::optional<TokenId> id : {eos_, eot_}) {
    if (id) ends.push_back(*id);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  for (TokenId id = 0; id < size(); ++id) {
    if ((kind(id) & kTokenControl) != 0 && text(id).find("unused") != std::string_view::npos) {
      kinds_[static_cast<size_t>(id)] |= kTokenUnused;
    }
  }
  const auto drop = [this, &ends](std::string_view name, TokenKind kind) {
    const std::optional<TokenId> id = find(name);
    std::erase(ends, *id);
    kinds_[static_cast<size_t>(*id)] = kind;
  };
  const auto has = [this](std::string_view name) { return find(name).has_value(); };
  // Models with message channels use <|end|> between messages; tool-calling Gemma has </s> as HTML.
  const bool calls = has("<|call|>") || has("<|calls|>");
  if (calls && has("<|end|>") && (has("<|return|>") || has("<|flush|>"))) {
    drop("<|end|>", kTokenUserDefined);
  }
  if (has("<|tool_response>") && has("</s>")) drop("</s>", kTokenNormal);
  for (const std::string_view name : {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}) {
    if (const auto id = find(name)) kinds_[static_cast<size_t>(*id)] = kTokenUserDefined;
  }
}

std::optional<TokenId> Vocabulary::find(std::string_view text) const {
  const auto it = ids_.find(text);
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

}  // namespace kvant::model
