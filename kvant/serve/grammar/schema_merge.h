// What two JSON schemas demand together: allOf, and keywords beside $ref, anyOf and oneOf.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "kvant/base/result.h"

namespace kvant::serve::grammar {

using Json = nlohmann::ordered_json;

enum class Keyword { kUnknown, kAnnotation, kSupported };
// Whether a keyword restricts values, and is known to.
Keyword keyword_kind(std::string_view name);

// Whether a schema restricts values by anything but `except`.
bool has_assertions_beside(const Json& schema, std::string_view except);

// The target of a reference into the document; nullptr if there is none.
const Json* find_reference(const Json& document, std::string_view reference);

// A schema that both satisfy; what a keyword cannot say is left as allOf of parts that can.
// kUnsupported names a keyword that cannot be merged.
Result<Json> merge_schemas(const Json& a, const Json& b);

// True if no value satisfies both, by their types, constants or required constant properties; false
// if unknown. References are followed in `document`.
bool exclude_each_other(const Json& document, const Json& a, const Json& b);

// Whether `value` is of the type that JSON schema calls `name`.
bool is_of_type(const Json& value, std::string_view name);

}  // namespace kvant::serve::grammar
