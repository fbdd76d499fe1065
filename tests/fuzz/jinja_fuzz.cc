// Hostile chat templates: parsing and rendering must end, within bounds, without a crash.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kvant/model/jinja.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using kvant::model::jinja::Dict;
  using kvant::model::jinja::Template;
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  const kvant::Result<Template> parsed = Template::parse(source);
  if (!parsed) return 0;
  static const Dict variables = [] {
    const auto messages = kvant::model::jinja::from_json(
        R"([{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Grüße 😀 "},
            {"role": "assistant", "content": null, "tool_calls": [{"name": "f", "arguments": {"a": 1.5}}]}])");
    Dict out;
    out.set("messages", *messages);
    out.set("tools", *messages);
    out.set("x", kvant::model::jinja::Value("text"));
    out.set("n", kvant::model::jinja::Value(int64_t{7}));
    return out;
  }();
  (void)parsed->render(variables, 0, {.work = 1 << 20, .output_bytes = 1 << 16});
  return 0;
}
