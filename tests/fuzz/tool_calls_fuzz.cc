// Answers that may hold tool calls: the events do not depend on how the text was cut, calls begin
// and end in order, and an answer without calls comes out as it was.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "kvant/serve/tools.h"

namespace {

using kvant::serve::ToolCallParser;
using kvant::serve::ToolEvent;

void require(bool condition) {
  if (!condition) std::abort();
}

void add(std::string& content, std::string& calls, bool& open,
         const std::vector<ToolEvent>& events) {
  for (const ToolEvent& event : events) {
    switch (event.kind) {
      case ToolEvent::Kind::kContent: require(!open), content += event.text; break;
      case ToolEvent::Kind::kCallBegin:
        require(!open), open = true, calls += "(" + event.name;
        break;
      case ToolEvent::Kind::kArguments: require(open), calls += event.text; break;
      case ToolEvent::Kind::kCallEnd: require(open), open = false, calls += ")"; break;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const auto style =
      data[0] % 2 == 0 ? kvant::serve::ToolCallStyle::kHermes : kvant::serve::ToolCallStyle::kJson;
  const std::string_view text(reinterpret_cast<const char*>(data + 2), size - 2);
  std::string content[2];
  std::string calls[2];
  int num_calls = 0;
  for (int round = 0; round < 2; ++round) {
    const size_t piece = round == 0 ? text.size() + 1 : 1 + data[1] % 16;
    ToolCallParser parser({.style = style, .names = {"f"}});
    bool open = false;
    for (size_t i = 0; i < text.size(); i += piece) {
      add(content[round], calls[round], open, parser.push(text.substr(i, piece)));
    }
    add(content[round], calls[round], open, parser.finish());
    require(!open);
    num_calls = parser.num_calls();
  }
  require(content[0] == content[1] && calls[0] == calls[1]);
  require(num_calls > 0 || content[0] == text);
  return 0;
}
