// One completion request under way: its choices in the engine, their text, and the response.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kvant/model/tokenizer.h"
#include "kvant/serve/engine.h"
#include "kvant/serve/http/message.h"
#include "kvant/serve/openai/api_keys.h"
#include "kvant/serve/openai/format.h"
#include "kvant/serve/openai/generation_request.h"
#include "kvant/serve/openai/task_threads.h"
#include "kvant/serve/openai/text_stream.h"
#include "kvant/serve/tools.h"

namespace kvant::serve::openai {

// What generations share; outlives them.
struct GenerationContext {
  Engine* engine = nullptr;
  const model::Tokenizer* tokenizer = nullptr;
  TaskThreads* tasks = nullptr;
  // Generations that have not ended; the engine may let go of the last one late.
  std::shared_ptr<std::atomic<int64_t>> active = std::make_shared<std::atomic<int64_t>>(0);
};

struct GenerationInput {
  GenerationRequest request;
  std::string model_name;  // as the response says it
  std::vector<std::vector<int32_t>> prompts;
  std::shared_ptr<const ConstraintSource> constraint;  // may be null
  std::optional<ToolCallParserOptions> tools;          // none: the answer is text
  Tenant tenant;
  std::shared_ptr<const http::HttpRequest> http;
};

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  // Hands the choices to the engine; from then on the generation lives by itself until the response
  // has ended or the client has left. An error (already sent to the client) if the engine takes
  // none.
  static Status start(GenerationContext& context, GenerationInput input,
                      std::shared_ptr<http::ResponseWriter> writer);

  Generation(GenerationContext& context, GenerationInput input,
             std::shared_ptr<http::ResponseWriter> writer);
  ~Generation();

 private:
  // One sequence of the engine. Its members are the engine thread's until it has finished.
  class Choice : public RequestListener {
   public:
    Choice(Generation& generation, int index, size_t prompt_index);
    void on_prompt(const PromptRecord& record) override;
    bool on_token(const SampledToken& token, bool ends) override;
    void on_finish(const FinishRecord& record) override;

    Json json();  // of a whole response

   private:
    friend class Generation;
    void add_text(std::string_view piece);
    void add_events(const std::vector<ToolEvent>& events);
    bool has_news() const { return !text_.empty() || !tool_deltas_.empty(); }
    void send_chunk(bool last);
    std::string text_fields(bool last);
    Json logprobs_json();
    std::string_view finish_reason() const;
    Json stop_reason() const;

    Generation& generation_;
    const int index_;
    const size_t prompt_index_;
    TextStream text_stream_;
    std::optional<ToolCallParser> tools_;
    std::string text_;                  // not sent yet
    std::vector<SampledToken> tokens_;  // the same, if log-probabilities are wanted
    std::vector<int32_t> token_ids_;    // the same, if ids are wanted
    Json tool_deltas_ = Json::array();  // the same, of a stream
    Json tool_calls_ = Json::array();   // whole, otherwise
    std::vector<SampledToken> prompt_logprobs_;
    int64_t text_offset_ = 0;
    int64_t output_tokens_ = 0;
    bool sent_first_ = false;
    int64_t cached_tokens_ = 0;
    FinishRecord finish_;
  };

  const GenerationRequest& request() const { return input_.request; }
  const std::vector<int32_t>& prompt(size_t index) const { return input_.prompts[index]; }
  Status submit_all();
  void open_stream();
  void emit(std::string bytes);
  void finish_stream();
  void cancel();
  void choice_finished();
  void send_response();
  std::optional<ApiError> failure() const;
  Usage usage() const;
  std::string access_note() const;

  GenerationContext& context_;
  const std::shared_ptr<std::atomic<int64_t>> active_;
  GenerationInput input_;
  std::shared_ptr<http::ResponseWriter> writer_;
  ResponseHead head_;
  std::optional<ChunkWriter> chunks_;
  std::vector<std::unique_ptr<Choice>> choices_;
  size_t unfinished_;  // the engine thread's

  std::mutex mutex_;
  std::vector<RequestNumber> numbers_;
  bool cancelled_ = false;
  bool stream_open_ = false;
  bool stream_ended_ = false;
  std::string early_;  // came before the stream was open
};

}  // namespace kvant::serve::openai
