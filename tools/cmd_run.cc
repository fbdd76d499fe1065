// `kvant run`: answers a prompt or chats, streaming the text; says what the cache took.
#include <fmt/format.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvant/model/chat_template.h"
#include "kvant/model/generate.h"
#include "tools/command.h"
#include "tools/json_output.h"
#include "tools/model_options.h"
#include "tools/run_session.h"

namespace kvant::tools {
namespace {

using model::GenerateOptions;
using model::GenerateResult;
using model::GenerateStats;
using model::StopReason;

struct Options {
  ModelOptions model;
  std::vector<std::string> kv;
  std::string prompt;
  std::string file;
  std::string system;
  bool interactive = false;
  bool raw = false;
  bool context_shift = false;
  int64_t max_tokens = 512;
  std::optional<uint64_t> seed;
  model::SamplerOptions sampler;
  SessionFileOptions session;
};

// A model ready to talk, with one cache.
struct Engine {
  OpenModel open;
  KvChoice kv;
  std::unique_ptr<cache::KvCache> cache;
  std::optional<model::ChatTemplate> chat;  // none: --raw, or the file has none

  const model::Tokenizer& tokenizer() const { return *open.tokenizer; }
};

Status check(const Options& options) {
  const int sources = (options.prompt.empty() ? 0 : 1) + (options.file.empty() ? 0 : 1) +
                      (options.interactive ? 1 : 0);
  if (sources != 1) {
    return Error(ErrorCode::kInvalidArgument,
                 "give one of -p TEXT, -f FILE and -i (to chat), and no more");
  }
  if (options.interactive && options.raw) {
    return Error(ErrorCode::kInvalidArgument, "-i needs the chat template that --raw leaves out");
  }
  return model::check_sampler_options(options.sampler);
}

Result<std::optional<model::ChatTemplate>> open_template(const Options& options,
                                                         const OpenModel& open) {
  if (options.raw) return std::optional<model::ChatTemplate>();
  const model::Gguf& gguf = *open.model->source().gguf();
  if (!gguf.has("tokenizer.chat_template")) {
    if (!options.interactive && options.system.empty()) return std::optional<model::ChatTemplate>();
    return Error(ErrorCode::kUnsupported,
                 "the model has no chat template (it is a base model); use -p without --system");
  }
  KVANT_ASSIGN(model::ChatTemplate chat, model::ChatTemplate::create(gguf, *open.tokenizer));
  return std::optional<model::ChatTemplate>(std::move(chat));
}

Result<Engine> open_engine(Console& console, const Options& options) {
  Engine engine;
  KVANT_ASSIGN(const std::vector<KvChoice> kv, parse_kv(options.kv));
  engine.kv = kv.front();
  KVANT_TRY(check_session_files(options.session, engine.kv.format));
  KVANT_ASSIGN(engine.open, open_model(console, options.model));
  KVANT_TRY(need_tokenizer(engine.open));
  KVANT_ASSIGN(engine.chat, open_template(options, engine.open));
  KVANT_ASSIGN(model::RuntimeOptions runtime,
               runtime_options(options.model, engine.open, engine.kv.format));
  runtime.max_logit_rows = 1;
  KVANT_TRY(engine.open.model->reserve(runtime));
  // Pages that leave the process say which weights made them.
  const auto identity = options.session.any() ? model::Model::Identity::kWithWeights
                                              : model::Model::Identity::kGeometryOnly;
  KVANT_ASSIGN(engine.cache, engine.open.model->create_cache(runtime, identity));
  return engine;
}

GenerateOptions generate_options(const Options& options, const Engine& engine) {
  GenerateOptions generate;
  generate.max_tokens = options.max_tokens;
  generate.sampler = options.sampler;
  generate.sampler.seed = options.seed.value_or(
      static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count()));
  const std::span<const model::TokenId> ends = engine.tokenizer().end_of_generation();
  generate.end_ids.assign(ends.begin(), ends.end());
  generate.context_shift = options.context_shift;
  generate.keep_tokens = engine.tokenizer().adds_bos() ? 1 : 0;
  generate.cancel = &Console::stop_flag();
  return generate;
}

// Ids of a prompt, a rendered conversation or plain text.
Result<std::vector<int32_t>> encode_prompt(const Engine& engine, const std::string& text) {
  if (engine.chat) return model::encode_chat(engine.tokenizer(), text);
  return engine.tokenizer().encode(text, {.bos = model::Bos::kAsModel});
}

std::string cache_line(const KvChoice& kv, const cache::CacheBytes& bytes) {
  const int64_t now = bytes.stored_pages_now + bytes.bf16_pages_now;
  const int64_t bf16 = bytes.values_now * 2;
  return fmt::format(
      "cache    {} ({}): {} tokens in {}, {:.2f} bits/value; bf16 values would take {}", kv.asked,
      kv.resolved, bytes.tokens_now, format_bytes(now), bytes.bits_per_value(), format_bytes(bf16));
}

void note_stats(Console& console, const Engine& engine, const GenerateStats& stats) {
  console.note("");
  console.note(fmt::format(
      "prefill  {} tokens in {:.2f} s, {:.1f} tokens/s{}", stats.prefill_tokens,
      stats.prefill_seconds, stats.prefill_tokens_per_second(),
      stats.reused_tokens > 0 ? fmt::format(" ({} reused)", stats.reused_tokens) : std::string()));
  console.note(fmt::format("decode   {} tokens in {:.2f} s, {:.1f} tokens/s", stats.decode_tokens,
                           stats.decode_seconds, stats.decode_tokens_per_second()));
  console.note(cache_line(engine.kv, stats.cache));
}

Json stats_json(const GenerateOptions& options, const GenerateResult& result) {
  const GenerateStats& stats = result.stats;
  return {{"stop_reason", model::stop_reason_name(result.reason)},
          {"seed", options.sampler.seed},
          {"prompt_tokens", stats.prompt_tokens},
          {"generated_tokens", result.token_ids.size()},
          {"reused_tokens", stats.reused_tokens},
          {"prefill_tokens", stats.prefill_tokens},
          {"prefill_seconds", stats.prefill_seconds},
          {"prefill_tokens_per_second", stats.prefill_tokens_per_second()},
          {"decode_tokens", stats.decode_tokens},
          {"decode_seconds", stats.decode_seconds},
          {"decode_tokens_per_second", stats.decode_tokens_per_second()},
          {"context_tokens", stats.context_tokens},
          {"context_shifts", stats.context_shifts},
          {"cache", cache_json(stats.cache)}};
}

// Generates and streams to stdout, unless the output is JSON. Returns the text too.
struct Answer {
  GenerateResult result;
  std::string text;
};
Result<Answer> answer(Console& console, Engine& engine, model::Session& session,
                      std::span<const int32_t> prompt, GenerateOptions options) {
  Answer answer;
  model::StreamDecoder decoder(engine.tokenizer());
  const auto show = [&](const std::string& piece) -> Status {
    answer.text += piece;
    if (console.json() || piece.empty()) return {};
    KVANT_TRY(console.print(piece));
    return console.flush();
  };
  std::optional<Progress> progress;
  options.on_prefill = [&](int64_t done, int64_t total) {
    if (!progress) progress.emplace(console, "reading the prompt", total, "tokens");
    progress->update(done);
  };
  KVANT_ASSIGN(answer.result, session.generate(prompt, options, [&](int32_t id) {
    progress.reset();
    return show(decoder.push(id));
  }));
  progress.reset();
  KVANT_TRY(show(decoder.finish()));
  if (!console.json()) {
    KVANT_TRY(console.print("\n"));
    KVANT_TRY(console.flush());
  }
  return answer;
}

std::vector<model::ChatMessage> opening(const Options& options) {
  std::vector<model::ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  return messages;
}

Status run_once(Console& console, const Options& options, Engine& engine) {
  std::string text = options.prompt;
  if (!options.file.empty()) {
    KVANT_ASSIGN(text, read_file(options.file));
  }
  if (engine.chat) {
    std::vector<model::ChatMessage> messages = opening(options);
    messages.push_back({"user", text});
    KVANT_ASSIGN(text, engine.chat->render(messages));
  } else if (!options.raw) {
    console.note("the model has no chat template: the text is continued as it is");
  }
  KVANT_ASSIGN(const std::vector<int32_t> prompt, encode_prompt(engine, text));
  const GenerateOptions generate = generate_options(options, engine);
  KVANT_ASSIGN(model::Session session, model::Session::create(*engine.open.model, *engine.cache));
  SessionFiles files(options.session);
  KVANT_TRY(files.restore(*engine.cache, session));
  KVANT_ASSIGN(const Answer done, answer(console, engine, session, prompt, generate));
  note_stats(console, engine, done.result.stats);
  files.note_first_answer(console, done.result.stats);
  KVANT_TRY(files.save(console, *engine.cache, session));
  if (console.json()) {
    Json json = json_object("run");
    json["model"] = options.model.model;
    json["kv"] = engine.kv.asked;
    json["kv_resolved"] = engine.kv.resolved;
    json["prompt_ids"] = prompt;
    json["token_ids"] = done.result.token_ids;
    json["text"] = done.text;
    json["stats"] = stats_json(generate, done.result);
    if (options.session.any()) json["session"] = files.json();
    KVANT_TRY(print_json(console, json));
  }
  if (done.result.reason == StopReason::kContextFull) {
    console.warn(
        fmt::format("the context of {} tokens is full; -c raises it, --context-shift drops "
                    "its older half and goes on",
                    engine.open.model->context_tokens()));
  }
  if (done.result.reason == StopReason::kCancelled) return Console::cancelled();
  return {};
}

// One line of a chat; false at the end of the input.
Result<bool> ask(Console& console, LineReader& lines, std::string& line) {
  if (isatty(STDIN_FILENO) != 0 && !console.quiet()) {
    std::fputs("> ", stderr);
    std::fflush(stderr);
  }
  return lines.next(line);
}

// Asks and answers until the input or the context ends.
Status chat(Console& console, const Options& options, Engine& engine, model::Session& session,
            SessionFiles& files) {
  std::vector<model::ChatMessage> messages = opening(options);
  LineReader lines;
  std::string line;
  console.note("chat: one message a line; Ctrl-D or an empty line ends it");
  GenerateOptions generate = generate_options(options, engine);
  for (;;) {
    KVANT_ASSIGN(const bool more, ask(console, lines, line));
    if (!more || line.empty()) return {};
    messages.push_back({"user", line});
    KVANT_ASSIGN(const std::string text, engine.chat->render(messages));
    KVANT_ASSIGN(const std::vector<int32_t> prompt, encode_prompt(engine, text));
    KVANT_ASSIGN(const Answer done, answer(console, engine, session, prompt, generate));
    ++generate.sampler.seed;  // another draw for another turn
    messages.push_back({"assistant", done.text});
    note_stats(console, engine, done.result.stats);
    files.note_first_answer(console, done.result.stats);
    if (done.result.reason == StopReason::kCancelled) return Console::cancelled();
    if (done.result.reason == StopReason::kContextFull) {
      return Error(
          ErrorCode::kResourceExhausted,
          fmt::format("the context of {} tokens is full and the chat ends; raise it with -c, "
                      "or let it drop its older half with --context-shift",
                      engine.open.model->context_tokens()));
    }
  }
}

Status run_chat(Console& console, const Options& options, Engine& engine) {
  if (console.json()) {
    return Error(ErrorCode::kInvalidArgument, "--json prints one answer; use it with -p or -f");
  }
  KVANT_ASSIGN(model::Session session, model::Session::create(*engine.open.model, *engine.cache));
  SessionFiles files(options.session);
  KVANT_TRY(files.restore(*engine.cache, session));
  const Status ended = chat(console, options, engine, session, files);
  // A chat that ended badly is kept all the same; why it did is what counts.
  const Status saved = files.save(console, *engine.cache, session);
  if (!ended && !saved) console.warn(saved.error().message());
  return ended ? saved : ended;
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_kv_option(app, options->kv, KvOption::kOne);
  app.add_option("-p,--prompt", options->prompt, "The prompt")->type_name("TEXT");
  app.add_option("-f,--file", options->file, "File with the prompt; - is standard input");
  app.add_flag("-i,--interactive", options->interactive, "Chat: one message a line");
  app.add_option("--system", options->system, "System message")->type_name("TEXT");
  app.add_flag("--raw", options->raw, "No chat template: the text is continued as it is");
  app.add_option("-n,--tokens", options->max_tokens,
                 "Most tokens to generate; -1: until the answer or the context ends")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 30))
      ->capture_default_str();
  app.add_option("--seed", options->seed, "Seed of the random numbers (default: the time)");
  model::SamplerOptions& sampler = options->sampler;
  app.add_option("--temp", sampler.temperature, "Temperature; 0 takes the best token")
      ->capture_default_str();
  app.add_option("--top-k", sampler.top_k, "Keep the K best tokens; 0: all")->capture_default_str();
  app.add_option("--top-p", sampler.top_p, "Keep the best tokens of this probability together")
      ->capture_default_str();
  app.add_option("--min-p", sampler.min_p,
                 "Drop tokens below this fraction of the best's probability")
      ->capture_default_str();
  app.add_option("--repeat-penalty", sampler.repeat_penalty,
                 "Make the last 64 tokens less probable; 1: do not")
      ->capture_default_str();
  app.add_flag("--context-shift", options->context_shift,
               "A full context drops its older half and goes on");
  add_session_file_options(app, options->session);
  return [options](Console& console) -> Status {
    KVANT_TRY(check(*options));
    KVANT_ASSIGN(Engine engine, open_engine(console, *options));
    return options->interactive ? run_chat(console, *options, engine)
                                : run_once(console, *options, engine);
  };
}

}  // namespace

const Command run_command = {
    .name = "run",
    .summary = "Answer a prompt, or chat, with a quantised KV cache",
    .examples =
        "kvant run smollm2.gguf -p \"Why is the sky blue?\"\n"
        "kvant run smollm2.gguf -i --kv 8bit -c 4096\n"
        "kvant run smollm2.gguf -f report.txt --save-session report.session\n"
        "kvant run smollm2.gguf -p \"Once upon a time\" --raw --temp 0 -n 50 --json",
    .define = define,
};

}  // namespace kvant::tools
