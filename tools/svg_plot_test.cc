#include "tools/svg_plot.h"

#include <gtest/gtest.h>

#include <limits>

namespace kvant::tools {
namespace {

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++found;
  return found;
}

TEST(RoundTicks, AreRoundAndInside) {
  EXPECT_EQ(round_ticks(0, 10, PlotScale::kLinear, 5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(round_ticks(-1.2, 1.1, PlotScale::kLinear, 4), (std::vector<double>{-1, 0, 1}));
  EXPECT_EQ(round_ticks(0.9, 3000, PlotScale::kLog, 6), (std::vector<double>{1, 10, 100, 1000}));
  EXPECT_EQ(round_ticks(0.9, 30, PlotScale::kLog, 6), (std::vector<double>{1, 2, 5, 10, 20}));
  EXPECT_EQ(round_ticks(1e-20, 1e20, PlotScale::kLog, 5).size(), 11u);
  EXPECT_EQ(round_ticks(3, 3, PlotScale::kLinear, 5), std::vector<double>{3});
}

TEST(SvgPlot, JoinsWhatCanBeDrawn) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Plot plot = {.title = "a < b & c",
               .x_label = "x",
               .y_label = "y",
               .y_scale = PlotScale::kLog,
               .style = PlotStyle::kLines,
               .series = {{"first", {{1, 1e-3}, {2, 0}, {3, 1e-2}, {4, nan}, {5, 1}, {6, 2}}}}};
  const std::string svg = svg_plot(plot);
  EXPECT_EQ(count(svg, "<circle"), 4 + 1);  // points, and one in the legend
  EXPECT_NE(svg.find("a &lt; b &amp; c"), svg.npos);
  EXPECT_EQ(svg.find("nan"), svg.npos);
  const size_t line = svg.find("fill='none'");
  const std::string path = svg.substr(svg.rfind("d='", line), line - svg.rfind("d='", line));
  EXPECT_EQ(count(path, "M"), 3) << path;  // both gaps interrupt it
  EXPECT_EQ(count(path, "L"), 1) << path;
}

TEST(SvgPlot, LabelsPointsApart) {
  Plot plot;
  plot.style = PlotStyle::kLabelledPoints;
  for (int i = 0; i < 12; ++i) plot.series.push_back({"name " + std::to_string(i), {{4.5, 0.01}}});
  const std::string svg = svg_plot(plot);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(count(svg, ">name " + std::to_string(i) + "<"), 1);
  EXPECT_EQ(count(svg, "<circle"), 8);
  EXPECT_EQ(count(svg, "height='7'"), 4);  // a second shape after eight colours
}

TEST(SvgPlot, SaysThatThereIsNothing) {
  Plot plot;
  plot.series = {{"s", {}}};
  EXPECT_NE(svg_plot(plot).find("nothing to show"), std::string::npos);
}

}  // namespace
}  // namespace kvant::tools
