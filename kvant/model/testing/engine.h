// A model, its backend and caches for tests: what a test asks for by one call each.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/formats/spec.h"
#include "kvant/model/model.h"
#include "kvant/model/source.h"

namespace kvant::model::testing {

// Throws std::logic_error with the message of an error: a test that goes on would only confuse.
template <typename T>
T must(Result<T> result) {
  return std::move(result).value();
}
inline void must(const Status& status) {
  status.value();
}

inline RuntimeOptions small_runtime(std::string_view kv) {
  RuntimeOptions runtime;
  runtime.format = must(formats::parse_cache_format(kv));
  runtime.page_tokens = 16;
  runtime.context_tokens = 256;
  runtime.max_sequences = 4;
  runtime.max_step_tokens = 256;
  runtime.max_logit_rows = 8;
  return runtime;
}

class Engine {
 public:
  Engine(std::vector<std::byte> file, const std::string& backend_name, int num_threads = 1)
      : Engine(std::move(file),
               backend::BackendOptions{
                   .name = backend_name, .num_threads = num_threads, .deterministic = true}) {}
  Engine(std::vector<std::byte> file, const backend::BackendOptions& options,
         WeightStorage storage = WeightStorage::kAsInFile)
      : file_(std::move(file)),
        backend_(must(backend::create_backend(options))),
        model_(must(Model::load(must(ModelSource::parse(file_, "test", storage)), *backend_, {}))) {
  }

  Model& model() { return *model_; }
  backend::Backend& backend() { return *backend_; }

  std::unique_ptr<cache::KvCache> cache(const RuntimeOptions& runtime) {
    must(model_->reserve(runtime));
    return must(model_->create_cache(runtime));
  }

  // Logits [rows][vocab] that one step gives.
  std::vector<std::vector<float>> step(cache::KvCache& cache,
                                       const std::vector<ForwardSequence>& sequences) {
    std::vector<std::vector<float>> rows;
    must(model_->forward(sequences, cache, [&](int64_t row, std::span<const float> logits) {
      EXPECT_EQ(row, static_cast<int64_t>(rows.size()));
      rows.emplace_back(logits.begin(), logits.end());
      return Status();
    }));
    return rows;
  }

  // Logits after each token of `tokens`, given in steps of `chunk`.
  std::vector<std::vector<float>> logits(cache::KvCache& cache, cache::SequenceId id,
                                         std::span<const int32_t> tokens, size_t chunk) {
    std::vector<std::vector<float>> rows;
    for (size_t done = 0; done < tokens.size(); done += chunk) {
      const std::span<const int32_t> part =
          tokens.subspan(done, std::min(chunk, tokens.size() - done));
      for (auto& row : step(cache, {{id, part, static_cast<int>(part.size())}})) {
        rows.push_back(std::move(row));
      }
    }
    return rows;
  }

 private:
  std::vector<std::byte> file_;
  std::unique_ptr<backend::Backend> backend_;
  std::unique_ptr<Model> model_;
};

inline std::vector<int32_t> random_tokens(size_t count, int vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(vocab));
  return ids;
}

// || a - b || / || b ||
inline double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(difference / norm);
}

}  // namespace kvant::model::testing
