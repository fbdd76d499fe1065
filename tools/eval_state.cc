#include "tools/eval_state.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

#include "tools/cli_support.h"

namespace kvant::tools {
namespace {

constexpr int kStateVersion = 1;
constexpr const char* kVersionKey = "kvant_eval_state";

Error corrupt(const std::string& name, int64_t line, std::string_view what) {
  return Error(
      ErrorCode::kCorruptData,
      fmt::format("'{}' line {}: {}; it is no state of `kvant eval`, or damaged: remove it "
                  "to start afresh",
                  name, line, what));
}

Json header_json(const EvalIdentity& identity) {
  return {{kVersionKey, kStateVersion}, {"evaluation", identity.facts}};
}

// Long values (hashes) say nothing to people.
std::string shown(const Json& value) {
  const std::string text = json_text(value);
  return text.size() <= 60 ? text : text.substr(0, 12) + "...";
}

Status check_header(const Json& header, const EvalIdentity& identity, const std::string& name) {
  if (!header.is_object() || !header.contains(kVersionKey) || !header.contains("evaluation") ||
      !header["evaluation"].is_object()) {
    return corrupt(name, 1, "expected the head of a state");
  }
  if (header[kVersionKey] != kStateVersion) {
    return Error(
        ErrorCode::kUnsupported,
        fmt::format("'{}' has version {}, this program reads {}: remove it to start afresh", name,
                    shown(header[kVersionKey]), kStateVersion));
  }
  const Json& facts = header["evaluation"];
  for (const auto& [key, value] : identity.facts.items()) {
    const Json found = facts.contains(key) ? facts[key] : Json();
    if (found == value) continue;
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("'{}' belongs to another evaluation: its {} is {}, now it is {}; name "
                             "another file, or remove it to start afresh",
                             name, key, shown(found), shown(value)));
  }
  return {};
}

// An array of `count` finite numbers.
template <typename T>
bool read_numbers(const Json& object, const char* key, size_t count, std::vector<T>& values) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array() || found->size() != count) return false;
  for (const Json& value : *found) {
    if (!value.is_number()) return false;
    const auto number = value.get<double>();
    if (!std::isfinite(number)) return false;
    values.push_back(static_cast<T>(number));
  }
  return true;
}

bool read_scores(const Json& object, size_t count, model::TokenScores& scores) {
  if (!object.is_object() || !read_numbers(object, "nll", count, scores.nll) ||
      !read_numbers(object, "delta_nll", count, scores.delta_nll) ||
      !read_numbers(object, "kl", count, scores.kl)) {
    return false;
  }
  const auto same = object.find("same_top");
  if (same == object.end() || !same->is_string()) return false;
  const auto& flags = same->get_ref<const std::string&>();
  if (flags.size() != count || flags.find_first_not_of("01") != flags.npos) return false;
  for (const char flag : flags) scores.same_top.push_back(flag == '1' ? 1 : 0);
  return true;
}

bool read_chunk(const Json& line, const EvalIdentity& identity, EvalStateData& data) {
  const auto scores = line.find("scores");
  if (line["chunk"] != data.chunks || data.chunks >= identity.num_chunks || scores == line.end() ||
      !scores->is_array() || scores->size() != identity.num_formats) {
    return false;
  }
  std::vector<double> bits;
  if (!read_numbers(line, "bits_per_value", identity.num_formats, bits)) return false;
  for (size_t i = 0; i < identity.num_formats; ++i) {
    model::TokenScores of_format;
    if (!read_scores((*scores)[i], static_cast<size_t>(identity.scored_per_chunk), of_format)) {
      return false;
    }
    append(data.scores[i], of_format);
  }
  data.bits_per_value = std::move(bits);
  ++data.chunks;
  return true;
}

bool read_layer(const Json& line, const EvalIdentity& identity, EvalStateData& data) {
  std::vector<double> values;
  for (const char* key : {"layer", "format", "kl_mean", "delta_nll"}) {
    const auto found = line.find(key);
    if (found == line.end() || !found->is_number()) return false;
    values.push_back(found->get<double>());
  }
  const bool counts = values[0] >= 0 && values[0] < 1e6 && values[1] >= 0 &&
                      values[1] < static_cast<double>(identity.num_formats);
  if (!counts || !std::isfinite(values[2]) || !std::isfinite(values[3])) return false;
  data.layers.emplace_back(static_cast<size_t>(values[1]),
                           LayerError{static_cast<int>(values[0]), values[2], values[3]});
  return true;
}

Json scores_json(const model::TokenScores& scores) {
  std::string same(scores.same_top.size(), '0');
  for (size_t i = 0; i < same.size(); ++i) same[i] = scores.same_top[i] != 0 ? '1' : '0';
  return {{"nll", scores.nll},
          {"delta_nll", scores.delta_nll},
          {"kl", scores.kl},
          {"same_top", std::move(same)}};
}

Error io_error(const std::string& path, int error_number) {
  return Error(ErrorCode::kIoError,
               fmt::format("cannot write '{}': {}", path, std::strerror(error_number)));
}

}  // namespace

Result<EvalStateData> parse_eval_state(std::string_view text, const EvalIdentity& identity,
                                       const std::string& name) {
  EvalStateData data;
  data.scores.resize(identity.num_formats);
  for (int64_t number = 1;; ++number) {
    const size_t end = text.find('\n', data.used_bytes);
    if (end == text.npos) break;
    const Json line =
        Json::parse(text.substr(data.used_bytes, end - data.used_bytes), nullptr, false);
    if (line.is_discarded() || !line.is_object()) {
      return corrupt(name, number, "expected an object in JSON");
    }
    if (number == 1) {
      KVANT_TRY(check_header(line, identity, name));
    } else if (line.contains("chunk") ? !read_chunk(line, identity, data)
                                      : !read_layer(line, identity, data)) {
      return corrupt(name, number, "expected the next chunk or a layer");
    }
    data.used_bytes = end + 1;
  }
  // A first line that was cut off is a file that was just begun; anything else is another file.
  const std::string head = fmt::format("{{\"{}\"", kVersionKey);
  if (data.used_bytes == 0 && text.substr(0, head.size()) != head.substr(0, text.size())) {
    return corrupt(name, 1, "expected the head of a state");
  }
  return data;
}

Result<std::unique_ptr<EvalState>> EvalState::open(const std::string& path,
                                                   const EvalIdentity& identity) {
  std::unique_ptr<EvalState> state(new EvalState);
  state->path_ = path;
  struct stat info = {};
  std::string text;
  const bool exists = ::stat(path.c_str(), &info) == 0;
  if (exists && S_ISREG(info.st_mode)) {
    KVANT_ASSIGN(text, read_file(path));
  }
  KVANT_ASSIGN(state->data_, parse_eval_state(text, identity, path));
  state->file_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (state->file_ < 0) return io_error(path, errno);
  if (state->data_.used_bytes < text.size() &&
      ::ftruncate(state->file_, static_cast<off_t>(state->data_.used_bytes)) != 0) {
    return io_error(path, errno);
  }
  if (state->data_.used_bytes == 0) KVANT_TRY(state->write_line(header_json(identity)));
  return state;
}

EvalState::~EvalState() {
  if (file_ >= 0) ::close(file_);
}

std::optional<LayerError> EvalState::layer(size_t format, int index) const {
  for (const auto& [of_format, error] : data_.layers) {
    if (of_format == format && error.layer == index) return error;
  }
  return std::nullopt;
}

Status EvalState::add_chunk(int64_t chunk, std::span<const model::TokenScores> scores,
                            std::span<const double> bits_per_value) {
  Json line = {{"chunk", chunk},
               {"bits_per_value", std::vector(bits_per_value.begin(), bits_per_value.end())}};
  Json all = Json::array();
  for (const model::TokenScores& of_format : scores) all.push_back(scores_json(of_format));
  line["scores"] = std::move(all);
  return write_line(line);
}

Status EvalState::add_layer(size_t format, const LayerError& error) {
  return write_line({{"layer", error.layer},
                     {"format", format},
                     {"kl_mean", error.kl_mean},
                     {"delta_nll", error.delta_nll}});
}

Status EvalState::write_line(const Json& line) {
  const std::string text = json_text(line) + "\n";
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t count = ::write(file_, text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return io_error(path_, errno);
    done += static_cast<size_t>(count);
  }
  // Devices and pipes cannot be synchronised, and need not be.
  if (::fdatasync(file_) != 0 && errno != EINVAL && errno != EROFS) return io_error(path_, errno);
  return {};
}

}  // namespace kvant::tools
