#include "kvant/serve/tiers/disk_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kvant/serve/tiers/host_store.h"
#include "kvant/serve/tiers/testing/test_pages.h"
#include "kvant/serve/tiers/tier.h"

namespace kvant::serve {
namespace {

using testing::TemporaryFolder;
using testing::test_name;
using testing::test_object;

constexpr int64_t kLarge = int64_t{1} << 30;

std::unique_ptr<DiskStore> open_store(const std::string& folder, int64_t limit = kLarge) {
  auto store = DiskStore::open(folder, limit);
  EXPECT_TRUE(store.has_value()) << (store ? "" : store.error().message());
  return store ? std::move(*store) : nullptr;
}

bool holds(PageStore& store, uint32_t number, size_t payload_bytes = 700) {
  const auto object = store.get(test_name(number));
  return object.has_value() && **object == *test_object(number, payload_bytes);
}

std::vector<std::string> slab_files(const std::string& folder) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".slab") files.push_back(entry.path().string());
  }
  return files;
}

TEST(DiskStore, GivesBackWhatItWasGivenAlsoAfterARestart) {
  const TemporaryFolder folder;
  {
    const auto store = open_store(folder.path());
    for (uint32_t i = 0; i < 50; ++i)
      EXPECT_EQ(*store->put(test_name(i), test_object(i, 300 + 200 * i)), PageStore::Put::kStored);
    EXPECT_EQ(*store->put(test_name(3), test_object(3, 900)), PageStore::Put::kAlreadyThere);
    for (uint32_t i = 0; i < 50; ++i) EXPECT_TRUE(holds(*store, i, 300 + 200 * i)) << i;
    EXPECT_EQ(store->get(test_name(77)).error().code(), ErrorCode::kNotFound);
    store->remove(test_name(9));
    EXPECT_FALSE(store->contains(test_name(9)));
  }
  const auto store = open_store(folder.path());
  EXPECT_EQ(store->recovery().pages, 49);
  EXPECT_EQ(store->recovery().bad_slots, 0);
  for (uint32_t i = 0; i < 50; ++i) EXPECT_EQ(holds(*store, i, 300 + 200 * i), i != 9) << i;
  EXPECT_EQ(store->headers().size(), 49u);
  EXPECT_EQ(store->usage().bytes % kSlabAlignment, 0);
}

TEST(DiskStore, KeepsToItsLimitAndGivesUpTheLeastRecentlyUsed) {
  const TemporaryFolder folder;
  const auto store = open_store(folder.path(), 10 * kSlabAlignment);
  for (uint32_t i = 0; i < 10; ++i) ASSERT_TRUE(store->put(test_name(i), test_object(i)));
  EXPECT_TRUE(holds(*store, 0));  // used now
  ASSERT_TRUE(store->put(test_name(10), test_object(10)));
  // A page of two slots takes the place of two.
  ASSERT_TRUE(store->put(test_name(11), test_object(11, 6000)));
  EXPECT_LE(store->usage().bytes, 10 * kSlabAlignment);
  std::vector<PageName> evicted;
  for (const EvictedPage& page : store->take_evicted()) evicted.push_back(page.name);
  EXPECT_EQ(evicted, (std::vector<PageName>{test_name(1), test_name(2), test_name(3)}));
  EXPECT_TRUE(holds(*store, 0));
  EXPECT_TRUE(holds(*store, 11, 6000));
  EXPECT_EQ(store->put(test_name(12), test_object(12, 60000)).error().code(),
            ErrorCode::kResourceExhausted);
  // Blocks of evicted pages are given back to the file system.
  int64_t blocks = 0;
  for (const std::string& file : slab_files(folder.path())) {
    struct stat status;
    ASSERT_EQ(::stat(file.c_str(), &status), 0);
    blocks += status.st_blocks * 512;
  }
  EXPECT_LE(blocks, 14 * kSlabAlignment);
}

TEST(DiskStore, ALowerLimitHoldsAfterARestart) {
  const TemporaryFolder folder;
  {
    const auto store = open_store(folder.path());
    for (uint32_t i = 0; i < 20; ++i) ASSERT_TRUE(store->put(test_name(i), test_object(i)));
  }
  const auto store = open_store(folder.path(), 5 * kSlabAlignment);
  EXPECT_EQ(store->usage().pages, 5);
}

TEST(DiskStore, AFolderBelongsToOneStore) {
  const TemporaryFolder folder;
  const auto store = open_store(folder.path());
  const auto second = DiskStore::open(folder.path(), kLarge);
  ASSERT_FALSE(second.has_value());
  EXPECT_NE(second.error().message().find("another process"), std::string::npos);
  EXPECT_EQ(DiskStore::open("/proc/none", kLarge).error().code(), ErrorCode::kIoError);
}

TEST(DiskStore, EveryFlippedBitIsAMissOrHarmless) {
  uint64_t seed = 1;
  int misses = 0;
  const TemporaryFolder folder;
  {
    const auto store = open_store(folder.path());
    for (uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(store->put(test_name(i), test_object(i)));
  }
  const std::string file = slab_files(folder.path()).front();
  for (int round = 0; round < 300; ++round) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    // Superblock, headers, payloads, padding.
    const int64_t offset = static_cast<int64_t>((seed >> 33) % (5 * kSlabAlignment));
    const uint8_t bit = static_cast<uint8_t>(1u << ((seed >> 20) % 8));
    const int fd = ::open(file.c_str(), O_RDWR);
    uint8_t byte = 0;
    (void)!::pread(fd, &byte, 1, offset);  // behind the end: zero
    byte ^= bit;
    ASSERT_EQ(::pwrite(fd, &byte, 1, offset), 1);
    ::close(fd);
    {
      const auto store = open_store(folder.path());
      for (uint32_t i = 0; i < 4; ++i) {
        const auto object = store->get(test_name(i));
        if (!object) {
          ++misses;
          continue;
        }
        EXPECT_EQ(**object, *test_object(i)) << "a damaged page was given out";
      }
    }
    std::filesystem::remove(file);
    const auto store = open_store(folder.path());
    for (uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(store->put(test_name(i), test_object(i)));
  }
  EXPECT_GT(misses, 30);
}

TEST(DiskStore, AFileThatIsCutWhileInUseLosesPagesThatMayComeAgain) {
  const TemporaryFolder folder;
  Tier tier(open_store(folder.path()), {});
  for (uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(tier.put(test_name(i), test_object(i)));
  tier.wait_idle();
  for (const std::string& file : slab_files(folder.path()))
    std::filesystem::resize_file(file, kSlabAlignment);
  for (int round = 0; round < 2; ++round) {
    for (uint32_t i = 0; i < 4; ++i) tier.get(i, test_name(i));
    tier.wait_idle();
    int found = 0;
    for (const Tier::Completion& done : tier.poll())
      found += done.kind == Tier::Kind::kGet && done.object != nullptr ? 1 : 0;
    EXPECT_EQ(found, 4 * round) << "gone the first time, back the second";
    for (uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(tier.put(test_name(i), test_object(i)));
    tier.wait_idle();
  }
  EXPECT_EQ(tier.stats().failures, 4);
  EXPECT_EQ(tier.stats().puts, 8);
}

TEST(DiskStore, WhatIsFoundDamagedIsAFailureOfTheTier) {
  const TemporaryFolder folder;
  {
    const auto store = open_store(folder.path());
    for (uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(store->put(test_name(i), test_object(i)));
  }
  std::fstream file(slab_files(folder.path()).at(0),
                    std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(kSlabAlignment);
  file << "not a header";
  file.close();
  const Tier tier(open_store(folder.path()), {});
  EXPECT_EQ(tier.stats().failures, 1);
  EXPECT_EQ(tier.stats().usage.pages, 3);
}

TEST(DiskStore, AFullDiskIsARefusalAndNothingElse) {
  const TemporaryFolder folder;
  // A child, as the limit is the process's.
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{8 * kSlabAlignment, 8 * kSlabAlignment};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    auto store = DiskStore::open(folder.path(), kLarge);
    if (!store) ::_exit(1);
    int stored = 0;
    for (uint32_t i = 0; i < 30; ++i) {
      const auto put = (*store)->put(test_name(i), test_object(i, 3000));
      if (put) ++stored;
      if (!put && put.error().code() != ErrorCode::kResourceExhausted) ::_exit(2);
      if (put && !holds(**store, i, 3000)) ::_exit(3);
    }
    if (stored < 7) ::_exit(4);
    // What it says to hold it holds.
    for (uint32_t i = 0; i < 30; ++i) {
      if ((*store)->contains(test_name(i)) && !holds(**store, i, 3000)) ::_exit(5);
    }
    ::_exit((*store)->usage().pages > 0 ? 0 : 6);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  const auto store = open_store(folder.path());
  EXPECT_GT(store->recovery().pages, 0);
  EXPECT_EQ(store->recovery().bad_slots, 0);
}

// Writes, replaces and removes pages until it is killed; says on the pipe what is done.
[[noreturn]] void write_until_killed(const std::string& folder, int pipe, uint32_t first) {
  auto store = DiskStore::open(folder, 24 * kSlabAlignment);
  if (!store) ::_exit(1);
  for (uint32_t i = first;; ++i) {
    if (!(*store)->put(test_name(i), test_object(i, 500 + i % 3 * 4000))) ::_exit(2);
    if (::write(pipe, &i, sizeof(i)) != sizeof(i)) ::_exit(3);
  }
}

TEST(DiskStore, AKillAtAnyPointLosesNothingThatWasDone) {
  const TemporaryFolder folder;
  uint32_t next = 0;
  int64_t recovered = 0, bad_slots = 0;
  for (int round = 0; round < 100; ++round) {
    int pipe[2];
    ASSERT_EQ(::pipe(pipe), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(pipe[0]);
      write_until_killed(folder.path(), pipe[1], next);
    }
    ::close(pipe[1]);
    // After a few pages and some microseconds more.
    std::vector<uint32_t> done;
    uint32_t number = 0;
    const size_t wanted = 3 + static_cast<size_t>(round) % 17;
    while (done.size() < wanted && ::read(pipe[0], &number, sizeof(number)) == sizeof(number))
      done.push_back(number);
    ::usleep(static_cast<useconds_t>(round * 7 % 300));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    while (::read(pipe[0], &number, sizeof(number)) == sizeof(number)) done.push_back(number);
    ::close(pipe[0]);
    ASSERT_GE(done.size(), wanted) << "round " << round;

    auto store = DiskStore::open(folder.path(), 24 * kSlabAlignment);
    ASSERT_TRUE(store.has_value()) << store.error().message();
    recovered += (*store)->recovery().pages;
    bad_slots += (*store)->recovery().bad_slots;
    const uint32_t last = done.back();
    // The last pages of the round fit the limit together. Of earlier ones the order of use is not
    // known any more.
    for (uint32_t i = std::max(next, last >= 6 ? last - 6 : 0); i <= last; ++i)
      EXPECT_TRUE(holds(**store, i, 500 + i % 3 * 4000)) << "page " << i << " of round " << round;
    for (uint32_t i = 0; i <= last + 1; ++i) {
      if (!(*store)->contains(test_name(i))) continue;
      EXPECT_TRUE(holds(**store, i, 500 + i % 3 * 4000)) << "damaged page " << i;
    }
    next = last + 2;
    if (HasFailure()) return;
  }
  EXPECT_GT(recovered, 300);
  EXPECT_EQ(bad_slots, 0) << "a kill leaves slots free or whole";
}

TEST(SlabFile, WhatIsNoSlabFileIsRefusedAndLeftAlone) {
  const TemporaryFolder folder;
  const std::string path = folder.path() + "/pages-8192.slab";
  { std::ofstream(path) << std::string(5000, 'x'); }
  EXPECT_EQ(SlabFile::open(path, 8192).error().code(), ErrorCode::kCorruptData);
  const auto store = open_store(folder.path());
  EXPECT_EQ(store->recovery().bad_files, 1);
  EXPECT_FALSE(store->put(test_name(1), test_object(1, 6000)).has_value());
  EXPECT_TRUE(store->put(test_name(2), test_object(2)).has_value()) << "other sizes go on";
  EXPECT_EQ(std::filesystem::file_size(path), 5000u);
}

TEST(HostStore, KeepsToItsLimitAndHandsOnWhatItGivesUp) {
  const int64_t one = static_cast<int64_t>(test_object(0)->size());
  HostStore store(3 * one);
  for (uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(store.put(test_name(i), test_object(i)));
  EXPECT_TRUE(holds(store, 0));
  ASSERT_TRUE(store.put(test_name(3), test_object(3)));
  const auto evicted = store.take_evicted();
  ASSERT_EQ(evicted.size(), 1u);
  EXPECT_EQ(evicted[0].name, test_name(1));
  EXPECT_EQ(*evicted[0].object, *test_object(1));
  EXPECT_EQ(store.usage().bytes, 3 * one);
  EXPECT_FALSE(store.put(test_name(4), test_object(4, 5000)).has_value());
  store.remove(test_name(0));
  EXPECT_EQ(store.usage().pages, 2);
}

}  // namespace
}  // namespace kvant::serve
