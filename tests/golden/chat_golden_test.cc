// Chat templates against tests/golden/chat/golden.json, which Python's jinja2 made (make_golden.py
// beside it).
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "kvant/model/chat_template.h"
#include "tests/support/program.h"

namespace kvant::model {
namespace {

using Json = nlohmann::ordered_json;

const Json& golden() {
  static const Json file = [] {
    setenv("TZ", "UTC", 1);
    std::ifstream in(KVANT_GOLDEN_DIR "/chat/golden.json");
    return Json::parse(in);
  }();
  return file;
}

ChatOptions options() {
  ChatOptions out;
  out.variables_json = golden()["variables"].dump();
  out.now = golden()["now"].get<int64_t>();
  return out;
}

TEST(ChatGolden, RendersEveryConstructAsJinja2Does) {
  const std::string messages = golden()["variables"]["messages"].dump();
  ASSERT_GE(golden()["snippets"].size(), 60u);
  for (const Json& snippet : golden()["snippets"]) {
    const std::string source = snippet["template"];
    const Result<ChatTemplate> parsed = ChatTemplate::parse(source, "<bos>", "<eos>");
    ASSERT_TRUE(parsed) << source << "\n" << parsed.error().message();
    const Result<std::string> text = parsed->render_json(messages, options());
    ASSERT_TRUE(text) << source << "\n" << text.error().message();
    EXPECT_EQ(*text, snippet["expected"].get<std::string>()) << source;
  }
}

TEST(ChatGolden, FailsWhereJinja2Fails) {
  for (const Json& source : golden()["failing"]) {
    const Result<ChatTemplate> parsed = ChatTemplate::parse(source.get<std::string>(), "", "");
    if (!parsed) continue;
    EXPECT_FALSE(parsed->render_json("[]", options())) << source;
  }
}

void compare_model(const std::string& path) {
  const Result<Gguf> gguf = Gguf::open(path);
  ASSERT_TRUE(gguf) << gguf.error().message();
  const Result<Tokenizer> tokenizer = Tokenizer::create(*gguf);
  ASSERT_TRUE(tokenizer) << tokenizer.error().message();
  const Result<ChatTemplate> chat = ChatTemplate::create(*gguf, *tokenizer);
  ASSERT_TRUE(chat) << chat.error().message();
  const Json& expected = golden()["models"][path.substr(path.rfind('/') + 1)];
  const Json& chats = golden()["chats"];
  ASSERT_EQ(expected.size(), chats.size());
  for (size_t i = 0; i < chats.size(); ++i) {
    ChatOptions how;
    how.add_generation_prompt = chats[i].value("add_generation_prompt", true);
    if (chats[i].contains("tools")) how.tools_json = chats[i]["tools"].dump();
    const Result<std::string> text = chat->render_json(chats[i]["messages"].dump(), how);
    ASSERT_TRUE(text) << i << ": " << text.error().message();
    EXPECT_EQ(*text, expected[i].get<std::string>()) << i;
  }
}

TEST(ChatGolden, SmolLm2) {
  const std::string path = testing::model_path("smollm2");
  ASSERT_NE(path, "") << "run scripts/fetch_model.sh smollm2";
  compare_model(path);
}

TEST(ChatGolden, Qwen) {
  const std::string path = testing::model_path("qwen");
  if (path.empty()) GTEST_SKIP() << "not fetched: scripts/fetch_model.sh qwen";
  compare_model(path);
}

TEST(ChatGolden, Gemma3IsABaseModelWithoutTemplate) {
  const std::string path = testing::model_path("gemma3");
  if (path.empty()) GTEST_SKIP() << "not fetched: scripts/fetch_model.sh gemma3";
  const Result<Gguf> gguf = Gguf::open(path);
  ASSERT_TRUE(gguf);
  const Result<Tokenizer> tokenizer = Tokenizer::create(*gguf);
  ASSERT_TRUE(tokenizer);
  EXPECT_EQ(ChatTemplate::create(*gguf, *tokenizer).error().code(), ErrorCode::kNotFound);
}

}  // namespace
}  // namespace kvant::model
