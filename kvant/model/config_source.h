// Internal to model/: how configurations of both kinds become a ModelConfig.
#pragma once

#include "kvant/model/config.h"

namespace kvant::model {

// Reads what all architectures share, then lets the architecture speak. Does not check.
Result<ModelConfig> config_from_source(const ConfigSource& source, std::string_view architecture);

// A source that knows the size of the vocabulary.
class VocabularySource final : public ConfigSource {
 public:
  VocabularySource(const ConfigSource& source, double vocab_size)
      : source_(source), vocab_size_(vocab_size) {}
  Result<std::optional<double>> number(std::string_view key) const override {
    if (key == "vocab_size") return std::optional<double>(vocab_size_);
    return source_.number(key);
  }
  Result<std::optional<std::string>> text(std::string_view key) const override {
    return source_.text(key);
  }
  std::optional<bool> has_tensor(std::string_view name) const override {
    return source_.has_tensor(name);
  }

 private:
  const ConfigSource& source_;
  const double vocab_size_;
};

}  // namespace kvant::model
