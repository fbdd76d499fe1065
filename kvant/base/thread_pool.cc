#include "kvant/base/thread_pool.h"

#include <sched.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kvant {
namespace {

// About 20 us: longer than the gaps between the operators of one token, short enough to cost
// nothing.
constexpr int kSpinRounds = 4000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct ThreadPool::State {
  // One loop at a time. `generation` announces a new loop; everything else is written before it.
  std::atomic<uint32_t> generation{0};
  std::atomic<int> workers_busy{0};
  std::atomic<int64_t> next_task{0};
  int64_t num_tasks = 0;
  Body body = nullptr;
  void* context = nullptr;
  bool stop = false;
  bool may_spin = true;

  std::mutex error_mutex;  // guards error
  std::exception_ptr error;

  std::vector<std::jthread> threads;

  void work(int worker) {
    try {
      for (;;) {
        const int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
        if (task >= num_tasks) return;
        body(context, task, worker);
      }
    } catch (...) {
      next_task.store(num_tasks, std::memory_order_relaxed);
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  void worker_loop(int worker) {
    uint32_t seen = 0;
    for (;;) {
      uint32_t now = generation.load(std::memory_order_acquire);
      for (int round = 0; now == seen && may_spin && round < kSpinRounds; ++round) {
        relax();
        now = generation.load(std::memory_order_acquire);
      }
      while (now == seen) {
        generation.wait(seen, std::memory_order_acquire);
        now = generation.load(std::memory_order_acquire);
      }
      seen = now;
      if (stop) return;
      work(worker);
      if (workers_busy.fetch_sub(1, std::memory_order_acq_rel) == 1) workers_busy.notify_one();
    }
  }
};

int ThreadPool::available_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return count;
  }
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads > 0 ? num_threads : available_processors()),
      state_(std::make_unique<State>()) {
  state_->may_spin = num_threads_ <= available_processors();
  for (int worker = 1; worker < num_threads_; ++worker) {
    state_->threads.emplace_back([state = state_.get(), worker] { state->worker_loop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  state_->stop = true;
  state_->generation.fetch_add(1, std::memory_order_release);
  state_->generation.notify_all();
  state_->threads.clear();
}

void ThreadPool::run(int64_t num_tasks, Body body, void* context) {
  if (num_tasks <= 0) return;
  if (num_threads_ == 1 || num_tasks == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(context, task, 0);
    return;
  }
  State& state = *state_;
  state.num_tasks = num_tasks;
  state.body = body;
  state.context = context;
  state.next_task.store(0, std::memory_order_relaxed);
  state.workers_busy.store(num_threads_ - 1, std::memory_order_relaxed);
  state.generation.fetch_add(1, std::memory_order_release);
  state.generation.notify_all();
  state.work(0);
  int busy = state.workers_busy.load(std::memory_order_acquire);
  for (int round = 0; busy != 0 && state.may_spin && round < kSpinRounds; ++round) {
    relax();
    busy = state.workers_busy.load(std::memory_order_acquire);
  }
  while (busy != 0) {
    state.workers_busy.wait(busy, std::memory_order_acquire);
    busy = state.workers_busy.load(std::memory_order_acquire);
  }
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

}  // namespace kvant
