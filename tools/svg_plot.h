// Small plots as SVG text, for reports: lines over x, or labelled points; y linear or logarithmic.
//
// The picture names its colours by classes that follow the reader's light or dark theme, and needs
// nothing outside itself. Pure functions, thread-safe.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace kvant::tools {

struct PlotPoint {
  double x = 0;
  double y = 0;
};

struct PlotSeries {
  std::string name;               // in the legend, or beside each point
  std::vector<PlotPoint> points;  // in the order in which lines join them
};

enum class PlotScale { kLinear, kLog };
enum class PlotStyle {
  kLines,           // markers joined by lines, a legend below
  kLabelledPoints,  // each point carries its series' name
};

struct Plot {
  std::string title;
  std::string x_label;
  std::string y_label;
  PlotScale y_scale = PlotScale::kLinear;
  PlotStyle style = PlotStyle::kLines;
  std::vector<PlotSeries> series;
};

// An <svg> element. Points that are not finite, or not positive on a logarithmic axis, are left
// out; a plot without points says so.
std::string svg_plot(const Plot& plot);

// Positions of about `wanted` ticks at round numbers inside [low, high], ascending: steps of 1, 2
// or 5 times a power of ten; on a logarithmic scale (low > 0) powers of ten, with 2 and 5 times
// them where those are few.
std::vector<double> round_ticks(double low, double high, PlotScale scale, int wanted);

// `text` with &, <, > and quotes as entities: for SVG and HTML.
std::string escape_markup(std::string_view text);

}  // namespace kvant::tools
