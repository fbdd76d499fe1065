// Features of the cache. Every step of the harness checks, in every layer, that each page which a
// query may read holds exactly what the scalar codec makes of the tokens, in the page kind that the
// rules of closed pages ask for; the functions below only arrange the steps.
#include <gtest/gtest.h>

#include <cstdio>

#include "kvant/cache/page_object.h"
#include "tests/conformance/cache_fixture.h"
#include "tests/conformance/conformance.h"

namespace kvant::conformance {

using cache::Layout;
using cache::SequenceId;
using cache::testing::NewTokens;
using cache::testing::random_tokens;
using cache::testing::StepEnd;

namespace {

void expect_same_pages(const Fixture& a, SequenceId id_a, const Fixture& b, SequenceId id_b,
                       int64_t num_pages) {
  for (int64_t page = 0; page < num_pages; ++page) {
    const auto pages_a = a.harness->export_page(id_a, page);
    const auto pages_b = b.harness->export_page(id_b, page);
    CHECK_OK(pages_a);
    CHECK_OK(pages_b);
    EXPECT_TRUE(*pages_a == *pages_b) << "page " << page << " has other bytes";
  }
}

void expect_empty_after_removal(Fixture& f) {
  while (!f.harness->sequences().empty()) f.harness->remove(f.harness->sequences().begin()->first);
  EXPECT_EQ(f.harness->check(), "");
  EXPECT_EQ(f.harness->cache().bytes().stored_pages_now, 0);
  EXPECT_EQ(f.harness->cache().bytes().bf16_pages_now, 0);
}

// Pages close in decode, one token at a time, and in one prefill, with equal bytes.
void close_chunked(const std::string& spec) {
  Fixture single(spec), chunked(spec), whole(spec);
  if (!single.create() || !chunked.create() || !whole.create()) return;
  uint64_t seed = 1;
  const std::vector<uint32_t> tokens = random_tokens(seed, 66);
  const SequenceId a = *single.harness->add(), b = *chunked.harness->add(),
                   c = *whole.harness->add();
  for (const uint32_t token : tokens) CHECK_OK(single.harness->extend(a, std::span(&token, 1)));
  size_t done = 0;
  for (const size_t chunk : {3u, 13u, 20u, 29u, 1u}) {
    CHECK_OK(chunked.harness->extend(b, std::span(tokens).subspan(done, chunk)));
    done += chunk;
  }
  CHECK_OK(whole.harness->extend(c, tokens));
  expect_same_pages(single, a, chunked, b, single.closed_pages(66));
  expect_same_pages(single, a, whole, c, single.closed_pages(66));
  const cache::CacheBytes bytes = single.harness->cache().bytes();
  for (const Fixture* other : {&chunked, &whole}) {
    const cache::CacheBytes theirs = other->harness->cache().bytes();
    EXPECT_EQ(bytes.stored_pages_now, theirs.stored_pages_now);
    EXPECT_EQ(bytes.bf16_pages_now, theirs.bf16_pages_now);
  }
  EXPECT_EQ(single.harness->check(), "");
  expect_empty_after_removal(single);
}

// A fork shares pages until either sequence writes; both then read their own tokens.
void copy_on_write(const std::string& spec) {
  Fixture f(spec);
  if (!f.create()) return;
  uint64_t seed = 2;
  const SequenceId a = *f.harness->add();
  CHECK_OK(f.harness->extend(a, random_tokens(seed, 39)));
  const cache::CacheBytes before = f.harness->cache().bytes();
  const auto b = f.harness->fork(a);
  CHECK_OK(b);
  EXPECT_EQ(f.harness->cache().bytes().stored_pages_now, before.stored_pages_now);
  EXPECT_EQ(f.harness->cache().bytes().bf16_pages_now, before.bf16_pages_now);
  const NewTokens batch[] = {{a, random_tokens(seed, 2)}, {*b, random_tokens(seed, 30)}};
  CHECK_OK(f.harness->step(batch));
  CHECK_OK(f.harness->extend(a, random_tokens(seed, 12)));
  f.harness->remove(a);
  CHECK_OK(f.harness->extend(*b, random_tokens(seed, 12)));
  EXPECT_EQ(f.harness->check(), "");
  expect_empty_after_removal(f);
}

// What truncation dropped and was recomputed is what it would be had it never happened.
void truncate_and_recompute(const std::string& spec) {
  Fixture f(spec), fresh(spec);
  if (!f.create() || !fresh.create()) return;
  uint64_t seed = 3;
  const SequenceId a = *f.harness->add(), b = *fresh.harness->add();
  std::vector<uint32_t> tokens = random_tokens(seed, 70);
  CHECK_OK(f.harness->extend(a, tokens));
  for (const int64_t target : {68, 43, 20}) {  // in the open page, in a closed one, in an early one
    const auto remain = f.harness->truncate(a, target);
    CHECK_OK(remain);
    EXPECT_LE(*remain, target);
    EXPECT_EQ(f.harness->check(), "");
    tokens.resize(target);
    const std::vector<uint32_t> more = random_tokens(seed, 70 - target);
    tokens.insert(tokens.end(), more.begin(), more.end());
    CHECK_OK(f.harness->extend(a, std::span(tokens).subspan(*remain)));
  }
  CHECK_OK(fresh.harness->extend(b, tokens));
  expect_same_pages(f, a, fresh, b, f.closed_pages(70));
  expect_empty_after_removal(f);
}

// Sequences of different lengths in one step give what each gives alone.
void ragged_batch(const std::string& spec) {
  Fixture f(spec);
  if (!f.create()) return;
  uint64_t seed = 4;
  std::vector<std::vector<uint32_t>> tokens;
  std::vector<SequenceId> ids;
  for (const int length : {1, 17, 40}) {
    tokens.push_back(random_tokens(seed, length + 9));
    ids.push_back(*f.harness->add());
  }
  std::vector<NewTokens> first, second;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto split = tokens[i].end() - 9;
    first.push_back({ids[i], {tokens[i].begin(), split}});
    second.insert(second.begin(), {ids[i], {split, tokens[i].end()}});  // another order of rows
  }
  CHECK_OK(f.harness->step(first));
  CHECK_OK(f.harness->step(second));
  EXPECT_EQ(f.harness->check(), "");
  for (size_t i = 0; i < ids.size(); ++i) {
    Fixture alone(spec);
    if (!alone.create()) return;
    const SequenceId id = *alone.harness->add();
    CHECK_OK(alone.harness->extend(id, tokens[i]));
    expect_same_pages(f, ids[i], alone, id, f.closed_pages(static_cast<int64_t>(tokens[i].size())));
  }
  expect_empty_after_removal(f);
}

// Long sequences hold what the window needs and no more.
void window_groups(const std::string& spec) {
  Fixture f(spec);
  if (!f.create()) return;
  uint64_t seed = 5;
  const SequenceId id = *f.harness->add();
  CHECK_OK(f.harness->extend(id, random_tokens(seed, 90)));
  CHECK_OK(f.harness->extend(id, random_tokens(seed, 1)));
  CHECK_OK(f.harness->extend(id, random_tokens(seed, 55)));
  const cache::CacheBytes bytes = f.harness->cache().bytes();
  // 146 tokens; the window of 20 needs two full pages before the open one of 2 tokens.
  EXPECT_EQ(bytes.values_now, 146 * 2 * 2 * 32 + 34 * 2 * 48);
  EXPECT_EQ(f.harness->check(), "");
  expect_empty_after_removal(f);
}

// An aborted step leaves no trace, a repeated one gives the same bytes.
void abort_step(const std::string& spec) {
  Fixture f(spec), fresh(spec);
  if (!f.create() || !fresh.create()) return;
  uint64_t seed = 6;
  const SequenceId a = *f.harness->add(), b = *fresh.harness->add();
  const std::vector<uint32_t> tokens = random_tokens(seed, 60);
  CHECK_OK(f.harness->extend(a, std::span(tokens).first(21)));
  const cache::CacheBytes before = f.harness->cache().bytes();
  const NewTokens other{a, random_tokens(seed, 39)};
  CHECK_OK(f.harness->step(std::span(&other, 1), StepEnd::kAbort));
  EXPECT_EQ(f.harness->cache().bytes().stored_pages_now, before.stored_pages_now);
  EXPECT_EQ(f.harness->cache().bytes().bf16_pages_now, before.bf16_pages_now);
  EXPECT_EQ(f.harness->check(), "");
  CHECK_OK(f.harness->extend(a, std::span(tokens).subspan(21)));
  CHECK_OK(fresh.harness->extend(b, tokens));
  expect_same_pages(f, a, fresh, b, f.closed_pages(60));
}

// Pages go, the first through a file, into another cache. With +recentN they are refused by design:
// the last pages are BF16 and never exchanged (codecs.md section 3).
void save_and_load(const std::string& spec) {
  Fixture f(spec), target(spec);
  if (!f.create() || !target.create()) return;
  uint64_t seed = 7;
  const std::vector<uint32_t> tokens = random_tokens(seed, 64);
  const SequenceId a = *f.harness->add(), b = *target.harness->add();
  CHECK_OK(f.harness->extend(a, tokens));
  const std::string path =
      ::testing::TempDir() + "kvant_conformance_" + formats::file_name_form(spec) + ".page";
  for (int64_t page = 0; page < f.closed_pages(64); ++page) {
    auto objects = f.harness->export_page(a, page);
    CHECK_OK(objects);
    if (page == 0) {  // one file for each cell: waiting for the disk is all it costs
      CHECK_OK(cache::save_page_file(path, objects->front()));
      auto loaded = cache::load_page_file(path);
      std::remove(path.c_str());
      CHECK_OK(loaded);
      EXPECT_TRUE(*loaded == objects->front());
      objects->front() = std::move(*loaded);
    }
    const Status imported =
        target.harness->import_page(b, *objects, std::span(tokens).subspan(page * kPage, kPage));
    if (f.recent() && !target.config.format.is_bf16()) {
      ASSERT_FALSE(imported.has_value());
      EXPECT_EQ(imported.error().code(), ErrorCode::kUnsupported);
      return;
    }
    CHECK_OK(imported);
  }
  if (target.harness->cache().length(b) == 64) {
    // The harness compares what the new tokens read of the imported pages.
    CHECK_OK(target.harness->extend(b, random_tokens(seed, 20)));
    EXPECT_EQ(target.harness->check(), "");
  }
}

// Caches of every layout export the same planar objects.
void layouts(const std::string& spec) {
  Fixture planar(spec), cpu(spec), sm90(spec);
  planar.config.layout = Layout::kPlanar;
  cpu.config.layout = Layout::kCpu;
  sm90.config.layout = Layout::kSm90;
  uint64_t seed = 8;
  const std::vector<uint32_t> tokens = random_tokens(seed, 40);
  for (Fixture* f : {&planar, &cpu, &sm90}) {
    // head_dim 80 has a short last block.
    f->config.layers = {{.num_kv_heads = 1, .head_dim = 80}, {.num_kv_heads = 1, .head_dim = 64}};
    if (!f->create()) return;
    CHECK_OK(f->harness->extend(*f->harness->add(), tokens));
  }
  expect_same_pages(planar, 0, cpu, 0, planar.closed_pages(40));
  expect_same_pages(planar, 0, sm90, 0, planar.closed_pages(40));
}

// Lengths around page boundaries, each in one step and again token by token from there.
void odd_lengths(const std::string& spec) {
  for (const int length : {1, kPage - 1, kPage, kPage + 1, 2 * kPage, 3 * kPage - 1}) {
    Fixture f(spec);
    if (!f.create()) return;
    uint64_t seed = 9;
    const SequenceId id = *f.harness->add();
    CHECK_OK(f.harness->extend(id, random_tokens(seed, length)));
    CHECK_OK(f.harness->extend(id, random_tokens(seed, 1)));
    CHECK_OK(f.harness->extend(id, random_tokens(seed, 1)));
    EXPECT_EQ(f.harness->check(), "");
  }
}

void page_sizes(const std::string& spec) {
  for (const int page_tokens : {32, 64, 128}) {
    Fixture f(spec);
    f.config.page_tokens = page_tokens;
    f.config.max_tokens = 400;
    f.config.max_step_tokens = 400;
    f.config.max_sequences = 1;
    f.config.layers = {{.num_kv_heads = 1, .head_dim = 16},
                       {.num_kv_heads = 1, .head_dim = 32, .window = 50}};
    if (!f.create()) return;
    uint64_t seed = 10;
    const SequenceId id = *f.harness->add();
    CHECK_OK(f.harness->extend(id, random_tokens(seed, page_tokens + 1)));
    CHECK_OK(f.harness->extend(id, random_tokens(seed, page_tokens)));
    EXPECT_EQ(f.harness->check(), "");
  }
}

// Bytes reserved and used are what the plan says.
void accounting(const std::string& spec) {
  Fixture f(spec);
  if (!f.create()) return;
  const auto planned = cache::plan_cache_bytes(f.config);
  CHECK_OK(planned);
  EXPECT_EQ(f.harness->memory().stats().total_peak, planned->total_reserved());
  uint64_t seed = 11;
  for (int i = 0; i < 3; ++i) {
    const SequenceId id = *f.harness->add();
    CHECK_OK(f.harness->extend(id, random_tokens(seed, 37)));
    const cache::CacheBytes bytes = f.harness->cache().bytes();
    EXPECT_LE(bytes.stored_pages_now, bytes.stored_pages_reserved);
    EXPECT_LE(bytes.bf16_pages_now, bytes.bf16_pages_reserved);
    EXPECT_EQ(bytes.tokens_now, (i + 1) * 37);
    EXPECT_GT(bytes.bits_per_value(), 2.0);
  }
  EXPECT_EQ(f.harness->memory().stats().total_peak, planned->total_reserved());
}

constexpr Feature kFeatures[] = {
    {"close_chunked", close_chunked},
    {"copy_on_write", copy_on_write},
    {"truncate_and_recompute", truncate_and_recompute},
    {"ragged_batch", ragged_batch},
    {"window_groups", window_groups},
    {"abort_step", abort_step},
    {"save_and_load", save_and_load},
    {"layouts", layouts},
    {"odd_lengths", odd_lengths},
    {"page_sizes", page_sizes},
    {"accounting", accounting},
};

}  // namespace

std::span<const Feature> cache_features() {
  return kFeatures;
}

}  // namespace kvant::conformance
