// A fixed set of threads that run the same loop together. The only threads of a kvant engine.
//
// One thread calls parallel_for at a time (thread-compatible); the caller works too. Waiting
// threads spin briefly and then sleep; they never spin when the pool has more threads than the
// machine has processors available to it.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace kvant {

class ThreadPool {
 public:
  // `num_threads` >= 1, the caller included; 0 means one per available processor.
  explicit ThreadPool(int num_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }
  static int available_processors();

  // Calls f(task, worker) once for each task in [0, num_tasks), worker in [0, num_threads). Tasks
  // are handed out in order, one at a time; which worker gets which task varies, so results must
  // not depend on it. The first exception is rethrown here after all workers have stopped.
  template <typename F>
  void parallel_for(int64_t num_tasks, F&& f) {
    using Function = std::remove_reference_t<F>;
    run(
        num_tasks,
        [](void* context, int64_t task, int worker) {
          (*static_cast<Function*>(context))(task, worker);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Body = void (*)(void* context, int64_t task, int worker);
  void run(int64_t num_tasks, Body body, void* context);

  struct State;
  int num_threads_;
  std::unique_ptr<State> state_;
};

}  // namespace kvant
