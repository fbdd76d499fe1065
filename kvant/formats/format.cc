#include "kvant/formats/format.h"

#include <array>
#include <string>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/formats/all_formats.h"
#include "kvant/formats/format_concept.h"
#include "kvant/formats/suggest.h"

namespace kvant::formats {

#define KVANT_FORMAT(number, Type, header) \
  static_assert(CheckFormat<Type>::value && Type::kInfo.id == FormatId::k##Type);
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT

namespace {

constexpr FormatInfo kFormats[] = {
#define KVANT_FORMAT(number, Type, header) Type::kInfo,
#include "kvant/formats/formats.def"
#undef KVANT_FORMAT
};

// Row of each number; a gap would hold -1.
constexpr auto kRowOfId = [] {
  std::array<int16_t, 256> rows{};
  rows.fill(-1);
  for (size_t i = 0; i < std::size(kFormats); ++i) {
    rows[static_cast<size_t>(kFormats[i].id)] = static_cast<int16_t>(i);
  }
  return rows;
}();

}  // namespace

std::span<const FormatInfo> all_formats() {
  return kFormats;
}

const FormatInfo& format_info(FormatId id) {
  const int row = kRowOfId[static_cast<size_t>(id)];
  KVANT_CHECK(row >= 0, "a FormatId is one of formats.def");
  return kFormats[row];
}

Result<FormatId> find_format(std::string_view name) {
  std::string list;
  std::vector<std::string_view> names;
  for (const FormatInfo& format : kFormats) {
    if (format.name == name) return format.id;
    names.push_back(format.name);
    list += list.empty() ? "" : ", ";
    list += format.name;
  }
  return Error(ErrorCode::kInvalidArgument, "unknown cache format " + quote_name(name) +
                                                did_you_mean(closest_name(name, names)) +
                                                "; formats: " + list);
}

}  // namespace kvant::formats
