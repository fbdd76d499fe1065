#include "kvant/serve/grammar/number_range.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string_view>
#include <vector>

namespace kvant::serve::grammar {
namespace {

constexpr int64_t kMostInteger = 999'999'999'999'999'999;
constexpr double kMostNumber = 1e15;
constexpr std::string_view kAnyTail = "[0-9]{0,15}";                 // digits behind others
constexpr std::string_view kPositiveTail = "0{0,9}[1-9][0-9]{0,5}";  // not all zero
constexpr std::string_view kAnyFraction = "(\\.[0-9]{1,16})?";

std::string digits_of_any(size_t count) {
  return count == 0 ? "" : fmt::format("[0-9]{{{}}}", count);
}

bool all_are(std::string_view digits, char c) {
  return digits.find_first_not_of(c) == std::string_view::npos;
}

std::string either(const std::vector<std::string>& choices) {
  return fmt::format("({})", fmt::join(choices, "|"));
}

std::string digit_range(int first, int last) {
  return fmt::format("[{}-{}]", static_cast<char>(first), static_cast<char>(last));
}

// Strings of as many digits that are no less, or no more.
std::string at_least(std::string_view digits) {
  if (all_are(digits, '0')) return digits_of_any(digits.size());
  std::vector<std::string> choices = {fmt::format("{}{}", digits[0], at_least(digits.substr(1)))};
  if (digits[0] < '9') {
    choices.push_back(digit_range(digits[0] + 1, '9') + digits_of_any(digits.size() - 1));
  }
  return either(choices);
}

std::string at_most(std::string_view digits) {
  if (all_are(digits, '9')) return digits_of_any(digits.size());
  std::vector<std::string> choices = {fmt::format("{}{}", digits[0], at_most(digits.substr(1)))};
  if (digits[0] > '0') {
    choices.push_back(digit_range('0', digits[0] - 1) + digits_of_any(digits.size() - 1));
  }
  return either(choices);
}

std::string between(std::string_view low, std::string_view high) {  // of the same length
  if (low.empty()) return "";
  if (low[0] == high[0]) return fmt::format("{}{}", low[0], between(low.substr(1), high.substr(1)));
  std::vector<std::string> choices = {fmt::format("{}{}", low[0], at_least(low.substr(1))),
                                      fmt::format("{}{}", high[0], at_most(high.substr(1)))};
  if (high[0] - low[0] > 1) {
    choices.push_back(digit_range(low[0] + 1, high[0] - 1) + digits_of_any(low.size() - 1));
  }
  return either(choices);
}

// 0 <= low <= high.
std::string natural_range(int64_t low, int64_t high) {
  const std::string first = std::to_string(low);
  const std::string last = std::to_string(high);
  std::vector<std::string> choices;
  for (size_t length = first.size(); length <= last.size(); ++length) {
    const std::string from =
        length == first.size() ? first : fmt::format("1{:0>{}}", "", length - 1);
    choices.push_back(between(from, length == last.size() ? last : std::string(length, '9')));
  }
  return either(choices);
}

// ---- fractions: digits behind the point, shorter ones followed by zeros

std::string fraction_at_least(std::string_view digits, bool inclusive) {
  if (digits.empty()) return std::string(inclusive ? kAnyTail : kPositiveTail);
  std::vector<std::string> choices = {
      fmt::format("{}{}", digits[0], fraction_at_least(digits.substr(1), inclusive))};
  if (digits[0] < '9') choices.push_back(digit_range(digits[0] + 1, '9') + std::string(kAnyTail));
  return either(choices);
}

// `digits` not empty and not ending in 0; the text has at least one digit.
std::string fraction_at_most(std::string_view digits, bool inclusive) {
  std::vector<std::string> choices;
  if (digits[0] > '0') {
    choices.push_back(digit_range('0', digits[0] - 1) + std::string(kAnyTail));
  }
  if (digits.size() > 1) {
    choices.push_back(
        fmt::format("{}({})?", digits[0], fraction_at_most(digits.substr(1), inclusive)));
  } else if (inclusive) {
    choices.push_back(fmt::format("{}0{{0,3}}", digits[0]));
  }
  return either(choices);
}

struct Fraction {
  std::string_view digits;
  bool inclusive;
};

// low < high; the text has at least one digit.
std::string fraction_between(Fraction low, Fraction high) {
  const char first = low.digits.empty() ? '0' : low.digits[0];
  const Fraction low_rest = {low.digits.empty() ? low.digits : low.digits.substr(1), low.inclusive};
  const std::string_view high_rest = high.digits.substr(1);
  if (first == high.digits[0]) {
    const std::string rest = fraction_between(low_rest, {high_rest, high.inclusive});
    // The digits so far may be the lower bound itself, or lie above nothing else.
    const bool may_end = low.digits.size() <= 1 && low.inclusive;
    return may_end ? fmt::format("{}({})?", first, rest) : first + rest;
  }
  std::vector<std::string> choices = {
      fmt::format("{}{}", first, fraction_at_least(low_rest.digits, low.inclusive))};
  if (high.digits[0] - first > 1) {
    choices.push_back(digit_range(first + 1, high.digits[0] - 1) + std::string(kAnyTail));
  }
  if (!high_rest.empty()) {
    choices.push_back(
        fmt::format("{}({})?", high.digits[0], fraction_at_most(high_rest, high.inclusive)));
  } else if (high.inclusive) {
    choices.push_back(fmt::format("{}0{{0,3}}", high.digits[0]));
  }
  return either(choices);
}

struct Decimal {
  int64_t whole = 0;
  std::string fraction;  // without trailing zeros
  bool inclusive = true;
};

Decimal decimal(const Bound& bound) {  // 0 <= value < 1e15
  char text[400];
  const auto [end, error] =
      std::to_chars(text, text + sizeof(text), bound.value, std::chars_format::fixed);
  (void)error;  // a double below 1e15 has fewer digits
  const std::string_view all(text, static_cast<size_t>(end - text));
  const size_t point = std::min(all.find('.'), all.size());
  Decimal out;
  out.inclusive = bound.inclusive;
  std::from_chars(all.data(), all.data() + point, out.whole);
  if (point < all.size()) out.fraction = all.substr(point + 1);
  while (out.fraction.ends_with('0')) out.fraction.pop_back();
  return out;
}

// Without sign; 0 <= low <= high.
std::optional<std::string> positive_range(const Decimal& low, const Decimal& high) {
  if (low.whole == high.whole) {
    if (low.fraction == high.fraction) {
      if (!low.inclusive || !high.inclusive) return std::nullopt;
      if (low.fraction.empty()) return fmt::format("{}(\\.0)?", low.whole);
      return fmt::format("{}\\.{}0{{0,3}}", low.whole, low.fraction);
    }
    const std::string digits =
        fraction_between({low.fraction, low.inclusive}, {high.fraction, high.inclusive});
    const bool whole_too = low.fraction.empty() && low.inclusive;
    if (whole_too) return fmt::format("{}(\\.{})?", low.whole, digits);
    return fmt::format("{}\\.{}", low.whole, digits);
  }
  std::vector<std::string> choices;
  if (low.fraction.empty() && low.inclusive) {
    choices.push_back(fmt::format("{}{}", low.whole, kAnyFraction));
  } else {
    choices.push_back(
        fmt::format("{}\\.{}", low.whole, fraction_at_least(low.fraction, low.inclusive)));
  }
  if (high.whole - low.whole > 1) {
    choices.push_back(natural_range(low.whole + 1, high.whole - 1) + std::string(kAnyFraction));
  }
  if (!high.fraction.empty()) {
    choices.push_back(
        fmt::format("{}(\\.{})?", high.whole, fraction_at_most(high.fraction, high.inclusive)));
  } else if (high.inclusive) {
    choices.push_back(fmt::format("{}(\\.0)?", high.whole));
  }
  return either(choices);
}

std::optional<std::string> joined(const std::vector<std::optional<std::string>>& parts) {
  std::vector<std::string> choices;
  for (const auto& part : parts) {
    if (part) choices.push_back(*part);
  }
  if (choices.empty()) return std::nullopt;
  return either(choices);
}

bool is_empty(const Bound& low, const Bound& high) {
  return low.value > high.value || (low.value == high.value && (!low.inclusive || !high.inclusive));
}

}  // namespace

std::optional<std::string> integer_range_regex(const std::optional<Bound>& low,
                                               const std::optional<Bound>& high) {
  const auto clamped = [](double value) {
    constexpr double kLimit = static_cast<double>(kMostInteger);
    if (value >= kLimit) return kMostInteger;
    if (value <= -kLimit) return -kMostInteger;
    return static_cast<int64_t>(value);
  };
  int64_t first = -kMostInteger;
  int64_t last = kMostInteger;
  if (low) {
    if (low->value > static_cast<double>(kMostInteger)) return std::nullopt;
    const double up = std::ceil(low->value);
    first = clamped(!low->inclusive && up == low->value ? up + 1 : up);
  }
  if (high) {
    if (high->value < -static_cast<double>(kMostInteger)) return std::nullopt;
    const double down = std::floor(high->value);
    last = clamped(!high->inclusive && down == high->value ? down - 1 : down);
  }
  if (first > last) return std::nullopt;
  std::vector<std::optional<std::string>> parts;
  if (first < 0)
    parts.push_back(fmt::format("-{}", natural_range(std::max<int64_t>(-last, 1), -first)));
  if (last >= 0) parts.push_back(natural_range(std::max<int64_t>(first, 0), last));
  return joined(parts);
}

Result<std::optional<std::string>> number_range_regex(const std::optional<Bound>& low,
                                                      const std::optional<Bound>& high) {
  for (const auto& bound : {low, high}) {
    if (bound && !(std::abs(bound->value) < kMostNumber)) {
      return Error(ErrorCode::kUnsupported,
                   fmt::format("a bound of {}; bounds of numbers must be below 1e15 in magnitude",
                               bound->value));
    }
  }
  const Bound first = low.value_or(Bound{-kMostNumber, false});
  const Bound last = high.value_or(Bound{kMostNumber, false});
  if (is_empty(first, last)) return std::optional<std::string>();
  std::vector<std::optional<std::string>> parts;
  if (first.value < 0) {
    const Bound nearest = last.value < 0 ? Bound{-last.value, last.inclusive} : Bound{0, false};
    const auto part = positive_range(decimal(nearest), decimal({-first.value, first.inclusive}));
    if (part) parts.push_back(fmt::format("-{}", *part));
  }
  if (last.value > 0 || (last.value == 0 && last.inclusive)) {
    const Bound nearest = first.value < 0 ? Bound{0, true} : first;
    parts.push_back(positive_range(decimal(nearest), decimal(last)));
  }
  return joined(parts);
}

}  // namespace kvant::serve::grammar
