#include <algorithm>
#include <sstream>

#include "tests/conformance/conformance.h"

namespace kvant::conformance {

using formats::FormatId;

namespace {

constexpr const char* kKeys = "mean bias smooth rot prerope";
constexpr const char* kValues = "bias rot";

// One row for each format of the registry. Errors are those of the test values, whose channel 3 of
// every 7 is large and far from zero, with some room.
constexpr FormatCell kCells[] = {
    {FormatId::kBf16, "prerope", "", true, 0.0},
    {FormatId::kF16, kKeys, kValues, true, 1e-3},
    {FormatId::kFp8, kKeys, kValues, true, 0.04},
    {FormatId::kFp8Head, kKeys, kValues, true, 0.04},
    {FormatId::kFp8Token, kKeys, kValues, true, 0.04},
    {FormatId::kFp8E5m2, kKeys, kValues, true, 0.08},
    {FormatId::kMxfp8, kKeys, kValues, true, 0.05},
    {FormatId::kInt8, kKeys, kValues, true, 0.01},
    {FormatId::kInt4, kKeys, kValues, true, 0.10},
    {FormatId::kInt4Channel, kKeys, nullptr, false, 0.08},
    {FormatId::kInt3Channel, kKeys, nullptr, false, 0.15},
    {FormatId::kInt2Channel, kKeys, nullptr, false, 0.35},
    {FormatId::kNvfp4, "mean bias smooth rot 46 prerope", "bias rot 46", true, 0.15},
    {FormatId::kMxfp4, kKeys, kValues, true, 0.20},
};

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text == nullptr ? "" : text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

// The other side of a subject is fixed, so that a failure names the side under test.
constexpr const char* kOtherKeys = "k=int4:channel";
constexpr const char* kOtherValues = ",v=nvfp4+46";

void add_side_subjects(const std::string& name, const FormatCell& cell,
                       std::vector<std::string>& subjects) {
  if (cell.key_options != nullptr) {
    subjects.push_back("k=" + name + kOtherValues);
    std::string all;
    for (const std::string& option : words(cell.key_options)) {
      subjects.push_back("k=" + name + "+" + option + kOtherValues);
      if (option != "bias") all += "+" + option;  // +mean and +bias exclude each other
    }
    subjects.push_back("k=" + name + all + kOtherValues + "+sink");
  }
  if (cell.value_options != nullptr) {
    subjects.push_back(std::string(kOtherKeys) + ",v=" + name);
    std::string all;
    for (const std::string& option : words(cell.value_options)) {
      subjects.push_back(std::string(kOtherKeys) + ",v=" + name + "+" + option);
      all += "+" + option;
    }
    subjects.push_back(std::string(kOtherKeys) + ",v=" + name + all + "+sink");
  }
}

void add_sequence_subjects(const std::string& name, const FormatCell& cell,
                           std::vector<std::string>& subjects) {
  const std::string both = "k=" + name + ",v=" + (cell.value_options == nullptr ? "nvfp4" : name);
  for (const char* options : {"", "+sink", "+recent20", "+sink+recent40"})
    subjects.push_back(both + options);
  if (cell.strict) subjects.push_back(both + "+strict");
}

}  // namespace

std::span<const FormatCell> format_cells() {
  return kCells;
}

const FormatCell* find_cell(FormatId id) {
  for (const FormatCell& cell : kCells) {
    if (cell.id == id) return &cell;
  }
  return nullptr;
}

std::vector<std::string> all_subjects() {
  std::vector<std::string> subjects;
  for (const formats::FormatInfo& info : formats::all_formats()) {
    const FormatCell* cell = find_cell(info.id);
    if (cell == nullptr) continue;  // Conformance.EveryFormatHasACell fails
    add_side_subjects(std::string(info.name), *cell, subjects);
    add_sequence_subjects(std::string(info.name), *cell, subjects);
  }
  for (const formats::Preset& preset : formats::all_presets()) subjects.emplace_back(preset.name);
  std::sort(subjects.begin(), subjects.end());
  subjects.erase(std::unique(subjects.begin(), subjects.end()), subjects.end());
  return subjects;
}

}  // namespace kvant::conformance
