// Errors and limits of chat templates. What the constructs do: tests/golden/chat_golden_test.cc.
#include "kvant/model/chat_template.h"

#include <gtest/gtest.h>

#include "kvant/model/testing/gguf_builder.h"

namespace kvant::model {
namespace {

// The text, or the error's message after "error: ".
std::string render(std::string_view source, std::string_view messages = "[]",
                   const ChatOptions& options = {}) {
  const Result<ChatTemplate> parsed = ChatTemplate::parse(source, "<bos>", "<eos>");
  if (!parsed) return "error: " + parsed.error().message();
  const Result<std::string> text = parsed->render_json(messages, options);
  return text ? *text : "error: " + text.error().message();
}

ErrorCode code(std::string_view source) {
  const Result<ChatTemplate> parsed = ChatTemplate::parse(source, "", "");
  if (!parsed) return parsed.error().code();
  const Result<std::string> text = parsed->render_json("[]");
  return text ? ErrorCode::kInternal : text.error().code();
}

TEST(ChatTemplate, RendersMessages) {
  const Result<ChatTemplate> parsed = ChatTemplate::parse(
      "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
      "{% if add_generation_prompt %}[assistant]{% endif %}",
      "<s>", "</s>");
  ASSERT_TRUE(parsed);
  const std::vector<ChatMessage> messages = {{"system", "Be brief."}, {"user", "Hi 😀\xff"}};
  EXPECT_EQ(parsed->render(messages).value(), "<s>[system]Be brief.[user]Hi 😀\xff[assistant]");
  EXPECT_EQ(parsed->render(messages, {.add_generation_prompt = false}).value(),
            "<s>[system]Be brief.[user]Hi 😀\xff");
  EXPECT_FALSE(parsed->render_json("[{]"));
  EXPECT_FALSE(parsed->render_json("{}"));
}

TEST(ChatTemplate, NamesWhatIsNotSupportedAndItsLine) {
  EXPECT_EQ(render("a\nb\n{% include 'x' %}"),
            "error: chat template, line 3: the statement {% include %} is not supported");
  EXPECT_EQ(render("\n{{ messages | nosuch }}"),
            "error: chat template, line 2: the filter \"nosuch\" is not supported");
  EXPECT_EQ(render("{{ messages is nosuch }}"),
            "error: chat template, line 1: the test \"nosuch\" is not supported");
  EXPECT_EQ(render("{{ nosuch() }}"),
            "error: chat template, line 1: the function nosuch() is not supported");
  EXPECT_EQ(render("{{ 'a'.nosuch() }}"),
            "error: chat template, line 1: the string method nosuch() is not supported");
  EXPECT_EQ(render("{% for a in [1] recursive %}{% endfor %}"),
            "error: chat template, line 1: a recursive loop is not supported");
  EXPECT_EQ(render("{{ '%s' % 1 }}"),
            "error: chat template, line 1: formatting a string with % is not supported");
  for (const char* source : {"{% block a %}{% endblock %}", "{% call f() %}{% endcall %}",
                             "{{ f(*messages) }}", "{% for i in [1] %}{{ loop }}{% endfor %}",
                             "{% for i in [1] %}{{ loop.changed(i) }}{% endfor %}"}) {
    EXPECT_EQ(code(source), ErrorCode::kUnsupported) << source;
  }
}

TEST(ChatTemplate, SaysWhatIsWrong) {
  EXPECT_EQ(render("{{ raise_exception('roles must alternate') }}"),
            "error: the chat template refuses this conversation: roles must alternate");
  EXPECT_EQ(render("\n\n{{ user.name }}"),
            "error: chat template, line 3: \"user\" is undefined, so it has no \"name\"");
  EXPECT_EQ(render("{{ 1 + 'a' }}"),
            "error: chat template, line 1: a int + a string has no meaning");
  EXPECT_EQ(render("{% if true %}"),
            "error: chat template, line 1: a block is not closed by {% endif %}");
  EXPECT_EQ(render("{{ 9223372036854775807 + 1 }}"),
            "error: chat template, line 1: an integer leaves 64 bits");
  EXPECT_EQ(render("{{ 99999999999999999999 }}"),
            "error: chat template, line 1: the number 99999999999999999999 is out of range");
  EXPECT_EQ(code("{{ (-9223372036854775807 - 1) // -1 }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(render("{{ (-9223372036854775807 - 1) % -1 }}"), "0");
}

TEST(ChatTemplate, BoundsWorkTextAndRecursion) {
  const auto repeat = [](std::string_view unit, int count) {
    std::string out;
    for (int i = 0; i < count; ++i) out += unit;
    return out;
  };
  EXPECT_EQ(code("{{ 'x' * 99999999999 }}"), ErrorCode::kResourceExhausted);
  EXPECT_EQ(code("{{ range(9999999) | list | length }}{{ range(9999999) | list | length }}"),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ(code("{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}"),
            ErrorCode::kResourceExhausted);
  // Shared parts: the text is 2^60 times longer than the template.
  EXPECT_EQ(code("{% set ns = namespace(x=['abc']) %}{% for i in range(60) %}"
                 "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ(code("{% set ns = namespace(x=['abc'], y=['abc']) %}{% for i in range(60) %}"
                 "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
                 "{{ ns.x == ns.y }}"),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ(code("{% set ns = namespace(x='abc') %}{% for i in range(60) %}"
                 "{% set ns.x = ns.x + ns.x %}{% endfor %}"),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ(code("{% set x = 'a' * 9999 %}{{ (x * 999).replace('a', x) }}"),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ(code("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("{{ " + repeat("(", 100000) + " }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("{{ " + repeat("not ", 100000) + "1 }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("{{ " + repeat("-", 100000) + "1 }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("{{ 1" + repeat("+1", 100000) + " }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("{{ 1" + repeat("|abs", 100000) + " }}"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(repeat("{% if 1 %}", 100000)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(render("{{ messages }}", repeat("[", 100000)).substr(0, 6), "error:");
  // Namespaces can point to each other; nothing leaks or loops.
  EXPECT_EQ(render("{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = b %}"
                   "{{ a.b.a.b == b }}"),
            "True");
}

TEST(ChatTemplate, AddsBosOnceToAConversation) {
  testing::GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2")
      .string("tokenizer.ggml.pre", "llama-bpe")
      .strings("tokenizer.ggml.tokens", {"a", "<s>"})
      .array<int32_t>("tokenizer.ggml.token_type", GgufValueType::kI32, {1, 3})
      .strings("tokenizer.ggml.merges", {})
      .u32("tokenizer.ggml.bos_token_id", 1)
      .string("tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}");
  const std::vector<std::byte> file = builder.build();
  const Result<Gguf> gguf = Gguf::parse(file, "test");
  ASSERT_TRUE(gguf);
  const Result<Tokenizer> tokenizer = Tokenizer::create(*gguf);
  ASSERT_TRUE(tokenizer) << tokenizer.error().message();
  const Result<ChatTemplate> chat = ChatTemplate::create(*gguf, *tokenizer);
  ASSERT_TRUE(chat);
  const std::vector<ChatMessage> messages = {{"user", "a"}};
  EXPECT_EQ(encode_chat(*tokenizer, chat->render(messages).value()).value(),
            (std::vector<TokenId>{1, 0}));
  EXPECT_EQ(encode_chat(*tokenizer, "a").value(), (std::vector<TokenId>{1, 0}));
}

}  // namespace
}  // namespace kvant::model
