// What a `kvant eval` has finished, in a file, so that an interrupted one goes on.
//
// Lines of JSON: the first says which evaluation this is, each other one holds a finished chunk
//   {"chunk": 3, "bits_per_value": [...], "scores": [{"nll": [...], "delta_nll": [...],
//    "kl": [...], "same_top": "0110..."}, one a format]}
// or the error of one layer
//   {"layer": 7, "format": 2, "kl_mean": ..., "delta_nll": ...}
// A line is written at once and flushed to disk; one without its end (the machine went down) does
// not count. Numbers are read back to the bit. Single-thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/model/eval_stats.h"
#include "tools/eval_report.h"
#include "tools/json_output.h"

namespace kvant::tools {

// What a state belongs to.
struct EvalIdentity {
  Json facts;                    // an object; all its values must be equal
  size_t num_formats = 0;        // scores a chunk
  int64_t scored_per_chunk = 0;  // values of each
  int64_t num_chunks = 0;        // of the whole evaluation
};

struct EvalStateData {
  std::vector<model::TokenScores> scores;  // of the finished chunks, [formats]
  std::vector<double> bits_per_value;      // after the last of them, [formats]
  int64_t chunks = 0;
  std::vector<std::pair<size_t, LayerError>> layers;  // with the format's index
  size_t used_bytes = 0;                              // up to the end of the last whole line
};
// kCorruptData: not such a file; kInvalidArgument: of another evaluation. Both say what to do.
// `name` stands for the file in messages.
Result<EvalStateData> parse_eval_state(std::string_view text, const EvalIdentity& identity,
                                       const std::string& name);

class EvalState {
 public:
  // Reads `path` if it is there, and begins it otherwise. Errors of parse_eval_state(); kIoError.
  static Result<std::unique_ptr<EvalState>> open(const std::string& path,
                                                 const EvalIdentity& identity);
  ~EvalState();
  EvalState(const EvalState&) = delete;
  EvalState& operator=(const EvalState&) = delete;

  // What was there when the file was opened.
  const EvalStateData& data() const { return data_; }
  std::optional<LayerError> layer(size_t format, int index) const;

  // kIoError naming the path.
  Status add_chunk(int64_t chunk, std::span<const model::TokenScores> scores,
                   std::span<const double> bits_per_value);
  Status add_layer(size_t format, const LayerError& error);

 private:
  EvalState() = default;
  Status write_line(const Json& line);
  std::string path_;
  int file_ = -1;
  EvalStateData data_;
};

}  // namespace kvant::tools
