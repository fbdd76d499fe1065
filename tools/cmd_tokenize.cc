// `kvant tokenize`: text to token ids and back.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <cstdint>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/model/tokenizer.h"
#include "tools/command.h"
#include "tools/json_strings.h"

namespace kvant::tools {
namespace {

using model::TokenId;
using model::Tokenizer;

struct Options {
  std::string model;
  bool lines = false;
  bool decode = false;
  bool bos = false;
  bool no_special = false;
};

Result<std::string> encode(const Tokenizer& tokenizer, const Options& options,
                           std::string_view text) {
  const model::EncodeOptions how = {
      .bos = options.bos ? model::Bos::kAlways : model::Bos::kNone,
      .special = options.no_special ? model::SpecialInText::kIgnore : model::SpecialInText::kParse};
  KVANT_ASSIGN(const std::vector<TokenId> ids, tokenizer.encode(text, how));
  return fmt::format("[{}]\n", fmt::join(ids, ","));
}

Result<std::vector<TokenId>> parse_ids(std::string_view text) {
  const nlohmann::json parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto wrong = [](std::string_view what) {
    return Error(ErrorCode::kCorruptData,
                 fmt::format("expected a JSON array of token ids such as [1,15,42]: {}", what));
  };
  if (!parsed.is_array()) return wrong("this is no JSON array");
  std::vector<TokenId> ids;
  ids.reserve(parsed.size());
  for (const nlohmann::json& item : parsed) {
    const bool fits = item.is_number_unsigned() &&
                      item.get<uint64_t>() <= uint64_t{std::numeric_limits<TokenId>::max()};
    if (!fits) return wrong(fmt::format("item {} is no id", ids.size()));
    ids.push_back(item.get<TokenId>());
  }
  return ids;
}

Result<std::string> decode(const Tokenizer& tokenizer, const Options& options,
                           std::string_view text) {
  KVANT_ASSIGN(std::vector<TokenId> ids, parse_ids(text));
  std::span<const TokenId> rest = ids;
  if (options.bos && !rest.empty() && rest.front() == tokenizer.bos()) rest = rest.subspan(1);
  return tokenizer.decode(rest);
}

Status tokenize_lines(Console& console, const Tokenizer& tokenizer, const Options& options) {
  LineReader reader;
  std::string line;
  for (int64_t number = 1;; ++number) {
    KVANT_ASSIGN(const bool more, reader.next(line));
    if (!more) return {};
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string context = fmt::format("line {}", number);
    if (options.decode) {
      const Result<std::string> text = decode(tokenizer, options, line);
      if (!text) return text.error().with_context(context);
      KVANT_TRY(console.print(write_json_string(*text) + '\n'));
      continue;
    }
    const Result<std::string> text = parse_json_string(line);
    if (!text) return text.error().with_context(context);
    const Result<std::string> ids = encode(tokenizer, options, *text);
    if (!ids) return ids.error().with_context(context);
    KVANT_TRY(console.print(*ids));
  }
}

Status run(Console& console, const Options& options) {
  KVANT_ASSIGN(const model::Gguf gguf, model::Gguf::open(options.model));
  KVANT_ASSIGN(const Tokenizer tokenizer, Tokenizer::create(gguf));
  if (options.lines) return tokenize_lines(console, tokenizer, options);
  KVANT_ASSIGN(const std::string input, read_stdin());
  KVANT_ASSIGN(const std::string output, options.decode ? decode(tokenizer, options, input)
                                                        : encode(tokenizer, options, input));
  return console.print(output);
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("MODEL", options->model, "GGUF file")->required();
  app.add_flag("--lines", options->lines,
               "One text a line, as a JSON string; bytes that are not UTF-8 as \\udcNN");
  app.add_flag("--decode", options->decode,
               "The other way: from a JSON array of ids to the bytes of the text");
  app.add_flag("--bos", options->bos,
               "Put the token for the beginning of a text in front (--decode: drop it)");
  app.add_flag("--no-special", options->no_special,
               "Control tokens in the text, such as <|im_start|>, are ordinary text");
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Command tokenize_command = {
    .name = "tokenize",
    .summary = "Turn the text on standard input into token ids, or back",
    .examples =
        "printf 'Hello, world' | kvant tokenize model.gguf\n"
        "echo '[19556,28,905]' | kvant tokenize model.gguf --decode",
    .json = JsonOutput::kNone,
    .define = define,
};

}  // namespace kvant::tools
