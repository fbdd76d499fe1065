#include "tools/eval_report.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace kvant::tools {
namespace {

namespace fs = std::filesystem;

// Two chunks of 8 tokens, 3 scores each; the second format is ten times worse than the first.
EvalReport small_report() {
  EvalReport report;
  report.command = "kvant eval a&b.gguf --kv bf16,8bit,4bit";
  report.model = "models/a&b.gguf";
  report.text = "bundled";
  report.base = "bf16";
  report.ctx = 8;
  report.chunks = 2;
  report.tokens_scored = 6;
  report.page_tokens = 64;
  std::vector<model::TokenScores> scores;
  for (const double kl : {0.0, 0.001, 0.01}) {
    EvalRow row;
    row.kv = kl == 0 ? "bf16" : kl < 0.005 ? "8bit" : "4bit";
    row.kv_resolved = row.kv + " resolved";
    row.bits_per_value = kl == 0 ? 16 : kl < 0.005 ? 8.7 : 4.6;
    model::TokenScores of_row;
    for (int i = 0; i < 6; ++i) {
      of_row.nll.push_back(2 + kl);
      of_row.delta_nll.push_back(kl);
      of_row.kl.push_back(static_cast<float>(kl * (1 + i % 3)));
      of_row.same_top.push_back(1);
    }
    row.summary = model::summarize(of_row, 3);
    if (kl > 0) row.layers = {{0, kl, kl / 2}, {1, kl / 10, 0}};
    report.rows.push_back(row);
    scores.push_back(of_row);
  }
  report.layer_chunks = 1;
  add_details(report, scores);
  return report;
}

TEST(EvalReport, HasDetails) {
  const EvalReport report = small_report();
  ASSERT_EQ(report.rows[2].positions.size(), 3u);
  EXPECT_EQ(report.rows[2].positions[0].first, 4);  // ctx / 2
  EXPECT_NEAR(report.rows[2].positions[2].kl_mean, 0.03, 1e-8);
  ASSERT_EQ(report.pairs.size(), 1u);  // 8bit against 4bit: the base has no error
  EXPECT_NEAR(report.pairs[0].kl.mean, -0.018, 1e-8);
  EXPECT_EQ(report.pairs[0].kl.p, 0.5);  // two chunks cannot show more
}

TEST(EvalReport, JsonHasWhatPlotsShow) {
  const Json json = eval_json(small_report());
  EXPECT_EQ(json["schema_version"], 1);
  EXPECT_EQ(json["results"].size(), 3u);
  EXPECT_EQ(json["results"][1]["by_position"].size(), 3u);
  EXPECT_EQ(json["results"][1]["by_layer"][1]["layer"], 1);
  EXPECT_EQ(json["results"][1]["by_layer"][1]["kl_mean"], 0.0001);
  EXPECT_FALSE(json["results"][0].contains("by_layer"));
  EXPECT_EQ(json["paired"][0]["a"], "8bit");
  EXPECT_EQ(json["paired"][0]["b"], "4bit");
}

TEST(EvalReport, PlotsLeaveTheBaseOut) {
  const EvalPlots plots = eval_plots(small_report());
  EXPECT_NE(plots.kl_by_bits.find(">4bit<"), std::string::npos);
  EXPECT_EQ(plots.kl_by_bits.find(">bf16<"), std::string::npos);
  EXPECT_NE(plots.kl_by_layer.find("</svg>"), std::string::npos);
  EvalReport without = small_report();
  for (EvalRow& row : without.rows) row.layers.clear();
  EXPECT_EQ(eval_plots(without).kl_by_layer, "");
}

TEST(EvalReport, WritesAFolder) {
  const fs::path folder = fs::temp_directory_path() / "kvant_eval_report_test" / "new";
  fs::remove_all(folder.parent_path());
  ASSERT_TRUE(write_eval_report(small_report(), folder.string()));
  for (const char* name : {"report.md", "report.html", "report.json", "kl-by-bits.svg",
                           "kl-by-position.svg", "delta-nll-by-position.svg", "kl-by-layer.svg"}) {
    EXPECT_GT(fs::file_size(folder / name), 200u) << name;
  }
  const std::string html = eval_html(small_report());
  EXPECT_EQ(html.find("a&b"), std::string::npos);
  EXPECT_NE(html.find("a&amp;b.gguf"), std::string::npos);
  EXPECT_EQ(html.find("src="), std::string::npos);  // everything is inside
  EXPECT_EQ(html.find("http-"), std::string::npos);
  const std::string markdown = eval_markdown(small_report());
  EXPECT_NE(markdown.find("(kl-by-layer.svg)"), std::string::npos);
  EXPECT_NE(markdown.find("| 4bit | 4.60 |"), std::string::npos) << markdown;
  std::ofstream(folder / "file") << "x";
  EXPECT_EQ(make_report_folder((folder / "file").string()).error().code(), ErrorCode::kIoError);
  fs::remove_all(folder.parent_path());
}

}  // namespace
}  // namespace kvant::tools
