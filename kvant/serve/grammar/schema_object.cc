// Objects of SchemaWalker.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "kvant/serve/grammar/char_set.h"
#include "kvant/serve/grammar/schema_walker.h"

namespace kvant::serve::grammar {
namespace {

const Json kAnything = Json(true);

// Characters of valid UTF-8; the schema's parser has checked it.
std::vector<char32_t> characters(std::string_view text) {
  std::vector<char32_t> out;
  for (size_t i = 0; i < text.size();) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const int length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    char32_t c = length == 1 ? byte : byte & (0x7fu >> length);
    for (int k = 1; k < length; ++k) {
      c = c << 6 | (static_cast<unsigned char>(text[i + static_cast<size_t>(k)]) & 0x3f);
    }
    out.push_back(c);
    i += static_cast<size_t>(length);
  }
  return out;
}

}  // namespace

Result<SchemaWalker::Object> SchemaWalker::read_object(const Json& schema,
                                                       const Place& place) const {
  Object out;
  const auto properties = schema.find("properties");
  const bool declares = properties != schema.end();
  const auto additional = schema.find("additionalProperties");
  out.additional = additional != schema.end() ? &*additional : declares ? nullptr : &kAnything;
  out.additional_place = place.at("additionalProperties");
  if (out.additional != nullptr && *out.additional == Json(false)) out.additional = nullptr;
  if (declares && !properties->is_object()) {
    return error(place.at("properties"), "expected an object");
  }
  std::set<std::string> required;
  if (const auto it = schema.find("required"); it != schema.end()) {
    if (!it->is_array()) return error(place.at("required"), "expected a list");
    for (const Json& name : *it) {
      if (!name.is_string()) return error(place.at("required"), "expected strings");
      required.insert(name.get<std::string>());
    }
  }
  if (declares) {
    for (const auto& item : properties->items()) {
      const bool is_required = required.erase(item.key()) > 0;
      out.properties.push_back(
          {item.key(), &item.value(), is_required, place.at("properties").at(item.key())});
      out.properties.back().place.depth = place.depth + 1;
    }
  }
  for (const std::string& name : required) {  // that no property declares
    if (out.additional == nullptr) {
      return error(place.at("required"), fmt::format("\"{}\" is not among the properties, and "
                                                     "additional ones are not allowed",
                                                     name));
    }
    out.properties.push_back({name, out.additional, true, out.additional_place});
  }
  KVANT_ASSIGN(out.count, count(schema, "minProperties", "maxProperties", place));
  return out;
}

Status SchemaWalker::check_property_count(const Object& object, const Place& place) const {
  if (object.properties.empty()) return {};
  const auto num_required =
      std::ranges::count_if(object.properties, [](const Property& p) { return p.required; });
  if (object.count.min > static_cast<size_t>(num_required)) {
    return unsupported(place, "minProperties",
                       "above the number of required properties is not supported");
  }
  const bool bounded = object.additional == nullptr && object.properties.size() <= object.count.max;
  if (object.count.max != kUnbounded && !bounded) {
    return unsupported(place, "maxProperties", "beside declared properties is not supported");
  }
  return {};
}

Result<NodeId> SchemaWalker::object(NodeId from, const Json& schema, const Place& place) {
  KVANT_ASSIGN(const Object object, read_object(schema, place));
  KVANT_TRY(check_property_count(object, place));
  const NodeId open = compiler_.line_break(builder_.literal(from, "{"));
  KVANT_ASSIGN(const NodeId close, object.properties.empty() ? map_members(open, object)
                                                             : declared_members(open, object));
  return builder_.literal(close, "}");
}

// Before member i the text is either empty or ends in a comma, and then a member must follow. Each
// schema is written once whichever way leads to it: nested objects would double at every level.
Result<NodeId> SchemaWalker::declared_members(NodeId from, const Object& object) {
  const size_t count = object.properties.size();
  const NodeId close = builder_.new_node();
  const NodeId ending = builder_.new_node();  // behind a member, none must follow
  builder_.empty_edge(compiler_.line_break(ending), close);
  NodeId empty = from;  // no member yet; -1 once one is required
  NodeId behind = -1;   // a member was the last thing; -1 before the first
  NodeId after_comma = -1;
  std::vector<bool> must_follow(count + 1);  // a required one from i on
  for (size_t i = count; i-- > 0;) {
    must_follow[i] = must_follow[i + 1] || object.properties[i].required;
  }
  for (size_t i = 0; i < count; ++i) {
    const Property& property = object.properties[i];
    const NodeId name = builder_.new_node();
    const NodeId next_after_comma = builder_.new_node();
    if (empty >= 0) builder_.empty_edge(empty, name);
    if (behind >= 0) {
      if (after_comma < 0) after_comma = builder_.new_node();
      builder_.empty_edge(comma(behind), after_comma);
      if (!must_follow[i]) builder_.empty_edge(behind, ending);
    }
    if (after_comma >= 0) {
      builder_.empty_edge(after_comma, name);
      if (!property.required) builder_.empty_edge(after_comma, next_after_comma);
    }
    if (property.required) empty = -1;
    NodeId at = builder_.literal(name, Json(property.name).dump() + ":");
    KVANT_ASSIGN(behind, value(compiler_.space(at), *property.schema, property.place));
    after_comma = next_after_comma;
  }
  builder_.empty_edge(behind, ending);
  if (empty >= 0) builder_.empty_edge(empty, close);
  if (object.additional == nullptr) return close;
  const NodeId more = builder_.new_node();
  builder_.empty_edge(after_comma, more);
  builder_.empty_edge(comma(behind), more);
  if (empty >= 0) builder_.empty_edge(empty, more);
  KVANT_ASSIGN(const NodeId end, additional_member(more, object));
  builder_.empty_edge(comma(end), more);
  builder_.empty_edge(end, ending);
  return close;
}

Result<NodeId> SchemaWalker::map_members(NodeId from, const Object& object) {
  const NodeId close = builder_.new_node();
  if (object.count.min == 0) builder_.empty_edge(from, close);
  if (object.additional == nullptr || object.count.max == 0) return close;
  if (object.count.min > object.count.max) return close;  // min above 0: a dead end
  const RuleId member = builder_.new_rule();
  KVANT_ASSIGN(const NodeId end, additional_member(builder_.start(member), object));
  builder_.end_rule(member, end);
  const uint32_t max = object.count.max == kUnbounded ? kUnbounded : object.count.max - 1;
  const NodeId last = builder_.repeat(
      builder_.call(from, member),
      [&](NodeId begin) { return builder_.call(comma(begin), member); },
      object.count.min == 0 ? 0 : object.count.min - 1, max);
  builder_.empty_edge(compiler_.line_break(last), close);
  return close;
}

Result<NodeId> SchemaWalker::additional_member(NodeId from, const Object& object) {
  const NodeId name = object.properties.empty() ? compiler_.string_value(from)
                                                : name_other_than(from, object.properties);
  return value(compiler_.space(builder_.literal(name, ":")), *object.additional,
               object.additional_place);
}

// Any name without escapes that is not declared: a trie of the declared ones, left at the first
// character that none of them has.
NodeId SchemaWalker::name_other_than(NodeId from, const std::vector<Property>& properties) {
  struct TrieNode {
    std::map<char32_t, size_t> children;
    bool is_name = false;
  };
  std::vector<TrieNode> trie(1);
  for (const Property& property : properties) {
    size_t at = 0;
    for (const char32_t c : characters(property.name)) {
      auto it = trie[at].children.find(c);
      if (it == trie[at].children.end()) {
        it = trie[at].children.emplace(c, trie.size()).first;
        at = trie.size();
        trie.emplace_back();
      } else {
        at = it->second;
      }
      if (trie.size() > GrammarBuilder::kMaxEdges) break;
    }
    trie[at].is_name = true;
  }
  const CharSet plain = plain_in_json_string();
  const NodeId end = builder_.new_node();
  const NodeId other = builder_.new_node();  // the name differs already
  add_chars(builder_, other, plain, TextContext::kPlain, other);
  builder_.byte_edge(other, '"', '"', end);
  std::vector<NodeId> nodes = {builder_.literal(from, "\"")};
  for (size_t i = 0; i < trie.size() && !builder_.is_full(); ++i) {
    CharSet children;
    for (const auto& [c, child] : trie[i].children) {
      children.add(c, c);
      if (nodes.size() <= child) nodes.resize(child + 1, -1);
      nodes[child] = builder_.new_node();
      if (!CharSet::of(c, c).without(plain).empty()) continue;  // needs an escape
      add_chars(builder_, nodes[i], CharSet::of(c, c), TextContext::kPlain, nodes[child]);
    }
    add_chars(builder_, nodes[i], plain.without(children), TextContext::kPlain, other);
    if (!trie[i].is_name) builder_.byte_edge(nodes[i], '"', '"', end);
  }
  return end;
}

}  // namespace kvant::serve::grammar
