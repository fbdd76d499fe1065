// The results of `kvant eval` and the forms in which users get them: a text table, JSON, and a
// folder with a report in Markdown and in HTML, with plots. Pure but for write_eval_report().
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/eval_stats.h"
#include "tools/json_output.h"

namespace kvant::tools {

// What quantising the cache of one layer costs, all others being BF16.
struct LayerError {
  int layer = 0;
  double kl_mean = 0;
  double delta_nll = 0;
};

// One cache format with its results.
struct EvalRow {
  std::string kv;           // as asked
  std::string kv_resolved;  // canonical
  double bits_per_value = 0;
  double bits_per_value_asymptotic = 0;
  model::EvalSummary summary;
  std::vector<model::PositionBin> positions;
  std::vector<LayerError> layers;  // empty without --by-layer
};

struct EvalPair {
  size_t a = 0, b = 0;  // rows
  model::KlDifference kl;
};

struct EvalReport {
  std::string command;  // that gives these numbers
  std::string model;    // as asked
  std::string text;     // a file, "bundled", or empty: the tokens of the base
  std::string base;     // what ΔNLL and KL refer to: the first row's format or a file
  bool base_is_row = true;
  int64_t ctx = 0;
  int64_t chunks = 0;
  int64_t tokens_scored = 0;
  int page_tokens = 0;
  int64_t layer_chunks = 0;  // of the errors by layer
  std::vector<EvalRow> rows;
  std::vector<EvalPair> pairs;  // of the rows that are not the base
};

// Fills `positions` and `pairs` from the scores of each row.
void add_details(EvalReport& report, const std::vector<model::TokenScores>& scores);

std::string eval_table(const EvalReport& report);
Json eval_json(const EvalReport& report);

// The plots as SVG; each is empty text where its numbers are missing.
struct EvalPlots {
  std::string kl_by_bits;
  std::string kl_by_position;
  std::string delta_nll_by_position;
  std::string kl_by_layer;
};
EvalPlots eval_plots(const EvalReport& report);
std::string eval_markdown(const EvalReport& report);  // refers to the plots as *.svg beside it
std::string eval_html(const EvalReport& report);      // self-contained

// Writes report.md, report.html, report.json and the plots into `folder`, which is made if need be.
// kIoError naming the file.
Status write_eval_report(const EvalReport& report, const std::string& folder);
// Makes the folder, so that one that cannot be made is found before the work. kIoError.
Status make_report_folder(const std::string& folder);

}  // namespace kvant::tools
