// A store with a thread of its own: the engine asks, goes on, and collects what is done.
//
// Every public function is for the engine thread; only the store's calls run on the tier's thread.
// No answer of a tier is an error to the engine: a page that cannot be had is a miss, and counted.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kvant/serve/tiers/page_store.h"

namespace kvant::serve {

// When a tier is given a page.
enum class WritePolicy {
  kWriteBack,     // when the tier above evicts it
  kWriteThrough,  // when it is closed
  kSelective,     // when it has served `min_hits` requests
};

// kInvalidArgument names "back", "through", "selective".
Result<WritePolicy> parse_write_policy(std::string_view name);
std::string_view write_policy_name(WritePolicy policy);

struct TierOptions {
  WritePolicy policy = WritePolicy::kWriteBack;
  int min_hits = 2;
  int64_t max_queued_bytes = int64_t{256} << 20;  // of writes not yet done; more are dropped
  double expected_bytes_per_second = 1e9;         // until gets have been measured
};

struct TierStats {
  int64_t puts = 0, put_bytes = 0;  // done
  int64_t put_failures = 0;         // disk full, node down
  int64_t dropped = 0;              // the queue was full
  int64_t gets = 0, hits = 0, misses = 0;
  // Pages that gets and probes failed on otherwise: damaged, node down, timeout. Those that were
  // damaged when the store was opened, too.
  int64_t failures = 0;
  int64_t hit_bytes = 0;
  double get_seconds = 0;  // spent in gets
  int64_t evictions = 0;
  StoreUsage usage;
};

class Tier {
 public:
  enum class Kind { kPut, kGet, kProbe };
  // What is done. Evictions stand beside whatever caused them.
  struct Completion {
    Kind kind = Kind::kPut;
    uint64_t ticket = 0;
    PageName name;
    ObjectBytes object;       // kGet: null is a miss
    bool failed = false;      // kPut: the store does not hold it
    std::vector<bool> found;  // kProbe
    std::vector<EvictedPage> evicted;
  };
  // Applied on the tier's thread to objects on their way in and out, e.g. another layout. An error
  // is a failure of the put or get.
  using Convert = std::function<Result<std::vector<std::byte>>(const std::vector<std::byte>&)>;

  Tier(std::unique_ptr<PageStore> store, const TierOptions& options, Convert on_put = nullptr,
       Convert on_get = nullptr);
  // Finishes the writes that are queued, drops the rest.
  ~Tier();

  cache::Medium medium() const { return medium_; }
  const TierOptions& options() const { return options_; }
  // Called on the tier's thread when there is something to poll; null: none.
  void set_wakeup(std::function<void()> wakeup);

  // False if the queue is full: the page is not kept.
  bool put(const PageName& name, ObjectBytes object);
  void get(uint64_t ticket, const PageName& name);
  // One completion that says which of the names the store holds.
  void probe(uint64_t ticket, std::vector<PageName> names);
  void remove(const PageName& name);
  // Waits until nothing is queued; then empties the store.
  Status clear();
  void wait_idle();

  std::vector<Completion> poll();
  // Expected seconds of a get of so many bytes, from those measured: averages over about the last
  // thirty gets, and what is queued before it.
  double load_seconds(int64_t bytes) const;
  TierStats stats() const;
  int64_t queued_bytes() const;  // of writes

 private:
  struct Task {
    Kind kind = Kind::kPut;
    bool remove = false;
    uint64_t ticket = 0;
    std::vector<PageName> names;
    ObjectBytes object;
  };

  void run();
  void submit(Task task);
  void do_put(Task& task);
  void do_remove(const PageName& name);
  void do_probe(const Task& task);
  void do_gets(std::vector<Task>& tasks);
  void finish(Completion completion);
  Result<ObjectBytes> verified(const PageName& name, Result<ObjectBytes> object);
  void measure(double seconds, int64_t bytes);

  const std::unique_ptr<PageStore> store_;
  const TierOptions options_;
  const cache::Medium medium_;
  const Convert on_put_, on_get_;

  mutable std::mutex mutex_;  // guards all that follows
  std::condition_variable work_, idle_;
  std::deque<Task> tasks_;
  std::vector<Completion> done_;
  std::function<void()> wakeup_;
  TierStats stats_;
  double seconds_average_ = 0, bytes_average_ = 0;  // of gets that hit
  int64_t queued_bytes_ = 0, queued_gets_ = 0;
  bool busy_ = false, stopping_ = false;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace kvant::serve
