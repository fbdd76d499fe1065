// Threads for what would keep an I/O thread too long: parsing and tokenising long prompts,
// assembling long responses.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kvant::serve::openai {

// Thread-safe. The destructor runs what is queued.
class TaskThreads {
 public:
  TaskThreads(int num_threads, size_t max_queued);
  ~TaskThreads();
  TaskThreads(const TaskThreads&) = delete;
  TaskThreads& operator=(const TaskThreads&) = delete;

  // False: so many wait already, and the task is not taken.
  bool post(std::function<void()> task);
  // The same without a limit, for what was let in before.
  void post_always(std::function<void()> task);

 private:
  void run();

  const size_t max_queued_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvant::serve::openai
