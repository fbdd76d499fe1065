// Conformance: every cache format works with every feature (design.md section 1.1).
//
// A subject is a cache format string; a feature is a function that exercises one part of the system
// with it and reports failures through gtest. The test runs their product. Subjects come from the
// registry by way of a table that states what each format supports (format_cells.cc): a format that
// is not in the table fails the test. Features of the cache are in cache_features.cc, those of
// attention in attention_features.cc, those of serving in serve_features.cc and tier_features.cc;
// other layers add a table of their own to all_features().
#pragma once

#include <span>
#include <string>
#include <vector>

#include "kvant/formats/format.h"
#include "kvant/formats/spec.h"

namespace kvant::conformance {

// What one base format supports. Options as in format strings, space-separated.
struct FormatCell {
  formats::FormatId id;
  const char* key_options;    // null: not a format for keys
  const char* value_options;  // null: not a format for values
  bool strict;                // its blocks lie within one token
  // Largest error of a closed page, relative L2 over a side of test values, without options.
  double max_relative_error;
};

std::span<const FormatCell> format_cells();
const FormatCell* find_cell(formats::FormatId id);

// All format strings to test: each base on each side alone and with each option, options together,
// options of the sequence, presets.
std::vector<std::string> all_subjects();

struct Feature {
  const char* name;
  void (*run)(const std::string& spec);
};

std::span<const Feature> cache_features();
std::span<const Feature> codec_features();
std::span<const Feature> attention_features();
std::span<const Feature> serve_features();
std::span<const Feature> tier_features();
// Of all layers.
std::vector<Feature> all_features();

}  // namespace kvant::conformance
