#include "kvant/serve/openai/generation.h"

#include <fmt/format.h>

#include <ctime>

namespace kvant::serve::openai {
namespace {

const Json kNull;

}  // namespace

// ---- one choice

Generation::Choice::Choice(Generation& generation, int index, size_t prompt_index)
    : generation_(generation),
      index_(index),
      prompt_index_(prompt_index),
      text_stream_(
          *generation.context_.tokenizer,
          {.stop = generation.request().sampling.stop,
           .include_stop_str_in_output = generation.request().sampling.include_stop_str_in_output,
           .min_tokens = generation.request().sampling.min_tokens,
           .skip_special_tokens = generation.request().sampling.skip_special_tokens}) {
  if (!generation.input_.tools) return;
  ToolCallParserOptions options = *generation.input_.tools;
  options.id_seed += static_cast<uint64_t>(index);
  tools_.emplace(std::move(options));
}

// Text of the answer; calls of tools are taken out of it.
void Generation::Choice::add_text(std::string_view piece) {
  if (!tools_) {
    text_ += piece;
  } else {
    add_events(tools_->push(piece));
  }
}

void Generation::Choice::add_events(const std::vector<ToolEvent>& events) {
  const bool stream = generation_.request().stream;
  for (const ToolEvent& event : events) {
    if (event.kind == ToolEvent::Kind::kContent) {
      text_ += event.text;
      continue;
    }
    if (event.index > 0 && !generation_.request().parallel_tool_calls) continue;
    Json call;
    if (event.kind == ToolEvent::Kind::kCallBegin) {
      if (stream) call["index"] = event.index;
      call["id"] = event.id;
      call["type"] = "function";
      call["function"] = Json{{"name", event.name}, {"arguments", ""}};
    } else if (event.kind == ToolEvent::Kind::kArguments && stream) {
      call["index"] = event.index;
      call["function"] = Json{{"arguments", event.text}};
    } else if (event.kind == ToolEvent::Kind::kArguments) {
      tool_calls_.back()["function"]["arguments"].get_ref<std::string&>() += event.text;
      continue;
    } else {
      continue;
    }
    (stream ? tool_deltas_ : tool_calls_).push_back(std::move(call));
  }
}

void Generation::Choice::on_prompt(const PromptRecord& record) {
  const GenerationRequest& request = generation_.request();
  cached_tokens_ = record.cached_tokens;
  generation_.writer_->note(generation_.access_note());  // even if the client leaves
  const std::vector<int32_t>& prompt = generation_.prompt(prompt_index_);
  if (request.sampling.prompt_logprobs) {
    prompt_logprobs_ = record.logprobs;
    if (!prompt_logprobs_.empty()) prompt_logprobs_[0] = unscored(prompt[0]);
  }
  if (!request.echo) return;
  if (request.logprobs) tokens_ = prompt_logprobs_;
  if (request.return_token_ids) token_ids_ = prompt;
  const auto* given = std::get_if<std::string>(&request.prompts[prompt_index_]);
  if (given != nullptr) {
    text_ = *given;
  } else if (auto text = generation_.context_.tokenizer->decode(prompt); text) {
    text_ = *std::move(text);
  }
  if (request.stream) send_chunk(false);
}

bool Generation::Choice::on_token(const SampledToken& token, bool ends) {
  const GenerationRequest& request = generation_.request();
  ++output_tokens_;
  if (request.logprobs) tokens_.push_back(token);
  if (request.return_token_ids) token_ids_.push_back(token.id);
  // A token that ends the answer is no part of its text.
  if (!ends || request.sampling.include_stop_str_in_output) {
    add_text(text_stream_.push(token.id));
  }
  if (request.stream && has_news()) send_chunk(false);
  return !text_stream_.stopped();
}

void Generation::Choice::on_finish(const FinishRecord& record) {
  finish_ = record;
  add_text(text_stream_.finish());
  if (tools_) add_events(tools_->finish());
  if (generation_.request().stream) send_chunk(true);
  generation_.choice_finished();
}

std::string_view Generation::Choice::finish_reason() const {
  const bool calls = tools_ && tools_->num_calls() > 0 && finish_.reason == FinishReason::kStop;
  return calls ? "tool_calls" : finish_reason_name(finish_.reason);
}

Json Generation::Choice::stop_reason() const {
  if (text_stream_.stop_string()) return *text_stream_.stop_string();
  const bool asked_for = finish_.stop_token &&
                         !generation_.context_.tokenizer->is_end_of_generation(*finish_.stop_token);
  return asked_for ? Json(*finish_.stop_token) : Json();
}

Json Generation::Choice::logprobs_json() {
  const GenerationRequest& request = generation_.request();
  if (!request.logprobs) return {};
  const LogprobOptions options{.top = request.top_logprobs, .tokens_as_ids = request.tokens_as_ids};
  const model::Tokenizer& tokenizer = *generation_.context_.tokenizer;
  return request.chat ? chat_logprobs(tokenizer, tokens_, options)
                      : completion_logprobs(tokenizer, tokens_, options, text_offset_);
}

// The members of a chunk's choice, after its index.
std::string Generation::Choice::text_fields(bool last) {
  const GenerationRequest& request = generation_.request();
  std::string fields;
  if (!request.chat) {
    fields = fmt::format("\"text\":{}", quote_json(text_));
  } else {
    Json delta = Json::object();
    if (!text_.empty()) delta["content"] = text_;
    if (!tool_deltas_.empty()) delta["tool_calls"] = std::exchange(tool_deltas_, Json::array());
    fields = "\"delta\":" + dump_json(delta);
  }
  const bool has_logprobs = request.logprobs && !tokens_.empty();
  fields += fmt::format(",\"logprobs\":{}", has_logprobs ? dump_json(logprobs_json()) : "null");
  if (last) {
    fields += fmt::format(",\"finish_reason\":\"{}\",\"stop_reason\":{}", finish_reason(),
                          dump_json(stop_reason()));
  } else {
    fields += ",\"finish_reason\":null";
  }
  if (request.return_token_ids) fields += ",\"token_ids\":" + dump_json(token_ids_);
  return fields;
}

void Generation::Choice::send_chunk(bool last) {
  const GenerationRequest& request = generation_.request();
  std::optional<Json> usage;
  if (request.continuous_usage) {
    usage =
        usage_json({.prompt_tokens = static_cast<int64_t>(generation_.prompt(prompt_index_).size()),
                    .completion_tokens = output_tokens_,
                    .cached_tokens = cached_tokens_});
  }
  const Json* usage_field = usage ? &*usage : request.include_usage ? &kNull : nullptr;
  std::string bytes;
  const bool first = !std::exchange(sent_first_, true);
  const std::string ids =
      first && request.return_token_ids
          ? ",\"prompt_token_ids\":" + dump_json(generation_.prompt(prompt_index_))
          : std::string();
  const ChunkWriter& chunks = *generation_.chunks_;
  if (first && request.chat) {
    bytes = chunks.choice_with(
        index_, R"("delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null)",
        ids, usage_field);
  }
  std::string fields = text_fields(last);
  if (!request.chat) fields += ids;  // a member of the choice there
  bytes += chunks.choice(index_, fields, usage_field);
  text_.clear();
  tokens_.clear();
  token_ids_.clear();
  generation_.emit(std::move(bytes));
}

Json Generation::Choice::json() {
  const GenerationRequest& request = generation_.request();
  const model::Tokenizer& tokenizer = *generation_.context_.tokenizer;
  Json choice;
  choice["index"] = index_;
  if (request.chat) {
    Json message{{"role", "assistant"}, {"content", text_}};
    if (!tool_calls_.empty()) {
      if (text_.empty()) message["content"] = nullptr;
      message["tool_calls"] = tool_calls_;
    }
    choice["message"] = std::move(message);
  } else {
    choice["text"] = text_;
  }
  choice["logprobs"] = logprobs_json();
  choice["finish_reason"] = finish_reason();
  choice["stop_reason"] = stop_reason();
  if (request.return_token_ids) {
    choice["token_ids"] = token_ids_;
    if (!request.chat) choice["prompt_token_ids"] = generation_.prompt(prompt_index_);
  }
  if (!request.chat && request.sampling.prompt_logprobs && !request.echo) {
    choice["prompt_logprobs"] = prompt_logprobs_json(tokenizer, prompt_logprobs_);
  }
  return choice;
}

// ---- all of them

Generation::Generation(GenerationContext& context, GenerationInput input,
                       std::shared_ptr<http::ResponseWriter> writer)
    : context_(context),
      active_(context.active),
      input_(std::move(input)),
      writer_(std::move(writer)) {
  const bool chat = request().chat;
  head_.id = fmt::format("{}-{}", chat ? "chatcmpl" : "cmpl", input_.http->id);
  head_.object = !chat              ? "text_completion"
                 : request().stream ? "chat.completion.chunk"
                                    : "chat.completion";
  head_.created = std::time(nullptr);
  head_.model = input_.model_name;
  if (request().stream) chunks_.emplace(head_);
  for (size_t p = 0; p < input_.prompts.size(); ++p) {
    for (int n = 0; n < request().sampling.n; ++n) {
      choices_.push_back(std::make_unique<Choice>(*this, static_cast<int>(choices_.size()), p));
    }
  }
  unfinished_ = choices_.size();
  ++*active_;
}

Generation::~Generation() {
  --*active_;
}

Status Generation::start(GenerationContext& context, GenerationInput input,
                         std::shared_ptr<http::ResponseWriter> writer) {
  auto generation = std::make_shared<Generation>(context, std::move(input), std::move(writer));
  // Weak: the writer belongs to the generation.
  generation->writer_->on_closed([weak = std::weak_ptr(generation)] {
    if (const auto alive = weak.lock()) alive->cancel();
  });
  if (Status status = generation->submit_all(); !status) {
    generation->cancel();
    generation->writer_->send(error_response(to_api_error(status.error())));
    return status;
  }
  if (generation->request().stream) generation->open_stream();
  return {};
}

Status Generation::submit_all() {
  const int n = request().sampling.n;
  for (const std::unique_ptr<Choice>& choice : choices_) {
    Request part;
    part.prompt = prompt(choice->prompt_index_);
    part.sampling = request().sampling;
    part.choice = choice->index_ % n;
    part.constraint = input_.constraint;
    // Shares the ownership of the whole.
    part.listener = std::shared_ptr<RequestListener>(shared_from_this(), choice.get());
    part.cache_salt = combine_salts(input_.tenant.salt, request().cache_salt);
    part.tenant = input_.tenant.name;
    part.priority = request().priority;
    KVANT_ASSIGN(const RequestNumber number, context_.engine->submit(std::move(part)));
    const std::lock_guard lock(mutex_);
    numbers_.push_back(number);
    if (cancelled_) context_.engine->cancel(number);
  }
  return {};
}

void Generation::open_stream() {
  const std::lock_guard lock(mutex_);
  writer_->begin({.status = 200,
                  .content_type = "text/event-stream",
                  .headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}}});
  stream_open_ = true;
  if (!early_.empty()) writer_->write(std::exchange(early_, {}));
  if (stream_ended_) writer_->end();
}

void Generation::emit(std::string bytes) {
  const std::lock_guard lock(mutex_);
  if (cancelled_) return;
  if (!stream_open_) {
    early_ += bytes;
  } else {
    writer_->write(std::move(bytes));
  }
}

void Generation::finish_stream() {
  std::string bytes;
  if (const std::optional<ApiError> error = failure()) bytes += error_chunk(*error);
  if (request().include_usage) bytes += chunks_->usage_only(usage_json(usage()));
  bytes += kStreamEnd;
  emit(std::move(bytes));
  const std::lock_guard lock(mutex_);
  stream_ended_ = true;
  if (stream_open_) writer_->end();
}

void Generation::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  for (const RequestNumber number : numbers_) context_.engine->cancel(number);
}

void Generation::choice_finished() {
  if (--unfinished_ > 0) return;
  writer_->note(access_note());
  if (request().stream) {
    finish_stream();
  } else {
    context_.tasks->post_always([self = shared_from_this()] { self->send_response(); });
  }
}

void Generation::send_response() {
  if (const std::optional<ApiError> error = failure()) {
    writer_->send(error_response(*error));
    return;
  }
  Json json = head_json(head_);
  Json list = Json::array();
  for (const std::unique_ptr<Choice>& choice : choices_) list.push_back(choice->json());
  json["choices"] = std::move(list);
  json["usage"] = usage_json(usage());
  // Routers of separate prefill and decode workers read it: there is nothing to hand on.
  json["kv_transfer_params"] = nullptr;
  if (request().chat && request().sampling.prompt_logprobs) {
    json["prompt_logprobs"] =
        prompt_logprobs_json(*context_.tokenizer, choices_[0]->prompt_logprobs_);
  }
  if (request().chat && request().return_token_ids) json["prompt_token_ids"] = prompt(0);
  writer_->send({.body = dump_json(json)});
}

// What the client must not take for an answer.
std::optional<ApiError> Generation::failure() const {
  for (const std::unique_ptr<Choice>& choice : choices_) {
    const FinishRecord& finish = choice->finish_;
    if (finish.reason == FinishReason::kError) {
      ApiError error = to_api_error(
          finish.error.value_or(Error(ErrorCode::kInternal, "the engine failed on this request")));
      if (error.status < 500 && error.status != 429) error.status = 500;
      return error;
    }
    if (finish.reason == FinishReason::kShutdown) {
      return ApiError{
          .status = 503, .message = "the server is shutting down", .retry_after_seconds = 5};
    }
  }
  return std::nullopt;
}

// A prompt counts once, however many choices share it.
Usage Generation::usage() const {
  Usage usage;
  const size_t n = static_cast<size_t>(request().sampling.n);
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = *choices_[i];
    if (i % n == 0) {
      usage.prompt_tokens += static_cast<int64_t>(prompt(choice.prompt_index_).size());
      usage.cached_tokens += choice.cached_tokens_;
    }
    usage.completion_tokens += choice.output_tokens_;
  }
  return usage;
}

std::string Generation::access_note() const {
  const Usage used = usage();
  return fmt::format(
      "{}prompt={} cached={} output={}{}",
      input_.tenant.name.empty() ? std::string() : fmt::format("key={} ", input_.tenant.name),
      used.prompt_tokens, used.cached_tokens, used.completion_tokens,
      unfinished_ > 0 ? std::string() : fmt::format(" finish={}", choices_[0]->finish_reason()));
}

}  // namespace kvant::serve::openai
