#include "kvant/formats/suggest.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace kvant::formats {
namespace {

constexpr size_t kLongestQuote = 80;

// Edits (insert, delete, replace, swap of neighbours) without regard to case; both strings are
// short.
size_t edit_distance(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  std::vector<size_t> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  std::iota(last.begin(), last.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const bool same = lower(a[i - 1]) == lower(b[j - 1]);
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (same ? 0 : 1)});
      if (i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) &&
          lower(a[i - 2]) == lower(b[j - 1])) {
        row[j] = std::min(row[j], before[j - 2] + 1);
      }
    }
    before.swap(last);
    last.swap(row);
  }
  return last[b.size()];
}

}  // namespace

std::string quote_name(std::string_view text) {
  std::string out = "'";
  for (const char c : text.substr(0, kLongestQuote)) out += c >= 0x20 && c < 0x7f ? c : '?';
  if (text.size() > kLongestQuote) out += "...";
  return out + "'";
}

std::string_view closest_name(std::string_view given, std::span<const std::string_view> names) {
  std::string_view closest;
  size_t least = std::string_view::npos;
  for (const std::string_view name : names) {
    if (given.empty() || given.size() > 2 * name.size() + 2) continue;
    const size_t distance = edit_distance(given, name);
    if (distance < least && distance <= (name.size() >= 6 ? 2u : 1u)) {
      least = distance;
      closest = name;
    }
  }
  return closest;
}

std::string did_you_mean(std::string_view name) {
  return name.empty() ? "" : " (did you mean '" + std::string(name) + "'?)";
}

}  // namespace kvant::formats
