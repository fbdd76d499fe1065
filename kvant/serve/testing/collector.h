// A listener for tests: keeps what it is told, and lets a test wait for the end.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "kvant/serve/request.h"

namespace kvant::serve::testing {

class Collector : public RequestListener {
 public:
  // `wants_more` is asked after each token with all so far; empty: always.
  explicit Collector(std::function<bool(const std::vector<int32_t>&)> wants_more = {})
      : wants_more_(std::move(wants_more)) {}

  void on_prompt(const PromptRecord& record) override {
    const std::lock_guard lock(mutex_);
    prompt_ = record;
  }
  bool on_token(const SampledToken& token, bool) override {
    const std::lock_guard lock(mutex_);
    tokens_.push_back(token);
    ids_.push_back(token.id);
    changed_.notify_all();
    return !wants_more_ || wants_more_(ids_);
  }
  void on_finish(const FinishRecord& record) override {
    const std::lock_guard lock(mutex_);
    finish_ = record;
    changed_.notify_all();
  }

  const FinishRecord& wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return finish_.has_value(); });
    return *finish_;
  }
  void wait_for_tokens(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return finish_.has_value() || ids_.size() >= count; });
  }
  bool finished() const {
    const std::lock_guard lock(mutex_);
    return finish_.has_value();
  }
  // After wait().
  const std::vector<int32_t>& ids() const { return ids_; }
  const std::vector<SampledToken>& tokens() const { return tokens_; }
  const PromptRecord& prompt() const { return prompt_; }

 private:
  std::function<bool(const std::vector<int32_t>&)> wants_more_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<SampledToken> tokens_;
  std::vector<int32_t> ids_;
  PromptRecord prompt_;
  std::optional<FinishRecord> finish_;
};

}  // namespace kvant::serve::testing
