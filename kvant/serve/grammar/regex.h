// Regular expressions in grammars: the subset of ECMAScript's (JSON schema's `pattern`) and
// Python's syntax that is regular.
//
// Characters, `.`, classes, \d \w \s and their opposites (ASCII; \s with Unicode's spaces), \t \n
// \r \f \v \0 \xHH \uHHHH \u{H}, groups of all kinds that only group, |, * + ? {n} {n,} {n,m} (lazy
// ones mean the same), ^ and $ at the ends. What needs context (look-around, back references, \b)
// or tables (\p) is kUnsupported and named with its position.
#pragma once

#include <string_view>

#include "kvant/base/result.h"
#include "kvant/serve/grammar/char_set.h"
#include "kvant/serve/grammar/grammar.h"

namespace kvant::serve::grammar {

enum class RegexMatch {
  kWhole,   // the text is a match
  kSearch,  // the text holds a match: JSON schema
};

struct RegexOptions {
  TextContext context = TextContext::kPlain;
  RegexMatch match = RegexMatch::kWhole;
};

// Adds the expression at `from` and returns the node behind it. kInvalidArgument or kUnsupported
// name the position in `pattern`.
Result<NodeId> add_regex(GrammarBuilder& builder, NodeId from, std::string_view pattern,
                         RegexOptions options = {});

}  // namespace kvant::serve::grammar
