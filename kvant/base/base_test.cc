#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvant/base/huge_page_arena.h"
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

TEST(HugePageArena, BuffersAreZeroAndApart) {
  HugePageArena arena;
  constexpr int64_t kSizes[] = {1, 4096, 5 << 20, 300 << 20, 12345};  // one is more than a mapping
  std::vector<std::byte*> buffers;
  for (const int64_t size : kSizes) {
    auto* const buffer = static_cast<std::byte*>(arena.allocate(size));
    ASSERT_NE(buffer, nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer) % 4096, 0u);
    for (const int64_t at : {int64_t{0}, size - 1}) EXPECT_EQ(buffer[at], std::byte{0});
    for (const int64_t at : {int64_t{0}, size - 1}) buffer[at] = std::byte(buffers.size() + 1);
    buffers.push_back(buffer);
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    EXPECT_EQ(buffers[i][kSizes[i] - 1], std::byte(i + 1)) << i;
  }
  int elsewhere = 0;
  EXPECT_FALSE(arena.deallocate(&elsewhere, sizeof(elsewhere)));
  // What is left of a mapping keeps its bytes when a neighbour goes.
  EXPECT_TRUE(arena.deallocate(buffers[1], kSizes[1]));
  EXPECT_EQ(buffers[0][0], std::byte{1});
  EXPECT_EQ(buffers[2][0], std::byte{3});
  for (const size_t i : {0u, 2u, 3u, 4u}) EXPECT_TRUE(arena.deallocate(buffers[i], kSizes[i]));
  auto* const again = static_cast<std::byte*>(arena.allocate(4096));
  ASSERT_NE(again, nullptr);
  EXPECT_EQ(*again, std::byte{0});
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

TEST(HostMemory, PagesStartOnHugePagesAndOthersStayApart) {
  HostMemory memory;
  constexpr int64_t kHugePage = 2 << 20;
  for (const int64_t bytes : {kHugePage - 128, kHugePage, 3 * kHugePage + 128}) {
    auto pages = Buffer::create(memory, bytes, MemoryUse::kPages);
    auto more = Buffer::create(memory, bytes, MemoryUse::kPages);
    ASSERT_TRUE(pages && more);
    if (bytes >= kHugePage) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(pages->data()) % kHugePage, 0u);
    }
    for (const int64_t at : {int64_t{0}, bytes - 1}) EXPECT_EQ(pages->data()[at], std::byte{0});
    std::fill_n(pages->data(), bytes, std::byte{1});
    std::fill_n(more->data(), bytes, std::byte{2});
    pages = Buffer();  // gives back its own bytes only
    EXPECT_EQ(std::count(more->data(), more->data() + bytes, std::byte{2}), bytes);
  }
  EXPECT_EQ(memory.stats().total_now, 0);
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
