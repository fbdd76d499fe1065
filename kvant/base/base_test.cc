#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvant/base/mapped_file.h"
#include "kvant/base/memory.h"
#include "kvant/base/result.h"
#include "kvant/base/thread_pool.h"

namespace kvant {
namespace {

Result<int> half(int x) {
  if (x % 2 != 0) return Error(ErrorCode::kInvalidArgument, "odd");
  return x / 2;
}

Result<int> quarter(int x) {
  KVANT_ASSIGN(const int h, half(x));
  KVANT_ASSIGN(const int q, half(h));
  return q;
}

TEST(Result, PassesValuesAndErrorsOn) {
  EXPECT_EQ(quarter(8).value(), 2);
  const Result<int> failed = quarter(6);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().message(), "odd");
  EXPECT_EQ(failed.error().with_context("file").message(), "file: odd");
  EXPECT_THROW((void)failed.value(), std::logic_error);
}

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> counts(static_cast<size_t>(round));
      pool.parallel_for(round, [&](int64_t task, int worker) {
        EXPECT_LT(worker, threads);
        counts[static_cast<size_t>(task)].fetch_add(1);
      });
      for (const auto& count : counts) ASSERT_EQ(count.load(), 1);
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  EXPECT_THROW(pool.parallel_for(100,
                                 [](int64_t task, int) {
                                   if (task == 17) throw std::runtime_error("task 17");
                                 }),
               std::runtime_error);
  std::atomic<int> sum{0};
  pool.parallel_for(10, [&](int64_t task, int) { sum += static_cast<int>(task); });
  EXPECT_EQ(sum.load(), 45);
}

TEST(HostMemory, CountsAndLimits) {
  HostMemory memory(1 << 20);
  {
    auto a = Buffer::create(memory, 600'000, MemoryUse::kPages);
    ASSERT_TRUE(a);
    const auto b = Buffer::create(memory, 600'000, MemoryUse::kWeights);
    ASSERT_FALSE(b);
    EXPECT_EQ(b.error().code(), ErrorCode::kResourceExhausted);
    EXPECT_EQ(memory.stats().total_now, 600'000);
  }
  EXPECT_EQ(memory.stats().total_now, 0);
  EXPECT_EQ(memory.stats().total_peak, 600'000);
}

TEST(MappedFile, DroppedPagesReadTheSame) {
  const std::string path = ::testing::TempDir() + "kvant_drop_pages";
  {
    std::ofstream out(path, std::ios::binary);
    for (int i = 0; i < 20000; ++i) out.put(static_cast<char>(i % 251));
  }
  const auto file = MappedFile::open(path);
  ASSERT_TRUE(file);
  const std::span<const std::byte> bytes = file->bytes();
  const auto check = [&] {
    for (size_t i = 0; i < bytes.size(); ++i) ASSERT_EQ(bytes[i], std::byte(i % 251)) << i;
  };
  check();
  file->drop_pages(bytes.subspan(100, 15000));
  check();
  file->drop_pages(bytes);
  file->drop_pages(bytes.subspan(5, 10));
  file->drop_pages({});
  check();
  std::remove(path.c_str());
}

TEST(MappedFile, NamesTheMissingPath) {
  const auto file = MappedFile::open("/nonexistent/model.gguf");
  ASSERT_FALSE(file);
  EXPECT_EQ(file.error().code(), ErrorCode::kNotFound);
  EXPECT_NE(file.error().message().find("/nonexistent/model.gguf"), std::string::npos);
}

}  // namespace
}  // namespace kvant
