#include "tests/conformance/conformance.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <ostream>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace kvant::conformance {

void PrintTo(const Feature& feature, std::ostream* out) {
  *out << feature.name;
}

namespace {

TEST(Conformance, EveryFormatHasACell) {
  std::set<formats::FormatId> seen;
  for (const FormatCell& cell : format_cells())
    EXPECT_TRUE(seen.insert(cell.id).second) << formats::format_info(cell.id).name << " twice";
  for (const formats::FormatInfo& info : formats::all_formats()) {
    const FormatCell* cell = find_cell(info.id);
    ASSERT_NE(cell, nullptr) << info.name
                             << " is in the registry but not in tests/conformance/format_cells.cc";
    EXPECT_EQ(cell->key_options != nullptr, info.for_keys) << info.name;
    EXPECT_EQ(cell->value_options != nullptr, info.for_values) << info.name;
    EXPECT_EQ(cell->strict, info.axis != formats::BlockAxis::kToken) << info.name;
  }
  EXPECT_EQ(seen.size(), formats::all_formats().size());
}

// An option is either in the cell or refused with an error: nothing is ignored silently.
TEST(Conformance, OptionsAreSupportedAsTheCellsSay) {
  const auto has = [](const char* options, const std::string& option) {
    std::istringstream stream(options);
    for (std::string word; stream >> word;) {
      if (word == option) return true;
    }
    return false;
  };
  for (const FormatCell& cell : format_cells()) {
    const std::string name(formats::format_info(cell.id).name);
    for (const std::string option : {"mean", "bias", "smooth", "rot", "46", "prerope"}) {
      for (const bool keys : {true, false}) {
        const char* options = keys ? cell.key_options : cell.value_options;
        if (options == nullptr) continue;
        std::string spec = keys ? "k=" : "k=nvfp4,v=";
        spec.append(name).append("+").append(option).append(keys ? ",v=nvfp4" : "");
        const auto format = formats::parse_cache_format(spec);
        EXPECT_EQ(format.has_value(), has(options, option)) << spec;
        if (!format) {
          EXPECT_EQ(format.error().code(), ErrorCode::kInvalidArgument) << spec;
        }
      }
    }
  }
}

class ConformanceCell : public ::testing::TestWithParam<std::tuple<Feature, std::string>> {};

TEST_P(ConformanceCell, Holds) {
  const auto& [feature, spec] = GetParam();
  const auto format = formats::parse_cache_format(spec);
  ASSERT_TRUE(format.has_value()) << format.error().message();
  feature.run(spec);
}

std::string cell_name(const ::testing::TestParamInfo<std::tuple<Feature, std::string>>& cell) {
  std::string name = std::get<0>(cell.param).name;
  name += "__";
  name += std::get<1>(cell.param);
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, ConformanceCell,
                         ::testing::Combine(::testing::ValuesIn(all_features()),
                                            ::testing::ValuesIn(all_subjects())),
                         cell_name);

}  // namespace

std::vector<Feature> all_features() {
  std::vector<Feature> features;
  for (const std::span<const Feature> part :
       {cache_features(), codec_features(), attention_features(), serve_features(),
        tier_features()}) {
    features.insert(features.end(), part.begin(), part.end());
  }
  return features;
}

}  // namespace kvant::conformance
