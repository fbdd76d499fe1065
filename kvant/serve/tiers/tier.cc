#include "kvant/serve/tiers/tier.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <utility>

#include "kvant/cache/page_object.h"

namespace kvant::serve {

namespace {

constexpr size_t kMaxGetsAtOnce = 32;
constexpr double kNewShare = 1.0 / 30;  // of a new measurement in an average

struct Policy {
  WritePolicy policy;
  std::string_view name;
};
constexpr Policy kPolicies[] = {{WritePolicy::kWriteBack, "back"},
                                {WritePolicy::kWriteThrough, "through"},
                                {WritePolicy::kSelective, "selective"}};

}  // namespace

Result<WritePolicy> parse_write_policy(std::string_view name) {
  for (const Policy& policy : kPolicies) {
    if (policy.name == name) return policy.policy;
  }
  return Error(ErrorCode::kInvalidArgument,
               "no write policy '" + std::string(name) + "'; there are: back, through, selective");
}

std::string_view write_policy_name(WritePolicy policy) {
  return kPolicies[static_cast<size_t>(policy)].name;
}

Tier::Tier(std::unique_ptr<PageStore> store, const TierOptions& options, Convert on_put,
           Convert on_get)
    : store_(std::move(store)),
      options_(options),
      medium_(store_->medium()),
      on_put_(std::move(on_put)),
      on_get_(std::move(on_get)) {
  stats_.usage = store_->usage();
  stats_.failures = store_->damaged_pages();
  thread_ = std::thread([this] { run(); });
}

Tier::~Tier() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    std::erase_if(tasks_, [](const Task& task) { return task.kind != Kind::kPut; });
  }
  work_.notify_all();
  thread_.join();
}

void Tier::set_wakeup(std::function<void()> wakeup) {
  const std::lock_guard lock(mutex_);
  wakeup_ = std::move(wakeup);
}

// ---- engine thread ----

void Tier::submit(Task task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  work_.notify_one();
}

bool Tier::put(const PageName& name, ObjectBytes object) {
  const int64_t bytes = static_cast<int64_t>(object->size());
  {
    const std::lock_guard lock(mutex_);
    if (queued_bytes_ + bytes > options_.max_queued_bytes) {
      ++stats_.dropped;
      return false;
    }
    queued_bytes_ += bytes;
  }
  submit({.kind = Kind::kPut,
          .remove = false,
          .ticket = 0,
          .names = {name},
          .object = std::move(object)});
  return true;
}

void Tier::get(uint64_t ticket, const PageName& name) {
  {
    const std::lock_guard lock(mutex_);
    ++queued_gets_;
  }
  submit(
      {.kind = Kind::kGet, .remove = false, .ticket = ticket, .names = {name}, .object = nullptr});
}

void Tier::probe(uint64_t ticket, std::vector<PageName> names) {
  submit({.kind = Kind::kProbe,
          .remove = false,
          .ticket = ticket,
          .names = std::move(names),
          .object = nullptr});
}

void Tier::remove(const PageName& name) {
  submit({.kind = Kind::kPut, .remove = true, .ticket = 0, .names = {name}, .object = nullptr});
}

void Tier::wait_idle() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [&] { return tasks_.empty() && !busy_; });
}

Status Tier::clear() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [&] { return tasks_.empty() && !busy_; });
  // The thread sleeps and the lock keeps it so: the store is ours.
  Status status = store_->clear();
  (void)store_->take_evicted();
  stats_.usage = store_->usage();
  return status;
}

std::vector<Tier::Completion> Tier::poll() {
  const std::lock_guard lock(mutex_);
  return std::exchange(done_, {});
}

double Tier::load_seconds(int64_t bytes) const {
  const std::lock_guard lock(mutex_);
  const double waiting = static_cast<double>(queued_gets_) * seconds_average_;
  const double per_byte = bytes_average_ > 0 ? seconds_average_ / bytes_average_
                                             : 1 / options_.expected_bytes_per_second;
  return waiting + static_cast<double>(bytes) * per_byte;
}

TierStats Tier::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

int64_t Tier::queued_bytes() const {
  const std::lock_guard lock(mutex_);
  return queued_bytes_;
}

// ---- the tier's thread ----

void Tier::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    // A run of gets is answered together; a store may save round trips.
    std::vector<Task> taken;
    do {
      taken.push_back(std::move(tasks_.front()));
      tasks_.pop_front();
    } while (taken.front().kind == Kind::kGet && taken.size() < kMaxGetsAtOnce && !tasks_.empty() &&
             tasks_.front().kind == Kind::kGet);
    busy_ = true;
    lock.unlock();
    switch (taken.front().kind) {
      case Kind::kPut:
        if (taken.front().remove)
          do_remove(taken.front().names[0]);
        else
          do_put(taken.front());
        break;
      case Kind::kGet: do_gets(taken); break;
      case Kind::kProbe: do_probe(taken.front()); break;
    }
    lock.lock();
    stats_.usage = store_->usage();
    busy_ = false;
    if (tasks_.empty()) idle_.notify_all();
  }
}

void Tier::finish(Completion completion) {
  std::function<void()> wakeup;
  {
    const std::lock_guard lock(mutex_);
    stats_.evictions += static_cast<int64_t>(completion.evicted.size());
    done_.push_back(std::move(completion));
    wakeup = wakeup_;
  }
  if (wakeup) wakeup();
}

void Tier::do_put(Task& task) {
  const int64_t queued = static_cast<int64_t>(task.object->size());
  Result<PageStore::Put> put = PageStore::Put::kStored;
  if (store_->contains(task.names[0])) {
    put = PageStore::Put::kAlreadyThere;
  } else if (on_put_) {
    auto converted = on_put_(*task.object);
    if (converted) {
      task.object = std::make_shared<const std::vector<std::byte>>(std::move(*converted));
      put = store_->put(task.names[0], task.object);
    } else {
      put = converted.error();
    }
  } else {
    put = store_->put(task.names[0], task.object);
  }
  {
    const std::lock_guard lock(mutex_);
    queued_bytes_ -= queued;
    if (!put) {
      ++stats_.put_failures;
    } else if (*put == PageStore::Put::kStored) {
      ++stats_.puts;
      stats_.put_bytes += static_cast<int64_t>(task.object->size());
    }
  }
  finish({.kind = Kind::kPut,
          .ticket = 0,
          .name = task.names[0],
          .object = nullptr,
          .failed = !put.has_value(),
          .found = {},
          .evicted = store_->take_evicted()});
}

void Tier::do_remove(const PageName& name) {
  if (!store_->contains(name)) return;
  store_->remove(name);
  finish({.kind = Kind::kPut,
          .ticket = 0,
          .name = name,
          .object = nullptr,
          .failed = false,
          .found = {},
          .evicted = {{name, nullptr}}});
}

void Tier::do_probe(const Task& task) {
  std::vector<bool> found;
  int64_t failures = 0;
  for (const PageStore::Held held : store_->contains_many(task.names)) {
    found.push_back(held == PageStore::Held::kYes);
    failures += held == PageStore::Held::kUnknown ? 1 : 0;
  }
  {
    const std::lock_guard lock(mutex_);
    stats_.failures += failures;
  }
  finish({.kind = Kind::kProbe,
          .ticket = task.ticket,
          .name = {},
          .object = nullptr,
          .failed = false,
          .found = std::move(found),
          .evicted = {}});
}

Result<ObjectBytes> Tier::verified(const PageName& name, Result<ObjectBytes> object) {
  if (!object) return object;
  const auto parsed = cache::parse_page_object(**object);
  if (!parsed) return parsed.error();
  if (parsed->header.key != name.key || parsed->header.layer_group != name.group)
    return Error(ErrorCode::kCorruptData, "the tier returned another page");
  if (!on_get_) return object;
  KVANT_ASSIGN(auto converted, on_get_(**object));
  return ObjectBytes(std::make_shared<const std::vector<std::byte>>(std::move(converted)));
}

void Tier::measure(double seconds, int64_t bytes) {
  if (bytes_average_ == 0) {
    seconds_average_ = seconds;
    bytes_average_ = static_cast<double>(bytes);
    return;
  }
  seconds_average_ += kNewShare * (seconds - seconds_average_);
  bytes_average_ += kNewShare * (static_cast<double>(bytes) - bytes_average_);
}

void Tier::do_gets(std::vector<Task>& tasks) {
  using Clock = std::chrono::steady_clock;
  std::vector<PageName> names;
  for (const Task& task : tasks) names.push_back(task.names[0]);
  const Clock::time_point begin = Clock::now();
  std::vector<Result<ObjectBytes>> objects = store_->get_many(names);
  for (size_t i = 0; i < objects.size(); ++i)
    objects[i] = verified(names[i], std::move(objects[i]));
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  for (size_t i = 0; i < tasks.size(); ++i) {
    const bool failed = !objects[i] && objects[i].error().code() != ErrorCode::kNotFound;
    std::vector<EvictedPage> gone;
    // What is damaged would only be asked for again.
    if (failed && objects[i].error().code() == ErrorCode::kCorruptData &&
        store_->contains(names[i])) {
      store_->remove(names[i]);
      gone.push_back({names[i], nullptr});
    }
    {
      const std::lock_guard lock(mutex_);
      --queued_gets_;
      ++stats_.gets;
      if (objects[i]) {
        const int64_t bytes = static_cast<int64_t>((*objects[i])->size());
        ++stats_.hits;
        stats_.hit_bytes += bytes;
        measure(seconds / static_cast<double>(tasks.size()), bytes);
      } else {
        ++(failed ? stats_.failures : stats_.misses);
      }
      if (i == 0) stats_.get_seconds += seconds;
    }
    finish({.kind = Kind::kGet,
            .ticket = tasks[i].ticket,
            .name = names[i],
            .object = objects[i] ? *objects[i] : nullptr,
            .failed = false,
            .found = {},
            .evicted = std::move(gone)});
  }
}

}  // namespace kvant::serve
