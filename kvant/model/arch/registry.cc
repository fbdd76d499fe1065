#include "kvant/model/arch/registry.h"

#include <array>
#include <string>

namespace kvant::model {

std::span<const Architecture* const> architectures() {
  static constexpr std::array kTable = {
      &llama_architecture,  &qwen2_architecture,    &qwen3_architecture,
      &gemma3_architecture, &qwen3moe_architecture,
  };
  return kTable;
}

Result<const Architecture*> find_architecture(std::string_view name) {
  std::string known;
  for (const Architecture* architecture : architectures()) {
    if (name == architecture->name || name == architecture->hf_type) return architecture;
    known += known.empty() ? "" : ", ";
    known += architecture->name;
  }
  return Error(ErrorCode::kUnsupported,
               "the model's architecture is '" + std::string(name) + "'; this build runs " + known);
}

}  // namespace kvant::model
