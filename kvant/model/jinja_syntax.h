// Tokens and syntax tree of the Jinja interpreter. Internal to model/.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/jinja_value.h"

namespace kvant::model::jinja {

// An error in a template at a line (from 1): "chat template, line 3: what".
Error error_at(int line, ErrorCode code, std::string_view what);
inline Error unsupported_at(int line, std::string_view what) {
  return error_at(line, ErrorCode::kUnsupported, what);
}
inline Error invalid_at(int line, std::string_view what) {
  return error_at(line, ErrorCode::kInvalidArgument, what);
}

struct Token {
  enum class Kind {
    kText,        // outside of tags
    kBlockBegin,  // {%
    kBlockEnd,
    kPrintBegin,  // {{
    kPrintEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,  // also brackets, commas, dots
    kEnd,
  };
  Kind kind = Kind::kEnd;
  std::string text;  // of strings: unescaped
  int line = 1;
};

// Splits a template into tokens, with white space control done as the environment of Hugging Face
// does: trim_blocks and lstrip_blocks on, one newline at the end dropped.
Result<std::vector<Token>> tokenize(std::string_view source);

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Argument {
  std::string name;  // empty: positional
  ExpressionPtr value;
};

struct Expression {
  enum class Kind {
    kLiteral,    // literal
    kName,       // text
    kList,       // arguments
    kTuple,      // arguments
    kDict,       // arguments: key, value, key, value ...
    kAttribute,  // operands[0].text
    kIndex,      // operands[0][operands[1]]
    kSlice,      // operands[0][operands[1]:operands[2]:operands[3]], each but the first may be null
    kCall,       // operands[0](arguments)
    kFilter,     // operands[0] | text(arguments)
    kTest,       // operands[0] is text(arguments)
    kNot,        // not operands[0]
    kNegate,     // - operands[0]
    kAnd,
    kOr,
    kBinary,   // operands[0] text operands[1], of arithmetic, `~`, comparisons, `in`, `not in`
    kCompare,  // a < b < c: operands, operators[i] between i and i + 1
    kIf,       // operands[0] if operands[1] else operands[2], which may be null
  };
  Kind kind = Kind::kLiteral;
  int line = 1;
  int depth = 1;  // of the tree below, for the limit
  std::string text;
  Value literal;
  std::vector<ExpressionPtr> operands;
  std::vector<std::string> operators;
  std::vector<Argument> arguments;
};

struct Statement;
using Body = std::vector<Statement>;

struct Parameter {
  std::string name;
  ExpressionPtr fallback;  // null: none
};

struct MacroDefinition {
  std::string name;
  std::vector<Parameter> parameters;
  std::shared_ptr<Body> body;
};

struct Statement {
  enum class Kind {
    kText,      // text
    kPrint,     // expression
    kFor,       // for names in expression [if condition]: body, else_body
    kIf,        // branches; a null condition is `else`
    kSet,       // set names = expression, or set name.member = expression
    kSetBlock,  // set name: body
    kMacro,
    kBreak,
    kContinue,
    kGroup,  // a block whose tags mean nothing here (generation): body
  };
  struct Branch {
    ExpressionPtr condition;
    std::shared_ptr<Body> body;
  };
  Kind kind = Kind::kText;
  int line = 1;
  std::string text;
  std::vector<std::string> names;
  std::string member;
  ExpressionPtr expression;
  ExpressionPtr condition;
  std::shared_ptr<Body> body;
  std::shared_ptr<Body> else_body;
  std::vector<Branch> branches;
  std::shared_ptr<MacroDefinition> macro;
};

// kUnsupported names a construct that is not implemented and its line.
Result<Body> parse(const std::vector<Token>& tokens);

}  // namespace kvant::model::jinja
