// The architectures that kvant can run: an explicit table. Adding one: a file arch/<name>.cc that
// defines an Architecture, a declaration and a row here, a line in CMakeLists.txt.
#pragma once

#include <span>

#include "kvant/model/config.h"

namespace kvant::model {

extern const Architecture gemma3_architecture;
extern const Architecture llama_architecture;
extern const Architecture qwen2_architecture;
extern const Architecture qwen3_architecture;
extern const Architecture qwen3moe_architecture;

std::span<const Architecture* const> architectures();
// kUnsupported lists those that exist. Accepts either of an architecture's names.
Result<const Architecture*> find_architecture(std::string_view name);

}  // namespace kvant::model
