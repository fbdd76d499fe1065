#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <initializer_list>

#include "kvant/model/jinja_syntax.h"

namespace kvant::model::jinja {
namespace {

// Of expressions and of blocks; bounds the recursion of parser, renderer and destructors.
constexpr int kMaxDepth = 200;

using Kind = Expression::Kind;

class Parser {
 public:
  explicit Parser(const std::vector<Token>& tokens) : tokens_(tokens) {}

  Result<Body> run() {
    KVANT_ASSIGN(Body body, parse_body({}));
    return body;
  }

 private:
  // ---- tokens ----
  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  const Token& next() {
    const Token& token = peek();
    if (at_ < tokens_.size() - 1) ++at_;
    return token;
  }
  int line() const { return peek().line; }
  bool is_operator(std::string_view text, size_t ahead = 0) const {
    return peek(ahead).kind == Token::Kind::kOperator && peek(ahead).text == text;
  }
  bool is_name(std::string_view text, size_t ahead = 0) const {
    return peek(ahead).kind == Token::Kind::kName && peek(ahead).text == text;
  }
  bool is_name_in(std::initializer_list<std::string_view> names) const {
    return peek().kind == Token::Kind::kName &&
           std::find(names.begin(), names.end(), peek().text) != names.end();
  }
  bool accept_operator(std::string_view text) {
    if (!is_operator(text)) return false;
    next();
    return true;
  }
  bool accept_name(std::string_view text) {
    if (!is_name(text)) return false;
    next();
    return true;
  }
  std::string found() const {
    switch (peek().kind) {
      case Token::Kind::kEnd: return "the end of the template";
      case Token::Kind::kBlockEnd: return "%}";
      case Token::Kind::kPrintEnd: return "}}";
      case Token::Kind::kString: return "a string";
      default: return fmt::format("\"{}\"", peek().text);
    }
  }
  Error expected(std::string_view what) const {
    return invalid_at(line(), fmt::format("expected {}, found {}", what, found()));
  }
  Status expect_operator(std::string_view text) {
    if (!accept_operator(text)) return expected(fmt::format("\"{}\"", text));
    return {};
  }
  Status expect_name(std::string_view text) {
    if (!accept_name(text)) return expected(fmt::format("\"{}\"", text));
    return {};
  }
  Result<std::string> expect_any_name() {
    if (peek().kind != Token::Kind::kName) return expected("a name");
    return next().text;
  }
  Status expect_block_end() {
    if (peek().kind != Token::Kind::kBlockEnd) return expected("%}");
    next();
    return {};
  }

  // Counts nesting for as long as it lives.
  class Nest {
   public:
    explicit Nest(int& depth) : depth_(depth) { ++depth_; }
    ~Nest() { --depth_; }
    Nest(const Nest&) = delete;
    Nest& operator=(const Nest&) = delete;

   private:
    int& depth_;
  };
  Status check_depth() const {
    if (depth_ <= kMaxDepth) return {};
    return invalid_at(line(), fmt::format("nested more than {} deep", kMaxDepth));
  }

  // ---- statements ----
  // Up to a block tag whose name is in `ends`, which is left unread (behind its begin token); the
  // end of the template if `ends` is empty.
  Result<Body> parse_body(std::initializer_list<std::string_view> ends) {
    const Nest nest(depth_);
    KVANT_TRY(check_depth());
    const int start_line = line();
    Body body;
    for (;;) {
      const Token& token = next();
      switch (token.kind) {
        case Token::Kind::kText: {
          Statement text;
          text.text = token.text;
          text.line = token.line;
          body.push_back(std::move(text));
          break;
        }
        case Token::Kind::kPrintBegin: {
          Statement print;
          print.kind = Statement::Kind::kPrint;
          print.line = token.line;
          KVANT_ASSIGN(print.expression, parse_tuple());
          if (peek().kind != Token::Kind::kPrintEnd) return expected("}}");
          next();
          body.push_back(std::move(print));
          break;
        }
        case Token::Kind::kBlockBegin: {
          if (is_name_in(ends)) return body;
          KVANT_ASSIGN(Statement statement, parse_statement());
          body.push_back(std::move(statement));
          break;
        }
        default:
          if (ends.size() == 0) return body;
          return invalid_at(start_line,
                            fmt::format("a block is not closed by {{% {} %}}", *(ends.end() - 1)));
      }
    }
  }

  Result<Statement> parse_statement() {
    const int start_line = line();
    KVANT_ASSIGN(const std::string name, expect_any_name());
    Statement out;
    out.line = start_line;
    if (name == "for") {
      KVANT_TRY(parse_for(out));
    } else if (name == "if") {
      KVANT_TRY(parse_if(out));
    } else if (name == "set") {
      KVANT_TRY(parse_set(out));
    } else if (name == "macro") {
      KVANT_TRY(parse_macro(out));
    } else if (name == "generation") {
      out.kind = Statement::Kind::kGroup;
      KVANT_TRY(expect_block_end());
      KVANT_TRY(parse_last_body({"endgeneration"}, out.body));
    } else if (name == "break" || name == "continue") {
      if (loops_ == 0) return invalid_at(start_line, fmt::format("{} outside of a loop", name));
      out.kind = name == "break" ? Statement::Kind::kBreak : Statement::Kind::kContinue;
      KVANT_TRY(expect_block_end());
    } else if (name.starts_with("end") || name == "else" || name == "elif") {
      return invalid_at(start_line, fmt::format("unexpected {{% {} %}}", name));
    } else {
      return unsupported_at(start_line, fmt::format("the statement {{% {} %}}", name));
    }
    return out;
  }

  // A body closed by the only name in `end`; reads the closing tag.
  Status parse_last_body(std::initializer_list<std::string_view> end, std::shared_ptr<Body>& out) {
    KVANT_ASSIGN(Body body, parse_body(end));
    out = std::make_shared<Body>(std::move(body));
    next();
    return expect_block_end();
  }

  Status parse_for(Statement& out) {
    out.kind = Statement::Kind::kFor;
    KVANT_TRY(parse_names(out.names));
    KVANT_TRY(expect_name("in"));
    KVANT_ASSIGN(out.expression, parse_or());
    if (accept_name("if")) {
      KVANT_ASSIGN(out.condition, parse_expression());
    }
    if (is_name("recursive")) return unsupported_at(line(), "a recursive loop");
    KVANT_TRY(expect_block_end());
    ++loops_;
    KVANT_ASSIGN(Body body, parse_body({"else", "endfor"}));
    --loops_;
    out.body = std::make_shared<Body>(std::move(body));
    if (accept_name("else")) {
      KVANT_TRY(expect_block_end());
      return parse_last_body({"endfor"}, out.else_body);
    }
    next();
    return expect_block_end();
  }

  Status parse_names(std::vector<std::string>& names) {
    const bool bracket = accept_operator("(");
    do {
      KVANT_ASSIGN(std::string name, expect_any_name());
      names.push_back(std::move(name));
    } while (accept_operator(","));
    return bracket ? expect_operator(")") : Status();
  }

  Status parse_if(Statement& out) {
    out.kind = Statement::Kind::kIf;
    KVANT_ASSIGN(ExpressionPtr condition, parse_tuple());
    KVANT_TRY(expect_block_end());
    for (;;) {
      KVANT_ASSIGN(Body body, parse_body({"elif", "else", "endif"}));
      out.branches.push_back({std::move(condition), std::make_shared<Body>(std::move(body))});
      if (accept_name("elif")) {
        KVANT_ASSIGN(condition, parse_tuple());
        KVANT_TRY(expect_block_end());
        continue;
      }
      if (!accept_name("else")) break;
      KVANT_TRY(expect_block_end());
      std::shared_ptr<Body> last;
      KVANT_TRY(parse_last_body({"endif"}, last));
      out.branches.push_back({nullptr, std::move(last)});
      return {};
    }
    next();
    return expect_block_end();
  }

  Status parse_set(Statement& out) {
    out.kind = Statement::Kind::kSet;
    KVANT_TRY(parse_names(out.names));
    if (accept_operator(".")) {
      if (out.names.size() != 1) return expected("\"=\"");
      KVANT_ASSIGN(out.member, expect_any_name());
    }
    if (accept_operator("=")) {
      KVANT_ASSIGN(out.expression, parse_tuple());
      return expect_block_end();
    }
    if (is_operator("|")) return unsupported_at(line(), "a filter on a {% set %} block");
    if (out.names.size() != 1 || !out.member.empty()) return expected("\"=\"");
    out.kind = Statement::Kind::kSetBlock;
    KVANT_TRY(expect_block_end());
    return parse_last_body({"endset"}, out.body);
  }

  Status parse_macro(Statement& out) {
    out.kind = Statement::Kind::kMacro;
    // A macro sees the variables of the template, not those of a loop around it.
    if (loops_ > 0 || in_macro_) {
      return unsupported_at(out.line, "a macro inside a loop or another macro");
    }
    out.macro = std::make_shared<MacroDefinition>();
    KVANT_ASSIGN(out.macro->name, expect_any_name());
    KVANT_TRY(expect_operator("("));
    while (!accept_operator(")")) {
      if (!out.macro->parameters.empty()) KVANT_TRY(expect_operator(","));
      Parameter parameter;
      KVANT_ASSIGN(parameter.name, expect_any_name());
      if (accept_operator("=")) {
        KVANT_ASSIGN(parameter.fallback, parse_expression());
      }
      out.macro->parameters.push_back(std::move(parameter));
    }
    KVANT_TRY(expect_block_end());
    in_macro_ = true;
    KVANT_TRY(parse_last_body({"endmacro"}, out.macro->body));
    in_macro_ = false;
    return {};
  }

  // ---- expressions ----
  ExpressionPtr make(Kind kind, int at_line) const {
    ExpressionPtr out = std::make_unique<Expression>();
    out->kind = kind;
    out->line = at_line;
    return out;
  }
  // Adds the depth of what has been put into `e`; an error if the tree has become too deep.
  Result<ExpressionPtr> finish(ExpressionPtr e) const {
    int depth = 0;
    for (const ExpressionPtr& operand : e->operands) {
      if (operand) depth = std::max(depth, operand->depth);
    }
    for (const Argument& argument : e->arguments) depth = std::max(depth, argument.value->depth);
    e->depth = depth + 1;
    if (e->depth > kMaxDepth) {
      return invalid_at(e->line,
                        fmt::format("an expression is nested more than {} deep", kMaxDepth));
    }
    return e;
  }

  // One expression, or several with commas between them, which make a tuple.
  Result<ExpressionPtr> parse_tuple() {
    const int start_line = line();
    KVANT_ASSIGN(ExpressionPtr first, parse_expression());
    if (!is_operator(",")) return first;
    ExpressionPtr tuple = make(Kind::kTuple, start_line);
    tuple->arguments.push_back({"", std::move(first)});
    while (accept_operator(",")) {
      if (ends_list()) break;
      KVANT_ASSIGN(ExpressionPtr item, parse_expression());
      tuple->arguments.push_back({"", std::move(item)});
    }
    return finish(std::move(tuple));
  }
  bool ends_list() const {
    return is_operator(")") || peek().kind == Token::Kind::kBlockEnd ||
           peek().kind == Token::Kind::kPrintEnd;
  }

  Result<ExpressionPtr> parse_expression() {
    const Nest nest(depth_);
    KVANT_TRY(check_depth());
    KVANT_ASSIGN(ExpressionPtr value, parse_or());
    while (is_name("if")) {
      ExpressionPtr conditional = make(Kind::kIf, line());
      next();
      KVANT_ASSIGN(ExpressionPtr condition, parse_or());
      ExpressionPtr otherwise;
      if (accept_name("else")) {
        KVANT_ASSIGN(otherwise, parse_expression());
      }
      conditional->operands.push_back(std::move(value));
      conditional->operands.push_back(std::move(condition));
      conditional->operands.push_back(std::move(otherwise));
      KVANT_ASSIGN(value, finish(std::move(conditional)));
    }
    return value;
  }

  using Level = Result<ExpressionPtr> (Parser::*)();

  Result<ExpressionPtr> combine(Kind kind, std::string_view op, ExpressionPtr left, Level level) {
    ExpressionPtr out = make(kind, left->line);
    out->text = op;
    out->operands.push_back(std::move(left));
    KVANT_ASSIGN(ExpressionPtr right, (this->*level)());
    out->operands.push_back(std::move(right));
    return finish(std::move(out));
  }

  Result<ExpressionPtr> parse_or() {
    KVANT_ASSIGN(ExpressionPtr left, parse_and());
    while (accept_name("or")) {
      KVANT_ASSIGN(left, combine(Kind::kOr, "or", std::move(left), &Parser::parse_and));
    }
    return left;
  }

  Result<ExpressionPtr> parse_and() {
    KVANT_ASSIGN(ExpressionPtr left, parse_not());
    while (accept_name("and")) {
      KVANT_ASSIGN(left, combine(Kind::kAnd, "and", std::move(left), &Parser::parse_not));
    }
    return left;
  }

  Result<ExpressionPtr> parse_not() {
    if (!is_name("not")) return parse_compare();
    const Nest nest(depth_);
    KVANT_TRY(check_depth());
    ExpressionPtr out = make(Kind::kNot, line());
    next();
    KVANT_ASSIGN(ExpressionPtr operand, parse_not());
    out->operands.push_back(std::move(operand));
    return finish(std::move(out));
  }

  Result<ExpressionPtr> parse_compare() {
    const int start_line = line();
    KVANT_ASSIGN(ExpressionPtr first, parse_sum());
    ExpressionPtr out;
    for (;;) {
      std::string op;
      for (const std::string_view candidate : {"==", "!=", "<=", ">=", "<", ">"}) {
        if (is_operator(candidate)) op = candidate;
      }
      if (is_name("in")) op = "in";
      if (is_name("not") && is_name("in", 1)) op = "not in";
      if (op.empty()) break;
      next();
      if (op == "not in") next();
      if (!out) {
        out = make(Kind::kCompare, start_line);
        out->operands.push_back(std::move(first));
      }
      KVANT_ASSIGN(ExpressionPtr operand, parse_sum());
      out->operands.push_back(std::move(operand));
      out->operators.push_back(std::move(op));
    }
    if (!out) return first;
    return finish(std::move(out));
  }

  Result<ExpressionPtr> parse_chain(std::initializer_list<std::string_view> operators,
                                    Level level) {
    KVANT_ASSIGN(ExpressionPtr left, (this->*level)());
    for (;;) {
      const auto op = std::find_if(operators.begin(), operators.end(),
                                   [this](std::string_view text) { return is_operator(text); });
      if (op == operators.end()) return left;
      next();
      KVANT_ASSIGN(left, combine(Kind::kBinary, *op, std::move(left), level));
    }
  }
  Result<ExpressionPtr> parse_sum() { return parse_chain({"+", "-"}, &Parser::parse_concat); }
  Result<ExpressionPtr> parse_concat() { return parse_chain({"~"}, &Parser::parse_product); }
  Result<ExpressionPtr> parse_product() {
    return parse_chain({"*", "//", "/", "%"}, &Parser::parse_power);
  }
  Result<ExpressionPtr> parse_power() { return parse_chain({"**"}, &Parser::parse_unary); }

  Result<ExpressionPtr> parse_unary() {
    KVANT_ASSIGN(ExpressionPtr value, parse_signed());
    return parse_filters(std::move(value));
  }

  // A sign binds tighter than a filter: -1 | abs is (-1) | abs.
  Result<ExpressionPtr> parse_signed() {
    if (!is_operator("-") && !is_operator("+")) {
      KVANT_ASSIGN(ExpressionPtr value, parse_primary());
      return parse_postfix(std::move(value));
    }
    const Nest nest(depth_);
    KVANT_TRY(check_depth());
    const bool negate = is_operator("-");
    const int start_line = line();
    next();
    KVANT_ASSIGN(ExpressionPtr operand, parse_signed());
    if (!negate) return operand;
    ExpressionPtr out = make(Kind::kNegate, start_line);
    out->operands.push_back(std::move(operand));
    return finish(std::move(out));
  }

  Result<ExpressionPtr> parse_primary() {
    const Token& token = peek();
    ExpressionPtr out = make(Kind::kLiteral, token.line);
    switch (token.kind) {
      case Token::Kind::kName:
        next();
        if (token.text == "true" || token.text == "True") {
          out->literal = Value(true);
        } else if (token.text == "false" || token.text == "False") {
          out->literal = Value(false);
        } else if (token.text == "none" || token.text == "None") {
          out->literal = Value(None());
        } else {
          out->kind = Kind::kName;
          out->text = token.text;
        }
        return out;
      case Token::Kind::kString: {
        std::string text;
        while (peek().kind == Token::Kind::kString) text += next().text;  // adjacent ones are one
        out->literal = Value(std::move(text));
        return out;
      }
      case Token::Kind::kInteger:
      case Token::Kind::kFloat: return parse_number();
      case Token::Kind::kOperator:
        if (token.text == "(") return parse_brackets();
        if (token.text == "[") return parse_list();
        if (token.text == "{") return parse_dict();
        break;
      default: break;
    }
    return expected("an expression");
  }

  Result<ExpressionPtr> parse_number() {
    const Token& token = next();
    ExpressionPtr out = make(Kind::kLiteral, token.line);
    const char* end = token.text.data() + token.text.size();
    std::from_chars_result parsed = {};
    if (token.kind == Token::Kind::kInteger) {
      int64_t value = 0;
      parsed = std::from_chars(token.text.data(), end, value);
      out->literal = Value(value);
    } else {
      double value = 0;
      parsed = std::from_chars(token.text.data(), end, value);
      out->literal = Value(value);
    }
    if (parsed.ec != std::errc() || parsed.ptr != end) {
      return invalid_at(token.line, fmt::format("the number {} is out of range", token.text));
    }
    return out;
  }

  Result<ExpressionPtr> parse_brackets() {
    const int start_line = line();
    next();
    if (accept_operator(")")) return make(Kind::kTuple, start_line);
    KVANT_ASSIGN(ExpressionPtr inner, parse_tuple());
    KVANT_TRY(expect_operator(")"));
    return inner;
  }

  Result<ExpressionPtr> parse_list() {
    ExpressionPtr out = make(Kind::kList, line());
    next();
    while (!accept_operator("]")) {
      if (!out->arguments.empty()) {
        KVANT_TRY(expect_operator(","));
        if (accept_operator("]")) break;
      }
      KVANT_ASSIGN(ExpressionPtr item, parse_expression());
      out->arguments.push_back({"", std::move(item)});
    }
    return finish(std::move(out));
  }

  Result<ExpressionPtr> parse_dict() {
    ExpressionPtr out = make(Kind::kDict, line());
    next();
    while (!accept_operator("}")) {
      if (!out->arguments.empty()) {
        KVANT_TRY(expect_operator(","));
        if (accept_operator("}")) break;
      }
      KVANT_ASSIGN(ExpressionPtr key, parse_expression());
      KVANT_TRY(expect_operator(":"));
      KVANT_ASSIGN(ExpressionPtr value, parse_expression());
      out->arguments.push_back({"", std::move(key)});
      out->arguments.push_back({"", std::move(value)});
    }
    return finish(std::move(out));
  }

  Result<ExpressionPtr> parse_postfix(ExpressionPtr value) {
    for (;;) {
      ExpressionPtr out = make(Kind::kAttribute, line());
      if (accept_operator(".")) {
        if (peek().kind == Token::Kind::kInteger) {
          out->kind = Kind::kIndex;
          out->operands.push_back(std::move(value));
          KVANT_ASSIGN(ExpressionPtr index, parse_number());
          out->operands.push_back(std::move(index));
        } else {
          KVANT_ASSIGN(out->text, expect_any_name());
          out->operands.push_back(std::move(value));
        }
      } else if (accept_operator("[")) {
        out->operands.push_back(std::move(value));
        KVANT_TRY(parse_subscript(*out));
      } else if (accept_operator("(")) {
        out->kind = Kind::kCall;
        out->operands.push_back(std::move(value));
        KVANT_TRY(parse_arguments(out->arguments));
      } else {
        return value;
      }
      KVANT_ASSIGN(value, finish(std::move(out)));
    }
  }

  Status parse_subscript(Expression& out) {
    out.kind = Kind::kIndex;
    ExpressionPtr part;
    if (!is_operator(":")) {
      KVANT_ASSIGN(part, parse_expression());
    }
    out.operands.push_back(std::move(part));
    while (out.operands.size() < 4 && accept_operator(":")) {
      out.kind = Kind::kSlice;
      ExpressionPtr bound;
      if (!is_operator(":") && !is_operator("]")) {
        KVANT_ASSIGN(bound, parse_expression());
      }
      out.operands.push_back(std::move(bound));
    }
    if (out.kind == Kind::kSlice) out.operands.resize(4);
    return expect_operator("]");
  }

  Status parse_arguments(std::vector<Argument>& out) {
    while (!accept_operator(")")) {
      if (!out.empty()) {
        KVANT_TRY(expect_operator(","));
        if (accept_operator(")")) break;
      }
      if (is_operator("*") || is_operator("**")) {
        return unsupported_at(line(), "unpacking arguments with * or **");
      }
      Argument argument;
      if (peek().kind == Token::Kind::kName && is_operator("=", 1)) {
        argument.name = next().text;
        next();
      } else if (!out.empty() && !out.back().name.empty()) {
        return invalid_at(line(), "a positional argument follows a named one");
      }
      KVANT_ASSIGN(argument.value, parse_expression());
      out.push_back(std::move(argument));
    }
    return {};
  }

  Result<ExpressionPtr> parse_filters(ExpressionPtr value) {
    for (;;) {
      ExpressionPtr out = make(Kind::kFilter, line());
      bool negated = false;
      if (accept_operator("|")) {
        KVANT_ASSIGN(out->text, expect_any_name());
        if (is_operator(".")) return unsupported_at(line(), "a filter with a dot in its name");
        out->operands.push_back(std::move(value));
        if (accept_operator("(")) KVANT_TRY(parse_arguments(out->arguments));
      } else if (accept_name("is")) {
        negated = accept_name("not");
        out->kind = Kind::kTest;
        out->operands.push_back(std::move(value));
        KVANT_TRY(parse_test(*out));
      } else {
        return value;
      }
      KVANT_ASSIGN(value, finish(std::move(out)));
      if (!negated) continue;
      ExpressionPtr inverse = make(Kind::kNot, value->line);
      inverse->operands.push_back(std::move(value));
      KVANT_ASSIGN(value, finish(std::move(inverse)));
    }
  }

  // The name of a test and its arguments, in brackets or one without.
  Status parse_test(Expression& out) {
    KVANT_ASSIGN(out.text, expect_any_name());
    if (accept_operator("(")) return parse_arguments(out.arguments);
    const bool literal = peek().kind == Token::Kind::kString ||
                         peek().kind == Token::Kind::kInteger ||
                         peek().kind == Token::Kind::kFloat || is_operator("[") || is_operator("{");
    const bool name = peek().kind == Token::Kind::kName &&
                      !is_name_in({"else", "or", "and", "if", "is", "in", "not"});
    if (!literal && !name) return {};
    KVANT_ASSIGN(ExpressionPtr argument, parse_primary());
    KVANT_ASSIGN(argument, parse_postfix(std::move(argument)));
    out.arguments.push_back({"", std::move(argument)});
    return {};
  }

  const std::vector<Token>& tokens_;
  size_t at_ = 0;
  int depth_ = 0;  // of blocks and of expressions within expressions
  int loops_ = 0;
  bool in_macro_ = false;
};

}  // namespace

Result<Body> parse(const std::vector<Token>& tokens) {
  return Parser(tokens).run();
}

}  // namespace kvant::model::jinja
