// Hostile JSON schemas and regular expressions: compiling ends within bounds, and whatever compiles
// can be walked: allowed tokens are accepted, and a whole text of a schema is JSON.
//
// The first byte chooses the kind; the schema or expression goes up to a zero byte, and what
// follows chooses tokens.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kvant/serve/grammar/constraint.h"

namespace {

using namespace kvant::serve::grammar;

const std::shared_ptr<const Vocabulary>& vocabulary() {
  static const std::shared_ptr<const Vocabulary> instance = [] {
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    for (const char* piece :
         {"\":", "\",", "{\"", "}}", "],", "ab", "12", "\n  ", ".5", "\xc3\xa9"}) {
      tokens.emplace_back(piece);
    }
    tokens.emplace_back();
    return std::make_shared<Vocabulary>(tokens, std::vector<int32_t>{266});
  }();
  return instance;
}

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const bool is_schema = data[0] % 4 != 0;
  const std::string input(reinterpret_cast<const char*>(data + 1), size - 1);
  const size_t zero = std::min(input.find('\0'), input.size());
  auto grammar = compile_grammar(
      {.kind = is_schema ? ConstraintSpec::Kind::kJsonSchema : ConstraintSpec::Kind::kRegex,
       .text = input.substr(0, zero)});
  if (!grammar) return 0;
  const auto source = make_constraint_source(std::move(grammar).value(), vocabulary());
  auto constraint = source->create();
  std::vector<uint32_t> mask((vocabulary()->size() + 31) / 32);
  std::string text;
  for (size_t step = 0; step < 40; ++step) {
    constraint->allowed(mask);
    std::vector<int32_t> ids;
    for (size_t id = 0; id < vocabulary()->size(); ++id) {
      if (mask[id / 32] >> (id % 32) & 1) ids.push_back(static_cast<int32_t>(id));
    }
    require(!ids.empty());
    const size_t choice =
        zero + 1 + step < input.size() ? static_cast<uint8_t>(input[zero + 1 + step]) : step;
    const int32_t id = ids[choice % ids.size()];
    if (step % 8 == 7) constraint = constraint->clone();
    require(constraint->accept(id));
    if (id == 266) break;
    text += vocabulary()->token(id);
    require(!is_schema || !constraint->is_complete() || nlohmann::json::accept(text));
  }
  return 0;
}
