// A program of somebody else: links an installed kvant and uses it.
#include <cstdio>
#include <numeric>
#include <vector>

#include "kvant/base/cpu_level.h"
#include "kvant/base/small_floats.h"
#include "kvant/base/thread_pool.h"

int main() {
  kvant::ThreadPool pool(2);
  std::vector<int> squares(100);
  pool.parallel_for(100, [&](int64_t task, int) {
    squares[static_cast<size_t>(task)] = static_cast<int>(task * task);
  });
  if (std::accumulate(squares.begin(), squares.end(), 0) != 328350) return 1;
  if (kvant::from_e4m3(kvant::to_e4m3(448.0f)) != 448.0f) return 2;
  const kvant::Result<kvant::CpuLevel> level = kvant::choose_cpu_level();
  if (!level) return 3;
  std::printf("kvant works, cpu level %s\n", std::string(kvant::cpu_level_name(*level)).c_str());
  return 0;
}
