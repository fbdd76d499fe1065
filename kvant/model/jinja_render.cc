#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <deque>

#include "kvant/model/jinja.h"
#include "kvant/model/jinja_builtins.h"
#include "kvant/model/jinja_operators.h"

namespace kvant::model::jinja {
namespace {

// Of expressions and statements within each other, calls of macros included: bounds the stack.
constexpr int kMaxDepth = 600;

// See call_function.
constexpr std::string_view kFunctions[] = {"dict", "namespace", "raise_exception", "range",
                                           "strftime_now"};

using Kind = Expression::Kind;

// Where `loop` stands.
struct Loop {
  const std::vector<Value>& items;
  size_t index = 0;
};

struct Scope {
  const Scope* parent = nullptr;
  const Loop* loop = nullptr;
  std::map<std::string, Value, std::less<>> variables;
};

class Renderer {
 public:
  Renderer(const Dict& variables, std::optional<int64_t> now, const RenderLimits& limits)
      : now_(now), limits_(limits), budget_(limits.work) {
    for (const std::string_view name : kFunctions) {
      globals_.variables.emplace(name, Value(Function{name}));
    }
    for (const auto& [name, value] : variables.items()) globals_.variables[name] = value;
    root_.parent = &globals_;
  }

  Result<std::string> run(const Body& body) {
    KVANT_TRY(execute(body, root_));
    return std::move(out_);
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };

  class Nest {
   public:
    explicit Nest(int& depth) : depth_(depth) { ++depth_; }
    ~Nest() { --depth_; }
    Nest(const Nest&) = delete;
    Nest& operator=(const Nest&) = delete;

   private:
    int& depth_;
  };
  Status enter(int line) {
    KVANT_TRY(budget_.charge(8));
    if (depth_ <= kMaxDepth) return {};
    return invalid_at(line, fmt::format("calls are nested more than {} deep", kMaxDepth));
  }

  // ---- statements ----
  Result<Flow> execute(const Body& body, Scope& scope) {
    const Nest nest(depth_);
    for (const Statement& statement : body) {
      KVANT_TRY(enter(statement.line));
      KVANT_ASSIGN(const Flow flow, execute(statement, scope));
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Result<Flow> execute(const Statement& statement, Scope& scope) {
    switch (statement.kind) {
      case Statement::Kind::kText: KVANT_TRY(write(statement.text)); break;
      case Statement::Kind::kPrint: {
        KVANT_ASSIGN(const Value value, evaluate(*statement.expression, scope));
        const Result<std::string> text = to_text(value, budget_);
        if (!text) return at_line(text.error(), statement.line);
        KVANT_TRY(write(*text));
        break;
      }
      case Statement::Kind::kFor: return execute_for(statement, scope);
      case Statement::Kind::kIf:
        for (const Statement::Branch& branch : statement.branches) {
          bool taken = true;
          if (branch.condition) {
            KVANT_ASSIGN(const Value condition, evaluate(*branch.condition, scope));
            taken = condition.truthy();
          }
          if (taken) return execute(*branch.body, scope);
        }
        break;
      case Statement::Kind::kSet: {
        KVANT_ASSIGN(Value value, evaluate(*statement.expression, scope));
        KVANT_TRY(assign(statement, std::move(value), scope));
        break;
      }
      case Statement::Kind::kSetBlock: {
        KVANT_ASSIGN(Value text, capture(*statement.body, scope));
        KVANT_TRY(assign(statement, std::move(text), scope));
        break;
      }
      case Statement::Kind::kMacro:
        scope.variables[statement.macro->name] = Value(statement.macro.get());
        break;
      case Statement::Kind::kBreak: return Flow::kBreak;
      case Statement::Kind::kContinue: return Flow::kContinue;
      case Statement::Kind::kGroup: return execute(*statement.body, scope);
    }
    return Flow::kNext;
  }

  Status write(std::string_view text) {
    if (text.size() > limits_.output_bytes - std::min(out_.size(), limits_.output_bytes)) {
      return Error(
          ErrorCode::kResourceExhausted,
          fmt::format("chat template: the text has more than {} bytes", limits_.output_bytes));
    }
    KVANT_TRY(budget_.charge(static_cast<int64_t>(text.size())));
    out_ += text;
    return {};
  }

  // What `body` writes, as a value. Variables set inside stay inside.
  Result<Value> capture(const Body& body, const Scope& scope) {
    Scope inner;
    inner.parent = &scope;
    inner.loop = scope.loop;
    std::string outer = std::move(out_);
    out_.clear();
    const Result<Flow> flow = execute(body, inner);
    outer.swap(out_);
    if (!flow) return flow.error();
    return Value(std::move(outer));
  }

  Result<Flow> execute_for(const Statement& statement, Scope& scope) {
    KVANT_ASSIGN(const Value iterable, evaluate(*statement.expression, scope));
    KVANT_ASSIGN(std::vector<Value> items, iterate(iterable, statement.line, budget_));
    if (statement.condition) {
      std::vector<Value> kept;
      for (const Value& item : items) {
        Scope inner;
        inner.parent = &scope;
        inner.loop = scope.loop;
        KVANT_TRY(unpack(statement, item, inner));
        KVANT_ASSIGN(const Value keep, evaluate(*statement.condition, inner));
        if (keep.truthy()) kept.push_back(item);
      }
      items = std::move(kept);
    }
    if (items.empty() && statement.else_body) return execute(*statement.else_body, scope);
    Loop loop{items};
    for (; loop.index < items.size(); ++loop.index) {
      Scope inner;
      inner.parent = &scope;
      inner.loop = &loop;
      KVANT_TRY(unpack(statement, items[loop.index], inner));
      KVANT_ASSIGN(const Flow flow, execute(*statement.body, inner));
      if (flow == Flow::kBreak) break;
    }
    return Flow::kNext;
  }

  Status assign(const Statement& statement, Value value, Scope& scope) {
    if (statement.member.empty()) return unpack(statement, std::move(value), scope);
    Namespace* space = lookup(statement.names[0], scope).as_namespace();
    if (space == nullptr) {
      return invalid_at(
          statement.line,
          fmt::format("\"{}\" is no namespace, so its members cannot be set", statement.names[0]));
    }
    space->members[statement.member] = std::move(value);
    return {};
  }

  // Binds the names of a loop or set to a value, or to the items of a list if there are several
  // names.
  Status unpack(const Statement& statement, Value value, Scope& scope) {
    if (statement.names.size() == 1) {
      scope.variables[statement.names[0]] = std::move(value);
      return {};
    }
    KVANT_ASSIGN(std::vector<Value> items, iterate(value, statement.line, budget_));
    if (items.size() != statement.names.size()) {
      return invalid_at(statement.line, fmt::format("{} values for {} names", items.size(),
                                                    statement.names.size()));
    }
    for (size_t i = 0; i < items.size(); ++i) {
      scope.variables[statement.names[i]] = std::move(items[i]);
    }
    return {};
  }

  static Value lookup(std::string_view name, const Scope& scope) {
    for (const Scope* s = &scope; s != nullptr; s = s->parent) {
      const auto it = s->variables.find(name);
      if (it != s->variables.end()) return it->second;
    }
    return {};
  }

  // ---- expressions ----
  static Error at_line(const Error& error, int line) {
    if (error.message().starts_with("chat template")) return error;
    return error_at(line, error.code(), error.message());
  }

  Result<Value> evaluate(const Expression& e, const Scope& scope) {
    const Nest nest(depth_);
    KVANT_TRY(enter(e.line));
    switch (e.kind) {
      case Kind::kLiteral: return e.literal;
      case Kind::kName: {
        Value value = lookup(e.text, scope);
        if (value.is_undefined() && e.text == "loop" && scope.loop != nullptr) {
          return unsupported_at(e.line, "loop as a value");
        }
        return value;
      }
      case Kind::kList:
      case Kind::kTuple: return evaluate_list(e, scope);
      case Kind::kDict: return evaluate_dict(e, scope);
      case Kind::kAttribute: return evaluate_attribute(e, scope);
      case Kind::kIndex: return evaluate_index(e, scope);
      case Kind::kSlice: return evaluate_slice(e, scope);
      case Kind::kCall: return evaluate_call(e, scope);
      case Kind::kFilter:
      case Kind::kTest: return evaluate_filter_or_test(e, scope);
      case Kind::kAnd:
      case Kind::kOr: {
        KVANT_ASSIGN(Value left, evaluate(*e.operands[0], scope));
        if (left.truthy() == (e.kind == Kind::kOr)) return left;
        return evaluate(*e.operands[1], scope);
      }
      case Kind::kIf: {
        KVANT_ASSIGN(const Value condition, evaluate(*e.operands[1], scope));
        if (condition.truthy()) return evaluate(*e.operands[0], scope);
        return e.operands[2] ? evaluate(*e.operands[2], scope) : Result<Value>(Value());
      }
      case Kind::kCompare: return evaluate_compare(e, scope);
      case Kind::kNot:
      case Kind::kNegate:
      case Kind::kBinary: break;
    }
    KVANT_ASSIGN(const Value left, evaluate(*e.operands[0], scope));
    if (e.kind == Kind::kNot) return Value(!left.truthy());
    if (e.kind == Kind::kNegate) return negate(left, e.line);
    KVANT_ASSIGN(const Value right, evaluate(*e.operands[1], scope));
    return binary_operator(e.text, left, right, e.line, budget_);
  }

  Result<Value> evaluate_list(const Expression& e, const Scope& scope) {
    List list;
    list.is_tuple = e.kind == Kind::kTuple;
    KVANT_TRY(budget_.charge_items(e.arguments.size()));
    for (const Argument& item : e.arguments) {
      KVANT_ASSIGN(Value value, evaluate(*item.value, scope));
      list.items.push_back(std::move(value));
    }
    return Value(std::move(list));
  }

  Result<Value> evaluate_dict(const Expression& e, const Scope& scope) {
    Dict dict;
    KVANT_TRY(budget_.charge_items(e.arguments.size()));
    for (size_t i = 0; i < e.arguments.size(); i += 2) {
      KVANT_ASSIGN(const Value key, evaluate(*e.arguments[i].value, scope));
      KVANT_ASSIGN(Value value, evaluate(*e.arguments[i + 1].value, scope));
      if (!key.is_string()) return unsupported_at(e.line, "a dict key that is no string");
      dict.set(*key.as_string(), std::move(value));
    }
    return Value(std::move(dict));
  }

  // The name of an expression, for messages.
  static std::string describe(const Expression& e) {
    if (e.kind == Kind::kName) return e.text;
    if (e.kind == Kind::kAttribute) return describe(*e.operands[0]) + "." + e.text;
    if (e.kind == Kind::kIndex) return describe(*e.operands[0]) + "[...]";
    return "an expression";
  }

  bool is_loop(const Expression& e, const Scope& scope) const {
    return e.kind == Kind::kName && e.text == "loop" && scope.loop != nullptr &&
           lookup("loop", scope).is_undefined();
  }

  Result<Value> evaluate_attribute(const Expression& e, const Scope& scope) {
    const Expression& base = *e.operands[0];
    if (is_loop(base, scope)) return loop_member(e, *scope.loop);
    KVANT_ASSIGN(const Value object, evaluate(base, scope));
    if (object.is_undefined()) {
      return invalid_at(
          e.line, fmt::format("\"{}\" is undefined, so it has no \"{}\"", describe(base), e.text));
    }
    for (const std::string_view method : {"get", "items", "keys", "values"}) {
      if (object.as_dict() != nullptr && e.text == method) {
        return unsupported_at(e.line,
                              fmt::format("the method {} of a dict without a call", method));
      }
    }
    return get_member(object, e.text);
  }

  static Result<Value> loop_member(const Expression& e, const Loop& loop) {
    const int64_t index = static_cast<int64_t>(loop.index);
    const int64_t count = static_cast<int64_t>(loop.items.size());
    if (e.text == "index0") return Value(index);
    if (e.text == "index") return Value(index + 1);
    if (e.text == "revindex") return Value(count - index);
    if (e.text == "revindex0") return Value(count - index - 1);
    if (e.text == "first") return Value(index == 0);
    if (e.text == "last") return Value(index == count - 1);
    if (e.text == "length") return Value(count);
    if (e.text == "depth") return Value(int64_t{1});
    if (e.text == "depth0") return Value(int64_t{0});
    if (e.text == "previtem") return index == 0 ? Value() : loop.items[loop.index - 1];
    if (e.text == "nextitem") return index + 1 == count ? Value() : loop.items[loop.index + 1];
    return unsupported_at(e.line, fmt::format("loop.{}", e.text));
  }

  Result<Value> evaluate_index(const Expression& e, const Scope& scope) {
    if (is_loop(*e.operands[0], scope)) return unsupported_at(e.line, "loop[...]");
    KVANT_ASSIGN(const Value object, evaluate(*e.operands[0], scope));
    KVANT_ASSIGN(const Value index, evaluate(*e.operands[1], scope));
    if (object.is_undefined()) {
      return invalid_at(
          e.line, fmt::format("\"{}\" is undefined, so it has no items", describe(*e.operands[0])));
    }
    if (const std::string* key = index.as_string()) return get_member(object, *key);
    if (!index.is_int() && !index.is_bool()) return Value();
    return item_at(object, index.to_int(), budget_);
  }

  Result<Value> evaluate_slice(const Expression& e, const Scope& scope) {
    KVANT_ASSIGN(const Value object, evaluate(*e.operands[0], scope));
    std::optional<int64_t> bounds[3];
    for (size_t i = 0; i < 3; ++i) {
      if (!e.operands[i + 1]) continue;
      KVANT_ASSIGN(const Value bound, evaluate(*e.operands[i + 1], scope));
      if (bound.is_none()) continue;
      if (!bound.is_int() && !bound.is_bool()) {
        return invalid_at(e.line, "the bounds of a slice must be integers");
      }
      bounds[i] = bound.to_int();
    }
    return slice({bounds[0], bounds[1], bounds[2]}, object, e.line, budget_);
  }

  Result<Value> evaluate_compare(const Expression& e, const Scope& scope) {
    KVANT_ASSIGN(Value left, evaluate(*e.operands[0], scope));
    for (size_t i = 0; i < e.operators.size(); ++i) {
      KVANT_ASSIGN(Value right, evaluate(*e.operands[i + 1], scope));
      KVANT_ASSIGN(const bool holds,
                   comparison_operator(e.operators[i], left, right, e.line, budget_));
      if (!holds) return Value(false);
      left = std::move(right);
    }
    return Value(true);
  }

  Result<Arguments> evaluate_arguments(const Expression& e, const Scope& scope) {
    Arguments out;
    for (const Argument& argument : e.arguments) {
      KVANT_ASSIGN(Value value, evaluate(*argument.value, scope));
      if (argument.name.empty()) {
        out.positional.push_back(std::move(value));
      } else {
        out.named.emplace_back(argument.name, std::move(value));
      }
    }
    return out;
  }

  Result<Value> evaluate_filter_or_test(const Expression& e, const Scope& scope) {
    KVANT_ASSIGN(const Value input, evaluate(*e.operands[0], scope));
    KVANT_ASSIGN(const Arguments arguments, evaluate_arguments(e, scope));
    const Call call{e.text, arguments, e.line, budget_};
    if (e.kind == Kind::kTest) {
      const Result<bool> holds = apply_test(call, input);
      return holds ? Result<Value>(Value(*holds)) : at_line(holds.error(), e.line);
    }
    Result<Value> out = apply_filter(call, input);
    return out ? std::move(out) : at_line(out.error(), e.line);
  }

  Result<Value> evaluate_call(const Expression& e, const Scope& scope) {
    const Expression& callee = *e.operands[0];
    KVANT_ASSIGN(const Arguments arguments, evaluate_arguments(e, scope));
    if (callee.kind == Kind::kName) {
      const Value value = lookup(callee.text, scope);
      if (const MacroDefinition* macro = value.as_macro()) {
        return call_macro(*macro, arguments, e.line);
      }
      if (const Function* function = value.as_function()) {
        return call_function(Call{function->name, arguments, e.line, budget_});
      }
      if (!value.is_undefined()) {
        return invalid_at(
            e.line, fmt::format("\"{}\" is a {}, not a function", callee.text, value.type_name()));
      }
      return unsupported_at(e.line, fmt::format("the function {}()", callee.text));
    }
    if (callee.kind != Kind::kAttribute) return unsupported_at(e.line, "calling an expression");
    const Call call{callee.text, arguments, e.line, budget_};
    if (is_loop(*callee.operands[0], scope)) return call_loop(call, *scope.loop);
    KVANT_ASSIGN(const Value object, evaluate(*callee.operands[0], scope));
    if (object.is_undefined()) {
      return invalid_at(e.line, fmt::format("\"{}\" is undefined, so it has no method {}()",
                                            describe(*callee.operands[0]), callee.text));
    }
    if (const MacroDefinition* macro = get_member(object, callee.text).as_macro()) {
      return call_macro(*macro, arguments, e.line);
    }
    Result<Value> out = call_method(call, object);
    return out ? std::move(out) : at_line(out.error(), e.line);
  }

  static Result<Value> call_loop(const Call& call, const Loop& loop) {
    const std::vector<Value>& choices = call.arguments.positional;
    if (call.name != "cycle" || choices.empty()) {
      return unsupported_at(call.line, fmt::format("loop.{}()", call.name));
    }
    return choices[loop.index % choices.size()];
  }

  Result<Value> call_macro(const MacroDefinition& macro, const Arguments& arguments, int line) {
    Scope scope;
    scope.parent = &root_;
    if (arguments.positional.size() > macro.parameters.size()) {
      return invalid_at(line, fmt::format("the macro {} takes {} arguments, not {}", macro.name,
                                          macro.parameters.size(), arguments.positional.size()));
    }
    for (const auto& [name, value] : arguments.named) {
      const bool known = std::any_of(macro.parameters.begin(), macro.parameters.end(),
                                     [&name = name](const Parameter& p) { return p.name == name; });
      if (!known) {
        return invalid_at(line, fmt::format("the macro {} has no argument {}", macro.name, name));
      }
    }
    for (size_t i = 0; i < macro.parameters.size(); ++i) {
      const Parameter& parameter = macro.parameters[i];
      if (const Value* given = arguments.get(i, parameter.name)) {
        scope.variables[parameter.name] = *given;
      } else if (parameter.fallback) {
        KVANT_ASSIGN(scope.variables[parameter.name], evaluate(*parameter.fallback, scope));
      } else {
        scope.variables[parameter.name] = Value();
      }
    }
    return capture(*macro.body, scope);
  }

  Result<Value> call_function(const Call& call) {
    if (call.name == "namespace") return make_namespace(call);
    if (call.name == "dict") return make_dict(call);
    if (call.name == "range") return make_range(call);
    if (call.name == "raise_exception") {
      KVANT_ASSIGN(const std::string message, call.text_argument(0, "message", ""));
      return Error(ErrorCode::kInvalidArgument,
                   fmt::format("the chat template refuses this conversation: {}", message));
    }
    return format_now(call);
  }

  Result<Value> make_namespace(const Call& call) {
    KVANT_ASSIGN(const Value members, make_dict(call));
    KVANT_TRY(budget_.charge_items(4));
    Namespace& space = namespaces_.emplace_back();
    for (const auto& [name, value] : members.as_dict()->items()) space.members[name] = value;
    return Value(&space);
  }

  static Result<Value> make_dict(const Call& call) {
    if (call.arguments.positional.size() > 1) return call.invalid("too many arguments");
    Dict dict;
    if (const Value* from = call.arguments.get(0, "")) {
      if (from->as_dict() == nullptr) return call.unsupported("building it from a list");
      dict = *from->as_dict();
    }
    for (const auto& [name, value] : call.arguments.named) dict.set(name, value);
    return Value(std::move(dict));
  }

  Result<Value> make_range(const Call& call) {
    KVANT_TRY(call.check_arguments(3, {}));
    const size_t given = call.arguments.positional.size();
    KVANT_ASSIGN(const int64_t first, call.int_argument(0, "", 0));
    KVANT_ASSIGN(const int64_t second, call.int_argument(1, "", 0));
    KVANT_ASSIGN(const int64_t step, call.int_argument(2, "", 1));
    if (given == 0 || step == 0) return call.invalid("needs bounds, and a step that is not zero");
    const int64_t start = given == 1 ? 0 : first;
    const int64_t stop = given == 1 ? first : second;
    const double length =
        (static_cast<double>(stop) - static_cast<double>(start)) / static_cast<double>(step);
    List out;
    if (length <= 0) return Value(std::move(out));
    if (length > 1e7) return call.invalid("more than ten million items");
    KVANT_TRY(budget_.charge_items(static_cast<size_t>(length) + 1));
    const int64_t count = static_cast<int64_t>(std::ceil(length));
    for (int64_t i = 0; i < count; ++i) out.items.emplace_back(start + i * step);
    return Value(std::move(out));
  }

  Result<Value> format_now(const Call& call) const {
    KVANT_ASSIGN(const std::string format, call.text_argument(0, "format", ""));
    if (format.find('\0') != std::string::npos || format.size() > 200) {
      return call.invalid("this is no date format");
    }
    const std::time_t now = now_ ? static_cast<std::time_t>(*now_) : std::time(nullptr);
    std::tm local = {};
    if (localtime_r(&now, &local) == nullptr) return call.invalid("the time is out of range");
    char text[1024];
    return Value(std::string(text, std::strftime(text, sizeof(text), format.c_str(), &local)));
  }

  std::optional<int64_t> now_;
  const RenderLimits& limits_;
  Budget budget_;
  int depth_ = 0;
  std::string out_;
  std::deque<Namespace> namespaces_;  // stay where they are; freed together, cycles and all
  Scope globals_;                     // the caller's variables
  Scope root_;                        // the template's own
};

}  // namespace

Result<Template> Template::parse(std::string_view source) {
  KVANT_ASSIGN(const std::vector<Token> tokens, tokenize(source));
  KVANT_ASSIGN(Body body, jinja::parse(tokens));
  return Template(std::move(body));
}

Result<std::string> Template::render(const Dict& variables, std::optional<int64_t> now,
                                     const RenderLimits& limits) const {
  return Renderer(variables, now, limits).run(body_);
}

}  // namespace kvant::model::jinja
