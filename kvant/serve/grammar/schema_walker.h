// Writes one schema document into a grammar; json_schema.h is what others use. Single-thread.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/serve/grammar/grammar.h"
#include "kvant/serve/grammar/json_schema.h"
#include "kvant/serve/grammar/schema_merge.h"

namespace kvant::serve::grammar {

class SchemaWalker {
 public:
  SchemaWalker(JsonSchemaCompiler& compiler, const Json& document)
      : compiler_(compiler), builder_(compiler.builder_), document_(document) {}

  Result<NodeId> add(NodeId from);

 private:
  struct Place {
    std::string pointer;  // of the schema, for messages: "#/properties/a"
    int depth = 0;
    Place at(std::string_view token) const;
    Place at(std::string_view token, size_t index) const;
  };
  struct Property {
    std::string name;
    const Json* schema;
    bool required;
    Place place;
  };
  struct Count {
    uint32_t min = 0;
    uint32_t max = kUnbounded;
  };
  struct Object {
    std::vector<Property> properties;
    const Json* additional;  // nullptr: none allowed
    Place additional_place;
    Count count;
  };

  Error error(const Place& place, std::string_view what) const;
  Error unsupported(const Place& place, std::string_view keyword, std::string_view why) const;

  Result<NodeId> value(NodeId from, const Json& schema, const Place& place);
  Result<Json> merge(const Json& a, const Json& b, const Place& place);
  Status check_keywords(const Json& schema, const Place& place) const;
  Result<NodeId> reference(NodeId from, const Json& schema, const Place& place);
  Result<NodeId> all_of(NodeId from, const Json& schema, const Place& place);
  Result<NodeId> branches(NodeId from, const Json& schema, std::string_view keyword,
                          const Place& place);
  Result<NodeId> constants(NodeId from, const Json& schema, const Place& place);
  NodeId constant(NodeId from, const Json& value);
  Result<NodeId> of_types(NodeId from, const Json& schema, const Place& place);
  Result<NodeId> of_type(NodeId from, std::string_view type, const Json& schema,
                         const Place& place);
  Result<std::vector<std::string>> types(const Json& schema, const Place& place) const;

  Result<NodeId> string(NodeId from, const Json& schema, const Place& place);
  Status string_contents(RuleId rule, const Json& schema, const Place& place);
  Result<NodeId> number(NodeId from, const Json& schema, bool integer, const Place& place);
  Result<NodeId> array(NodeId from, const Json& schema, const Place& place);
  Result<NodeId> object(NodeId from, const Json& schema, const Place& place);
  Result<Object> read_object(const Json& schema, const Place& place) const;
  Status check_property_count(const Object& object, const Place& place) const;
  Result<NodeId> declared_members(NodeId from, const Object& object);
  Result<NodeId> map_members(NodeId from, const Object& object);
  Result<NodeId> additional_member(NodeId from, const Object& object);
  NodeId name_other_than(NodeId from, const std::vector<Property>& properties);
  NodeId comma(NodeId from);
  Result<Count> count(const Json& schema, std::string_view min, std::string_view max,
                      const Place& place) const;

  JsonSchemaCompiler& compiler_;
  GrammarBuilder& builder_;
  const Json& document_;
  std::map<std::string, RuleId> references_;  // by pointer
  size_t merged_values_ = 0;                  // of JSON, in all merges
};

}  // namespace kvant::serve::grammar
