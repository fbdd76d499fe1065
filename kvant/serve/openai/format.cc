#include "kvant/serve/openai/format.h"

#include <fmt/format.h>

#include "kvant/serve/openai/text_stream.h"

namespace kvant::serve::openai {
namespace {

Json bytes_json(std::string_view bytes) {
  Json array = Json::array();
  for (const char c : bytes) array.push_back(static_cast<unsigned char>(c));
  return array;
}

Json chat_token(const model::Tokenizer& tokenizer, int32_t id, float logprob, bool as_id) {
  Json entry;
  entry["token"] = token_text(tokenizer, id, as_id);
  entry["logprob"] = json_logprob(logprob);
  entry["bytes"] = bytes_json(tokenizer.token_bytes(id));
  return entry;
}

}  // namespace

Json usage_json(const Usage& usage) {
  Json json;
  json["prompt_tokens"] = usage.prompt_tokens;
  json["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  json["completion_tokens"] = usage.completion_tokens;
  json["prompt_tokens_details"] = Json{{"cached_tokens", usage.cached_tokens}};
  return json;
}

Json head_json(const ResponseHead& head) {
  Json json;
  json["id"] = head.id;
  json["object"] = head.object;
  json["created"] = head.created;
  json["model"] = head.model;
  return json;
}

std::string token_text(const model::Tokenizer& tokenizer, int32_t id, bool as_id) {
  if (as_id) return fmt::format("token_id:{}", id);
  return std::string(tokenizer.token_bytes(id));
}

Json chat_logprobs(const model::Tokenizer& tokenizer, std::span<const SampledToken> tokens,
                   const LogprobOptions& options) {
  Json content = Json::array();
  for (const SampledToken& token : tokens) {
    Json entry = chat_token(tokenizer, token.id, token.logprob, options.tokens_as_ids);
    Json top = Json::array();
    for (const auto& [id, logprob] : token.top) {
      if (static_cast<int>(top.size()) == options.top) break;
      top.push_back(chat_token(tokenizer, id, logprob, options.tokens_as_ids));
    }
    entry["top_logprobs"] = std::move(top);
    content.push_back(std::move(entry));
  }
  return Json{{"content", std::move(content)}};
}

Json completion_logprobs(const model::Tokenizer& tokenizer, std::span<const SampledToken> tokens,
                         const LogprobOptions& options, int64_t& offset) {
  Json texts = Json::array();
  Json logprobs = Json::array();
  Json tops = Json::array();
  Json offsets = Json::array();
  for (const SampledToken& token : tokens) {
    const bool scored = token.id >= 0;
    const int32_t id = scored ? token.id : -1 - token.id;
    const std::string text = token_text(tokenizer, id, options.tokens_as_ids);
    offsets.push_back(offset);
    offset += count_characters(text);
    if (scored) {
      logprobs.push_back(json_logprob(token.logprob));
      // Distinct tokens may have the same text: the more probable one stays.
      Json top = Json::object();
      int count = 0;
      for (const auto& [top_id, logprob] : token.top) {
        if (count++ == options.top) break;
        std::string key = token_text(tokenizer, top_id, options.tokens_as_ids);
        if (!top.contains(key)) top[std::move(key)] = json_logprob(logprob);
      }
      if (!top.contains(text)) top[text] = json_logprob(token.logprob);
      tops.push_back(std::move(top));
    } else {
      logprobs.push_back(nullptr);
      tops.push_back(nullptr);
    }
    texts.push_back(text);
  }
  Json json;
  json["text_offset"] = std::move(offsets);
  json["token_logprobs"] = std::move(logprobs);
  json["tokens"] = std::move(texts);
  json["top_logprobs"] = std::move(tops);
  return json;
}

Json prompt_logprobs_json(const model::Tokenizer& tokenizer, std::span<const SampledToken> tokens) {
  Json list = Json::array();
  for (const SampledToken& token : tokens) {
    if (token.id < 0) {
      list.push_back(nullptr);
      continue;
    }
    Json entry = Json::object();
    const auto add = [&](int32_t id, float logprob, Json rank) {
      std::string key = std::to_string(id);
      if (entry.contains(key)) return;
      entry[std::move(key)] = Json{{"logprob", json_logprob(logprob)},
                                   {"rank", std::move(rank)},
                                   {"decoded_token", std::string(tokenizer.token_bytes(id))}};
    };
    int rank = 0;
    for (const auto& [id, logprob] : token.top) add(id, logprob, ++rank);
    add(token.id, token.logprob, nullptr);
    list.push_back(std::move(entry));
  }
  return list;
}

ChunkWriter::ChunkWriter(const ResponseHead& head) {
  prefix_ = "data: " + dump_json(head_json(head));
  prefix_.pop_back();  // the closing brace
  prefix_ += ",\"choices\":[";
}

std::string ChunkWriter::choice(int index, std::string_view choice_fields,
                                const Json* usage) const {
  return choice_with(index, choice_fields, {}, usage);
}

std::string ChunkWriter::choice_with(int index, std::string_view choice_fields,
                                     std::string_view more, const Json* usage) const {
  return fmt::format("{}{{\"index\":{},{}}}]{}{}}}\n\n", prefix_, index, choice_fields, more,
                     usage == nullptr ? std::string() : ",\"usage\":" + dump_json(*usage));
}

std::string ChunkWriter::usage_only(const Json& usage) const {
  return fmt::format("{}],\"usage\":{}}}\n\n", prefix_, dump_json(usage));
}

std::string error_chunk(const ApiError& error) {
  return "data: " + error_body(error) + "\n\n";
}

}  // namespace kvant::serve::openai
