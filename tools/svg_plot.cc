#include "tools/svg_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

namespace kvant::tools {
namespace {

// Pixels.
constexpr double kWidth = 760;
constexpr double kLeft = 84;
constexpr double kRight = 24;
constexpr double kTop = 44;
constexpr double kPlotHeight = 340;
constexpr double kAxisHeight = 54;  // tick labels and the axis' name
constexpr double kLegendRow = 20;
constexpr double kCharWidth = 6.4;  // of the 12-pixel labels, generously

constexpr size_t kNumColours = 8;
// Dark enough on white, light enough on black; told apart by readers who do not see red and green.
constexpr std::array<const char*, kNumColours> kLightColours = {
    "#0b7a75", "#c2410c", "#5b4bb7", "#b01c62", "#4d7c0f", "#1d6fb8", "#8a6100", "#57606a"};
constexpr std::array<const char*, kNumColours> kDarkColours = {
    "#4fd1c5", "#fb923c", "#a78bfa", "#f472b6", "#a3e635", "#60a5fa", "#facc15", "#aab4bf"};

std::string colour_rules(const std::array<const char*, kNumColours>& colours) {
  std::string rules;
  for (size_t i = 0; i < colours.size(); ++i) {
    rules += fmt::format(".kp-l{0}{{stroke:{1}}}.kp-m{0}{{fill:{1}}}", i, colours[i]);
  }
  return rules;
}

std::string style_element() {
  return "<style>"
         ".kp-paper{fill:#ffffff}.kp-ink{fill:#1f2328}.kp-muted{fill:#57606a}"
         ".kp-grid{stroke:#d8dee4}.kp-axis{stroke:#57606a}" +
         colour_rules(kLightColours) +
         "@media (prefers-color-scheme:dark){"
         ".kp-paper{fill:#0d1117}.kp-ink{fill:#e6edf3}.kp-muted{fill:#9da7b3}"
         ".kp-grid{stroke:#2a313a}.kp-axis{stroke:#9da7b3}" +
         colour_rules(kDarkColours) + "}</style>\n";
}

struct Range {
  double low = 0;
  double high = 1;
};

double scaled(double value, PlotScale scale) {
  return scale == PlotScale::kLog ? std::log10(value) : value;
}

bool drawable(const PlotPoint& point, PlotScale scale) {
  return std::isfinite(point.x) && std::isfinite(point.y) &&
         (scale == PlotScale::kLinear || point.y > 0);
}

// The values with some air on both sides; in the axis' own units.
Range padded(double low, double high, PlotScale scale) {
  double from = scaled(low, scale);
  double to = scaled(high, scale);
  const double span = to - from;
  const double air = span > 0 ? 0.06 * span : (scale == PlotScale::kLog ? 0.5 : 1.0);
  from -= air;
  to += air;
  if (scale == PlotScale::kLinear) return {from, to};
  return {std::pow(10.0, from), std::pow(10.0, to)};
}

struct Box {
  double left, top, right, bottom;
  bool overlaps(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
  bool inside(const Box& other) const {
    return left >= other.left && right <= other.right && top >= other.top && bottom <= other.bottom;
  }
};

class Drawing {
 public:
  explicit Drawing(const Plot& plot) : plot_(plot) {}

  std::string draw() {
    const bool empty = !find_ranges();
    const double legend = plot_.style == PlotStyle::kLines ? place_legend() : 0;
    const double height = kTop + kPlotHeight + kAxisHeight + legend;
    svg_ = fmt::format(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {0} {1:.0f}' width='{0}' "
        "height='{1:.0f}' font-family='system-ui, Segoe UI, Helvetica, Arial, sans-serif' "
        "font-size='12' role='img' aria-label='{2}'>\n",
        kWidth, height, escape_markup(plot_.title));
    svg_ += style_element();
    svg_ +=
        fmt::format("<rect class='kp-paper' width='{}' height='{:.0f}' rx='6'/>\n", kWidth, height);
    text(kLeft, 26, "start", "kp-ink", plot_.title, "font-size='15' font-weight='600'");
    if (empty) {
      text(kWidth / 2, kTop + kPlotHeight / 2, "middle", "kp-muted", "nothing to show");
    } else {
      axes();
      for (size_t i = 0; i < plot_.series.size(); ++i) series(i);
      if (plot_.style == PlotStyle::kLines) {
        draw_legend();
      } else {
        labels();
      }
    }
    return svg_ + "</svg>\n";
  }

 private:
  // False if there is no point to draw.
  bool find_ranges() {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    Range x = {kInfinity, -kInfinity};
    Range y = {kInfinity, -kInfinity};
    for (const PlotSeries& series : plot_.series) {
      for (const PlotPoint& point : series.points) {
        if (!drawable(point, plot_.y_scale)) continue;
        x = {std::min(x.low, point.x), std::max(x.high, point.x)};
        y = {std::min(y.low, point.y), std::max(y.high, point.y)};
      }
    }
    if (x.low > x.high) return false;
    x_ = padded(x.low, x.high, PlotScale::kLinear);
    y_ = padded(y.low, y.high, plot_.y_scale);
    return true;
  }

  double x_at(double x) const {
    return kLeft + (x - x_.low) / (x_.high - x_.low) * (kWidth - kLeft - kRight);
  }
  double y_at(double y) const {
    const double low = scaled(y_.low, plot_.y_scale);
    const double high = scaled(y_.high, plot_.y_scale);
    return kTop + (high - scaled(y, plot_.y_scale)) / (high - low) * kPlotHeight;
  }

  void text(double x, double y, const char* anchor, const char* colour, std::string_view words,
            const char* more = "") {
    svg_ += fmt::format("<text class='{}' x='{:.1f}' y='{:.1f}' text-anchor='{}' {}>{}</text>\n",
                        colour, x, y, anchor, more, escape_markup(words));
  }
  void line(double x1, double y1, double x2, double y2, const char* colour) {
    svg_ += fmt::format("<line class='{}' x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}'/>\n",
                        colour, x1, y1, x2, y2);
  }

  void axes() {
    const double bottom = kTop + kPlotHeight;
    for (const double tick : round_ticks(y_.low, y_.high, plot_.y_scale, 6)) {
      line(kLeft, y_at(tick), kWidth - kRight, y_at(tick), "kp-grid");
      text(kLeft - 8, y_at(tick) + 4, "end", "kp-muted", fmt::format("{:g}", tick));
    }
    for (const double tick : round_ticks(x_.low, x_.high, PlotScale::kLinear, 8)) {
      line(x_at(tick), kTop, x_at(tick), bottom, "kp-grid");
      text(x_at(tick), bottom + 18, "middle", "kp-muted", fmt::format("{:g}", tick));
    }
    if (plot_.y_scale == PlotScale::kLinear && y_.low < 0 && y_.high > 0) {
      line(kLeft, y_at(0), kWidth - kRight, y_at(0), "kp-axis");
    }
    line(kLeft, kTop, kLeft, bottom, "kp-axis");
    line(kLeft, bottom, kWidth - kRight, bottom, "kp-axis");
    text((kLeft + kWidth - kRight) / 2, bottom + 40, "middle", "kp-ink", plot_.x_label);
    const double middle = kTop + kPlotHeight / 2;
    text(0, 0, "middle", "kp-ink", plot_.y_label,
         fmt::format("transform='translate(20 {:.1f}) rotate(-90)'", middle).c_str());
  }

  // Colours repeat after eight series, with another shape.
  void marker(size_t index, double x, double y) {
    const std::string colour = fmt::format("kp-m{}", index % kNumColours);
    switch (index / kNumColours % 3) {
      case 0:
        svg_ += fmt::format("<circle class='{}' cx='{:.1f}' cy='{:.1f}' r='3.6'/>\n", colour, x, y);
        break;
      case 1:
        svg_ += fmt::format("<rect class='{}' x='{:.1f}' y='{:.1f}' width='7' height='7'/>\n",
                            colour, x - 3.5, y - 3.5);
        break;
      default:
        svg_ += fmt::format("<path class='{}' d='M{:.1f} {:.1f}l4.5 8h-9z'/>\n", colour, x, y - 5);
    }
  }

  const char* dash(size_t index) const {
    constexpr std::array<const char*, 3> kDashes = {"", " stroke-dasharray='6 4'",
                                                    " stroke-dasharray='2 3'"};
    return kDashes[index / kNumColours % kDashes.size()];
  }

  void series(size_t index) {
    const PlotSeries& series = plot_.series[index];
    if (plot_.style == PlotStyle::kLines) {
      std::string path;
      bool open = false;  // a point that cannot be drawn interrupts the line
      for (const PlotPoint& point : series.points) {
        const bool draw = drawable(point, plot_.y_scale);
        if (draw) {
          path += fmt::format("{}{:.1f} {:.1f}", open ? 'L' : 'M', x_at(point.x), y_at(point.y));
        }
        open = draw;
      }
      svg_ += fmt::format("<path class='kp-l{}' d='{}' fill='none' stroke-width='1.8'{}/>\n",
                          index % kNumColours, path, dash(index));
    }
    for (const PlotPoint& point : series.points) {
      if (drawable(point, plot_.y_scale)) marker(index, x_at(point.x), y_at(point.y));
    }
  }

  // Columns as wide as the longest name allows; returns the height.
  double place_legend() {
    size_t longest = 0;
    for (const PlotSeries& series : plot_.series) longest = std::max(longest, series.name.size());
    const double wanted = 40 + kCharWidth * static_cast<double>(longest);
    const double columns = std::max(1.0, std::floor((kWidth - kLeft - kRight) / wanted));
    legend_columns_ = static_cast<size_t>(columns);
    const size_t rows = (plot_.series.size() + legend_columns_ - 1) / legend_columns_;
    return static_cast<double>(rows) * kLegendRow + 8;
  }

  void draw_legend() {
    const double column = (kWidth - kLeft - kRight) / static_cast<double>(legend_columns_);
    for (size_t i = 0; i < plot_.series.size(); ++i) {
      const double x = kLeft + column * static_cast<double>(i % legend_columns_);
      const double y = kTop + kPlotHeight + kAxisHeight +
                       kLegendRow * static_cast<double>(i / legend_columns_) + 6;
      svg_ += fmt::format("<path class='kp-l{}' d='M{:.1f} {:.1f}h22' stroke-width='1.8'{}/>\n",
                          i % kNumColours, x, y - 4, dash(i));
      marker(i, x + 11, y - 4);
      text(x + 30, y, "start", "kp-ink", plot_.series[i].name);
    }
  }

  // Names beside their points, where they cover neither points nor each other.
  void labels() {
    std::vector<Box> taken;
    for (const PlotSeries& series : plot_.series) {
      for (const PlotPoint& point : series.points) {
        if (!drawable(point, plot_.y_scale)) continue;
        const double x = x_at(point.x);
        const double y = y_at(point.y);
        taken.push_back({x - 5, y - 5, x + 5, y + 5});
      }
    }
    for (const PlotSeries& series : plot_.series) {
      for (const PlotPoint& point : series.points) {
        if (drawable(point, plot_.y_scale)) {
          label(series.name, x_at(point.x), y_at(point.y), taken);
        }
      }
    }
  }

  void label(const std::string& name, double x, double y, std::vector<Box>& taken) {
    const Box frame = {kLeft + 2, kTop - 6, kWidth - 4, kTop + kPlotHeight - 2};
    const double width = kCharWidth * static_cast<double>(name.size());
    // Directions, the most natural first.
    constexpr std::array<std::pair<int, int>, 8> kDirections = {
        {{1, 0}, {-1, 0}, {1, -1}, {1, 1}, {-1, -1}, {-1, 1}, {0, -1}, {0, 1}}};
    for (const double distance : {8.0, 18.0, 30.0, 44.0, 60.0, 80.0}) {
      for (const auto& [dx, dy] : kDirections) {
        const double middle_y = y + dy * distance;
        const double near_x = x + dx * (dy == 0 ? distance : std::min(distance, 14.0));
        const double left = dx > 0 ? near_x : dx < 0 ? near_x - width : x - width / 2;
        const Box box = {left, middle_y - 7, left + width, middle_y + 7};
        const auto hit = [&](const Box& other) { return box.overlaps(other); };
        if (!box.inside(frame) || std::any_of(taken.begin(), taken.end(), hit)) continue;
        if (distance > 8) line(x, y, dx == 0 ? x : near_x, middle_y, "kp-axis");
        const char* anchor = dx > 0 ? "start" : dx < 0 ? "end" : "middle";
        text(dx == 0 ? x : near_x, middle_y + 4, anchor, "kp-ink", name);
        taken.push_back(box);
        return;
      }
    }
    text(x + 8, y + 4, "start", "kp-ink", name);  // no room: better above others than not at all
  }

  const Plot& plot_;
  Range x_;
  Range y_;
  size_t legend_columns_ = 1;
  std::string svg_;
};

}  // namespace

std::string svg_plot(const Plot& plot) {
  return Drawing(plot).draw();
}

std::vector<double> round_ticks(double low, double high, PlotScale scale, int wanted) {
  std::vector<double> ticks;
  if (!(low < high)) return {low};
  if (scale == PlotScale::kLog) {
    const double decades = std::log10(high / low);
    const bool few = decades < 2.5;
    const int step = std::max(1, static_cast<int>(std::ceil(decades / (2.0 * wanted))));
    const int from = static_cast<int>(std::floor(std::log10(low)));
    const int to = static_cast<int>(std::ceil(std::log10(high)));
    for (int exponent = from; exponent <= to; exponent += step) {
      const std::array<double, 3> factors = {1, 2, 5};
      for (const double factor : std::span(factors).first(few ? 3 : 1)) {
        const double tick = factor * std::pow(10.0, exponent);
        if (tick >= low && tick <= high) ticks.push_back(tick);
      }
    }
    return ticks;
  }
  const double rough = (high - low) / wanted;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  const double factor = rough / power;
  const double step = power * (factor <= 1 ? 1 : factor <= 2 ? 2 : factor <= 5 ? 5 : 10);
  for (double index = std::ceil(low / step); index * step <= high; ++index) {
    ticks.push_back(index == 0 ? 0 : index * step);  // never -0
  }
  return ticks;
}

std::string escape_markup(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&': escaped += "&amp;"; break;
      case '<': escaped += "&lt;"; break;
      case '>': escaped += "&gt;"; break;
      case '\'': escaped += "&#39;"; break;
      case '"': escaped += "&quot;"; break;
      default: escaped += c;
    }
  }
  return escaped;
}

}  // namespace kvant::tools
