#include "tools/eval_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "tools/cli_support.h"
#include "tools/svg_plot.h"

namespace kvant::tools {
namespace {

constexpr int kPositionBins = 16;

// A table before it is text, Markdown or HTML.
struct ReportTable {
  std::string title;
  std::string note;  // what the numbers are
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;
};

std::string interval(double low, double high, const char* format) {
  return fmt::format("[{}, {}]", fmt::format(fmt::runtime(format), low),
                     fmt::format(fmt::runtime(format), high));
}

bool is_base(const EvalReport& report, size_t row) {
  return report.base_is_row && row == 0;
}

ReportTable summary_table(const EvalReport& report) {
  ReportTable table;
  table.title = "Formats";
  table.note = fmt::format(
      "ΔNLL and KL in nats relative to {}, with 95 % intervals (bootstrap); bits per value count "
      "everything that is stored at the end of a chunk, asymptotically only closed pages.",
      report.base);
  table.header = {"kv",      "bits/value", "asymptotic", "ppl",     "ΔNLL", "95 %",
                  "KL mean", "95 %",       "KL median",  "KL 99 %", "top-1"};
  for (const EvalRow& row : report.rows) {
    const model::EvalSummary& s = row.summary;
    table.rows.push_back({row.kv, fmt::format("{:.2f}", row.bits_per_value),
                          fmt::format("{:.2f}", row.bits_per_value_asymptotic),
                          fmt::format("{:.4f}", s.ppl), fmt::format("{:+.4f}", s.delta_nll),
                          interval(s.delta_nll_low, s.delta_nll_high, "{:+.4f}"),
                          fmt::format("{:.5f}", s.kl_mean), interval(s.kl_low, s.kl_high, "{:.5f}"),
                          fmt::format("{:.5f}", s.kl_median), fmt::format("{:.5f}", s.kl_p99),
                          fmt::format("{:.2f} %", 100 * s.top1)});
  }
  return table;
}

ReportTable pair_table(const EvalReport& report) {
  ReportTable table;
  table.title = "Format against format";
  table.note =
      "Difference of the mean KL on the same tokens, its 95 % interval and the p of its sign "
      "(paired bootstrap, two-sided).";
  table.header = {"a", "b", "KL(a) − KL(b)", "95 %", "p"};
  for (const EvalPair& pair : report.pairs) {
    table.rows.push_back(
        {report.rows[pair.a].kv, report.rows[pair.b].kv, fmt::format("{:+.5f}", pair.kl.mean),
         interval(pair.kl.low, pair.kl.high, "{:+.5f}"), fmt::format("{:.3f}", pair.kl.p)});
  }
  return table;
}

ReportTable position_table(const EvalReport& report) {
  ReportTable table;
  table.title = "By position";
  table.note = "Mean KL (ΔNLL) of the predictions after the tokens at these positions, all chunks.";
  table.header = {"positions"};
  for (size_t i = 0; i < report.rows.size(); ++i) {
    if (!is_base(report, i)) table.header.push_back(report.rows[i].kv);
  }
  for (size_t bin = 0; bin < report.rows[0].positions.size(); ++bin) {
    const model::PositionBin& place = report.rows[0].positions[bin];
    table.rows.push_back({fmt::format("{} – {}", place.first, place.last)});
    for (size_t i = 0; i < report.rows.size(); ++i) {
      if (is_base(report, i)) continue;
      const model::PositionBin& here = report.rows[i].positions[bin];
      table.rows.back().push_back(fmt::format("{:.5f} ({:+.4f})", here.kl_mean, here.delta_nll));
    }
  }
  return table;
}

ReportTable layer_table(const EvalReport& report) {
  ReportTable table;
  table.title = "By layer";
  table.note = fmt::format(
      "Mean KL (ΔNLL) relative to a BF16 cache where only this layer's keys and values are in the "
      "format; the first {} of the text.",
      report.layer_chunks == 1 ? "chunk" : fmt::format("{} chunks", report.layer_chunks));
  table.header = {"layer"};
  size_t layers = 0;
  for (const EvalRow& row : report.rows) {
    if (row.layers.empty()) continue;
    table.header.push_back(row.kv);
    layers = row.layers.size();
  }
  for (size_t layer = 0; layer < layers; ++layer) {
    table.rows.push_back({std::to_string(layer)});
    for (const EvalRow& row : report.rows) {
      if (row.layers.empty()) continue;
      const LayerError& error = row.layers[layer];
      table.rows.back().push_back(fmt::format("{:.6f} ({:+.5f})", error.kl_mean, error.delta_nll));
    }
  }
  return table;
}

std::vector<ReportTable> detail_tables(const EvalReport& report) {
  std::vector<ReportTable> tables;
  if (!report.pairs.empty()) tables.push_back(pair_table(report));
  tables.push_back(position_table(report));
  ReportTable layers = layer_table(report);
  if (!layers.rows.empty()) tables.push_back(std::move(layers));
  return tables;
}

std::string markdown_cell(const std::string& text) {
  std::string cell;
  for (const char c : text) {
    if (c == '|') cell += '\\';
    cell += c;
  }
  return cell;
}

std::string markdown_row(const std::vector<std::string>& cells) {
  std::string row = "|";
  for (const std::string& cell : cells) row += fmt::format(" {} |", markdown_cell(cell));
  return row + '\n';
}

std::string markdown_table(const ReportTable& table) {
  std::string text =
      fmt::format("## {}\n\n{}\n\n{}|", table.title, table.note, markdown_row(table.header));
  for (size_t i = 0; i < table.header.size(); ++i) text += i == 0 ? "---|" : "---:|";
  text += '\n';
  for (const auto& row : table.rows) text += markdown_row(row);
  return text + '\n';
}

std::string html_row(const std::vector<std::string>& cells, const char* tag) {
  std::string row = "<tr>";
  for (const auto& cell : cells) row += fmt::format("<{0}>{1}</{0}>", tag, escape_markup(cell));
  return row + "</tr>\n";
}

std::string html_table(const ReportTable& table) {
  std::string text = fmt::format("<h2>{}</h2>\n<p>{}</p>\n<div class='wide'><table>\n{}",
                                 escape_markup(table.title), escape_markup(table.note),
                                 html_row(table.header, "th"));
  for (const auto& row : table.rows) text += html_row(row, "td");
  return text + "</table></div>\n";
}

std::string model_name(const EvalReport& report) {
  return std::filesystem::path(report.model).filename().string();
}

std::string facts(const EvalReport& report) {
  const std::string text = report.text.empty() ? "tokens of the base" : report.text;
  return fmt::format(
      "{} {} of {} tokens, {} tokens scored (the second half of each chunk); text: {}; pages of {} "
      "tokens; base: {}.",
      report.chunks, report.chunks == 1 ? "chunk" : "chunks", report.ctx, report.tokens_scored,
      text == "bundled" ? "the one that kvant carries" : text, report.page_tokens, report.base);
}

struct NamedPlot {
  const char* file;
  const char* title;
  std::string svg;
};

std::vector<NamedPlot> named_plots(const EvalReport& report) {
  EvalPlots plots = eval_plots(report);
  std::vector<NamedPlot> named = {
      {"kl-by-bits.svg", "KL divergence against bits per value", std::move(plots.kl_by_bits)},
      {"kl-by-position.svg", "KL divergence by position", std::move(plots.kl_by_position)},
      {"delta-nll-by-position.svg", "ΔNLL by position", std::move(plots.delta_nll_by_position)},
      {"kl-by-layer.svg", "KL divergence by layer", std::move(plots.kl_by_layer)}};
  std::erase_if(named, [](const NamedPlot& plot) { return plot.svg.empty(); });
  return named;
}

double middle(const model::PositionBin& bin) {
  return static_cast<double>(bin.first + bin.last) / 2;
}

Json row_json(const EvalRow& row) {
  const model::EvalSummary& s = row.summary;
  Json object = {{"kv", row.kv},
                 {"kv_resolved", row.kv_resolved},
                 {"bits_per_value", row.bits_per_value},
                 {"bits_per_value_asymptotic", row.bits_per_value_asymptotic},
                 {"ppl", s.ppl},
                 {"nll", s.nll},
                 {"delta_nll", s.delta_nll},
                 {"delta_nll_low", s.delta_nll_low},
                 {"delta_nll_high", s.delta_nll_high},
                 {"kl_mean", s.kl_mean},
                 {"kl_low", s.kl_low},
                 {"kl_high", s.kl_high},
                 {"kl_median", s.kl_median},
                 {"kl_p99", s.kl_p99},
                 {"top1", s.top1}};
  Json positions = Json::array();
  for (const model::PositionBin& bin : row.positions) {
    positions.push_back({{"first", bin.first},
                         {"last", bin.last},
                         {"tokens", bin.num_tokens},
                         {"kl_mean", bin.kl_mean},
                         {"delta_nll", bin.delta_nll}});
  }
  object["by_position"] = std::move(positions);
  if (!row.layers.empty()) {
    Json layers = Json::array();
    for (const LayerError& error : row.layers) {
      layers.push_back(
          {{"layer", error.layer}, {"kl_mean", error.kl_mean}, {"delta_nll", error.delta_nll}});
    }
    object["by_layer"] = std::move(layers);
  }
  return object;
}

}  // namespace

void add_details(EvalReport& report, const std::vector<model::TokenScores>& scores) {
  const int64_t scored = report.tokens_scored / report.chunks;
  for (size_t i = 0; i < report.rows.size(); ++i) {
    report.rows[i].positions = model::by_position(scores[i], scored, report.ctx / 2, kPositionBins);
  }
  for (size_t a = report.base_is_row ? 1 : 0; a < report.rows.size(); ++a) {
    for (size_t b = a + 1; b < report.rows.size(); ++b) {
      report.pairs.push_back({a, b, model::compare_kl(scores[a], scores[b], scored)});
    }
  }
}

std::string eval_table(const EvalReport& report) {
  Table table({"kv", "bits/value", "ppl", "ΔNLL [95 % interval]", "KL mean [95 % interval]",
               "KL median", "KL 99 %", "top-1"});
  for (const EvalRow& row : report.rows) {
    const model::EvalSummary& s = row.summary;
    table.add_row({row.kv, fmt::format("{:.2f}", row.bits_per_value), fmt::format("{:.4f}", s.ppl),
                   fmt::format("{:+.4f} {}", s.delta_nll,
                               interval(s.delta_nll_low, s.delta_nll_high, "{:+.4f}")),
                   fmt::format("{:.5f} {}", s.kl_mean, interval(s.kl_low, s.kl_high, "{:.5f}")),
                   fmt::format("{:.5f}", s.kl_median), fmt::format("{:.5f}", s.kl_p99),
                   fmt::format("{:.2f} %", 100 * s.top1)});
  }
  std::string text = table.str();
  const ReportTable layers = layer_table(report);
  if (!layers.rows.empty()) {
    Table by_layer(layers.header);
    for (const auto& row : layers.rows) by_layer.add_row(row);
    text += fmt::format("\n{}\n{}", layers.note, by_layer.str());
  }
  return text;
}

Json eval_json(const EvalReport& report) {
  Json object = json_object("eval");
  object["model"] = report.model;
  object["text"] = report.text;
  object["ctx"] = report.ctx;
  object["chunks"] = report.chunks;
  object["tokens_scored"] = report.tokens_scored;
  object["page_tokens"] = report.page_tokens;
  object["base"] = report.base;
  if (report.layer_chunks > 0) object["layer_chunks"] = report.layer_chunks;
  Json results = Json::array();
  for (const EvalRow& row : report.rows) results.push_back(row_json(row));
  object["results"] = std::move(results);
  Json pairs = Json::array();
  for (const EvalPair& pair : report.pairs) {
    pairs.push_back({{"a", report.rows[pair.a].kv},
                     {"b", report.rows[pair.b].kv},
                     {"kl_difference", pair.kl.mean},
                     {"low", pair.kl.low},
                     {"high", pair.kl.high},
                     {"p", pair.kl.p}});
  }
  object["paired"] = std::move(pairs);
  return object;
}

EvalPlots eval_plots(const EvalReport& report) {
  Plot bits = {.title = fmt::format("KL divergence against bits per value, {}", model_name(report)),
               .x_label = "stored bits per value",
               .y_label = fmt::format("mean KL to {}, nats", report.base),
               .y_scale = PlotScale::kLog,
               .style = PlotStyle::kLabelledPoints,
               .series = {}};
  Plot kl = {.title = fmt::format("KL divergence by position, {}", model_name(report)),
             .x_label = "position in the context, tokens",
             .y_label = fmt::format("mean KL to {}, nats", report.base),
             .y_scale = PlotScale::kLog,
             .style = PlotStyle::kLines,
             .series = {}};
  Plot nll = kl;
  nll.title = fmt::format("ΔNLL by position, {}", model_name(report));
  nll.y_label = fmt::format("mean ΔNLL to {}, nats", report.base);
  nll.y_scale = PlotScale::kLinear;
  Plot layers = kl;
  layers.title = fmt::format("KL divergence by layer, {}", model_name(report));
  layers.x_label = "layer, the only one whose cache is quantised";
  layers.y_label = "mean KL to bf16, nats";
  for (size_t i = 0; i < report.rows.size(); ++i) {
    const EvalRow& row = report.rows[i];
    if (!row.layers.empty()) {
      layers.series.push_back({row.kv, {}});
      for (const LayerError& error : row.layers) {
        layers.series.back().points.push_back({static_cast<double>(error.layer), error.kl_mean});
      }
    }
    if (is_base(report, i)) continue;
    bits.series.push_back({row.kv, {{row.bits_per_value, row.summary.kl_mean}}});
    kl.series.push_back({row.kv, {}});
    nll.series.push_back({row.kv, {}});
    for (const model::PositionBin& bin : row.positions) {
      kl.series.back().points.push_back({middle(bin), bin.kl_mean});
      nll.series.back().points.push_back({middle(bin), bin.delta_nll});
    }
  }
  const auto drawn = [](const Plot& plot) {
    return plot.series.empty() ? std::string() : svg_plot(plot);
  };
  return {drawn(bits), drawn(kl), drawn(nll), drawn(layers)};
}

std::string eval_markdown(const EvalReport& report) {
  std::string text = fmt::format("# What cache formats cost: {}\n\n{}\n\n```\n{}\n```\n\n",
                                 model_name(report), facts(report), report.command);
  text += markdown_table(summary_table(report));
  for (const NamedPlot& plot : named_plots(report)) {
    text += fmt::format("![{}]({})\n\n", plot.title, plot.file);
  }
  for (const ReportTable& table : detail_tables(report)) text += markdown_table(table);
  text.pop_back();
  return text;
}

std::string eval_html(const EvalReport& report) {
  const std::string title =
      escape_markup(fmt::format("What cache formats cost: {}", model_name(report)));
  std::string text =
      "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
      "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
      "<meta name='color-scheme' content='light dark'>\n<title>" +
      title +
      "</title>\n<style>\n"
      "body{font:15px/1.5 system-ui,'Segoe UI',Helvetica,Arial,sans-serif;max-width:1100px;"
      "margin:2rem auto;padding:0 1rem;color:#1f2328;background:#ffffff}\n"
      "table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}\n"
      "th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #d8dee4;"
      "white-space:nowrap}\n"
      "th:first-child,td:first-child{text-align:left}\n"
      ".wide{overflow-x:auto}\nsvg{max-width:100%;height:auto;display:block;margin:1rem 0}\n"
      "pre{background:#f3f5f7;padding:.7rem 1rem;overflow-x:auto;border-radius:6px}\n"
      "@media (prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}"
      "th,td{border-color:#2a313a}pre{background:#161b22}}\n"
      "</style>\n</head>\n<body>\n";
  text += fmt::format("<h1>{}</h1>\n<p>{}</p>\n<pre>{}</pre>\n", title,
                      escape_markup(facts(report)), escape_markup(report.command));
  text += html_table(summary_table(report));
  for (const NamedPlot& plot : named_plots(report)) text += plot.svg;
  for (const ReportTable& table : detail_tables(report)) text += html_table(table);
  return text + "</body>\n</html>\n";
}

Status make_report_folder(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (!error && std::filesystem::is_directory(folder, error)) return {};
  return Error(ErrorCode::kIoError, fmt::format("cannot make the folder '{}' for the report: {}",
                                                folder, error ? error.message() : "it is a file"));
}

Status write_eval_report(const EvalReport& report, const std::string& folder) {
  KVANT_TRY(make_report_folder(folder));
  const std::filesystem::path path(folder);
  for (const NamedPlot& plot : named_plots(report)) {
    KVANT_TRY(write_file((path / plot.file).string(), plot.svg));
  }
  KVANT_TRY(write_file((path / "report.json").string(), json_text(eval_json(report)) + "\n"));
  KVANT_TRY(write_file((path / "report.md").string(), eval_markdown(report)));
  return write_file((path / "report.html").string(), eval_html(report));
}

}  // namespace kvant::tools
