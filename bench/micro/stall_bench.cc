// How much longer a decoded token takes when it fills a page.
//
//   build/bench/kvant_stall_bench MODEL.gguf 4bit --threads=2 --depth=2048 --tokens=1024
//
// Decodes token by token and prints milliseconds: of tokens in the middle of a page, of
// those that fill one (every layer closes it), and of those that begin the next.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/formats/spec.h"
#include "kvant/model/model.h"

namespace kvant {
namespace {

constexpr int kPageTokens = 64;
constexpr int64_t kPromptStep = 512;

struct Options {
  const char* model = nullptr;
  const char* kv = nullptr;
  int threads = 0;
  int64_t depth = 2048;
  int64_t tokens = 1024;
};

Result<std::vector<double>> token_times(const Options& options) {
  KVANT_ASSIGN(const auto backend,
               backend::create_backend({.name = "cpu", .num_threads = options.threads}));
  KVANT_ASSIGN(auto source, model::ModelSource::open(options.model));
  model::RuntimeOptions runtime;
  KVANT_ASSIGN(runtime.format, formats::parse_cache_format(options.kv));
  runtime.page_tokens = kPageTokens;
  runtime.context_tokens = options.depth + options.tokens;
  runtime.max_step_tokens = kPromptStep;
  KVANT_ASSIGN(const auto model, model::Model::load(std::move(source), *backend, {}));
  KVANT_TRY(model->reserve(runtime));
  KVANT_ASSIGN(const auto cache, model->create_cache(runtime));
  KVANT_ASSIGN(const auto id, cache->add_sequence());
  std::vector<int32_t> tokens(static_cast<size_t>(runtime.context_tokens));
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(model->config().vocab_size));
  }
  const auto forward = [&](int64_t begin, int64_t n) {
    const auto part = std::span(tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(n));
    const model::ForwardSequence sequence = {id, part, 1};
    return model->forward(std::span(&sequence, 1), *cache,
                          [](int64_t, std::span<const float>) { return Status(); });
  };
  for (int64_t at = 0; at < options.depth; at += kPromptStep) {
    KVANT_TRY(forward(at, std::min(kPromptStep, options.depth - at)));
  }
  std::vector<double> times;
  for (int64_t at = options.depth; at < runtime.context_tokens; ++at) {
    const auto start = std::chrono::steady_clock::now();
    KVANT_TRY(forward(at, 1));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    times.push_back(took.count());
  }
  return times;
}

void print(const char* what, std::vector<double> values) {
  if (values.empty()) return;
  std::sort(values.begin(), values.end());
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  std::printf("  %-20s median %.3f ms, mean %.3f, longest %.3f\n", what, values[values.size() / 2],
              sum / static_cast<double>(values.size()), values.back());
}

Status run(const Options& options) {
  KVANT_ASSIGN(const std::vector<double> times, token_times(options));
  std::vector<double> inside, fills, begins;
  for (size_t i = 0; i < times.size(); ++i) {
    const int64_t place = (options.depth + static_cast<int64_t>(i)) % kPageTokens;
    auto& list = place == kPageTokens - 1 ? fills : place == 0 ? begins : inside;
    list.push_back(times[i]);
  }
  std::printf("%s from depth %lld\n", options.kv, static_cast<long long>(options.depth));
  print("inside a page", std::move(inside));
  print("filling it", std::move(fills));
  print("beginning the next", std::move(begins));
  return {};
}

int64_t number_after(std::string_view argument, std::string_view option, int64_t otherwise) {
  return argument.starts_with(option) ? std::atoll(argument.data() + option.size()) : otherwise;
}

}  // namespace
}  // namespace kvant

int main(int argc, char** argv) {
  kvant::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    options.threads =
        static_cast<int>(kvant::number_after(argument, "--threads=", options.threads));
    options.depth = kvant::number_after(argument, "--depth=", options.depth);
    options.tokens = kvant::number_after(argument, "--tokens=", options.tokens);
    if (argument.starts_with("--")) continue;
    (options.model == nullptr ? options.model : options.kv) = argv[i];
  }
  if (options.kv == nullptr) {
    std::fprintf(stderr, "usage: %s MODEL.gguf KV [--threads=N] [--depth=N] [--tokens=N]\n",
                 argv[0]);
    return 64;
  }
  const kvant::Status done = kvant::run(options);
  if (done) return 0;
  std::fprintf(stderr, "%s\n", done.error().message().c_str());
  return 1;
}
