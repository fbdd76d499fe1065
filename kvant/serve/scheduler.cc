#include "kvant/serve/scheduler.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "kvant/base/check.h"

namespace kvant::serve {

// ---- admission ----

std::optional<size_t> choose_waiting(std::span<const WaitingView> waiting,
                                     double max_overtaking_seconds) {
  const auto rank = [](const WaitingView& view) {
    return std::make_tuple(view.priority, view.tenant_share);
  };
  const auto cached_share = [](const WaitingView& view) {
    const int64_t tokens = view.cached_tokens + view.missing_tokens;
    return tokens == 0 ? 0.0
                       : static_cast<double>(view.cached_tokens) / static_cast<double>(tokens);
  };
  std::optional<size_t> first, best;
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (waiting[i].deferred) continue;
    if (!first || rank(waiting[i]) < rank(waiting[*first])) {
      first = best = i;
    } else if (rank(waiting[i]) == rank(waiting[*first]) &&
               cached_share(waiting[i]) > cached_share(waiting[*best])) {
      best = i;
    }
  }
  if (first && waiting[*first].waited_seconds > max_overtaking_seconds) return first;
  return best;
}

void FairShare::arrive(const std::string& tenant) {
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [name, account] : accounts_) {
    if (account.requests > 0) least = std::min(least, account.tokens);
  }
  Account& account = accounts_[tenant];
  if (account.requests == 0 && least < std::numeric_limits<double>::infinity()) {
    account.tokens = std::max(account.tokens, least);
  }
  ++account.requests;
}

void FairShare::leave(const std::string& tenant) {
  const auto found = accounts_.find(tenant);
  KVANT_CHECK(found != accounts_.end() && found->second.requests > 0, "who leaves has arrived");
  if (--found->second.requests > 0) return;
  // Once nobody is there all start anew.
  const bool empty =
      std::ranges::none_of(accounts_, [](const auto& entry) { return entry.second.requests > 0; });
  if (empty) accounts_.clear();
}

void FairShare::charge(const std::string& tenant, int64_t tokens) {
  const auto found = accounts_.find(tenant);
  KVANT_CHECK(found != accounts_.end(), "who is charged has arrived");
  found->second.tokens += static_cast<double>(tokens);
}

double FairShare::served(const std::string& tenant) const {
  const auto found = accounts_.find(tenant);
  return found == accounts_.end() ? 0 : found->second.tokens;
}

// ---- one step ----

std::vector<int64_t> share_budget(std::span<const RunningView> running, int64_t budget) {
  std::vector<int64_t> shares(running.size(), 0);
  const auto give = [&](size_t i, int64_t wanted) {
    const int64_t given = std::min(wanted, budget);
    shares[i] += given;
    budget -= given;
  };
  for (size_t i = 0; i < running.size(); ++i) {
    KVANT_CHECK(running[i].missing_tokens >= 1, "a running request has a token to compute");
    if (running[i].missing_tokens == 1) give(i, 1);
  }
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i].missing_tokens == 1) give(i, running[i].draft_tokens);
  }
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i].missing_tokens > 1) give(i, running[i].missing_tokens);
  }
  return shares;
}

// ---- preemption ----

size_t choose_victim(std::span<const VictimView> running) {
  const auto last = std::ranges::max_element(running, {}, [](const VictimView& view) {
    return std::make_tuple(view.priority, view.admission);
  });
  return static_cast<size_t>(last - running.begin());
}

}  // namespace kvant::serve
