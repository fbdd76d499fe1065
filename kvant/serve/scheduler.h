// Who is served next: the decisions of the engine's loop as functions of numbers, without a model
// or a cache. Thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace kvant::serve {

// ---- admission ----

struct WaitingView {
  int priority = 0;         // lower first
  double tenant_share = 0;  // FairShare::served of its tenant
  double waited_seconds = 0;
  int64_t cached_tokens = 0;   // of its tokens, in the prefix cache
  int64_t missing_tokens = 0;  // to compute before its next token
  // Another request is computing pages that this one will share: it waits for them.
  bool deferred = false;
};

// Index of the request to admit next; nothing if all are deferred. Priority decides first, then the
// tenant that got least. Within these the longest cached share goes first, so that pages are used
// while they are there, unless the one that came first has waited longer than `max_overtaking`.
// `waiting` is in order of arrival.
std::optional<size_t> choose_waiting(std::span<const WaitingView> waiting,
                                     double max_overtaking_seconds);

// Tokens that each tenant got, so that the one with least is served next ("virtual token counter":
// Sheng et al., Fairness in Serving Large Language Models, 2024, section 4). Who was away gets no
// credit for it: a tenant that returns starts at the least of those that are there.
class FairShare {
 public:
  void arrive(const std::string& tenant);
  void leave(const std::string& tenant);
  void charge(const std::string& tenant, int64_t tokens);
  double served(const std::string& tenant) const;

 private:
  struct Account {
    double tokens = 0;
    int64_t requests = 0;  // that are in the engine
  };
  std::unordered_map<std::string, Account> accounts_;  // of tenants that are there, or were lately
};

// ---- one step ----

struct RunningView {
  int64_t missing_tokens = 1;  // known and not yet computed, at least one
  int64_t draft_tokens = 0;    // may follow; only with one missing token
};

// How many tokens of each request the next step computes: first one of every request whose prompt
// is done, then drafts, then prompts in the order given, as long as the budget lasts. Some may get
// none. `budget` is at least the number of requests, so that no answer waits for a prompt.
std::vector<int64_t> share_budget(std::span<const RunningView> running, int64_t budget);

// ---- preemption ----

struct VictimView {
  int priority = 0;
  int64_t admission = 0;  // counts up
};
// Index of the request to preempt: the highest priority number, of these the last admitted.
// `running` is not empty.
size_t choose_victim(std::span<const VictimView> running);

}  // namespace kvant::serve
