// Drives a KvCache in tests beside a model of it: sequences are lists of token ids, and every K and
// V value is a function of layer, head, position and token id, so that what any page must hold is
// known.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvant/base/memory.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/layout.h"

namespace kvant::cache::testing {

// One sequence of a step and the ids of its new tokens.
struct NewTokens {
  SequenceId id = 0;
  std::vector<uint32_t> tokens;
};

enum class StepEnd { kCommit, kAbort };

class CacheHarness {
 public:
  // `config.plan` must outlive the harness.
  static Result<std::unique_ptr<CacheHarness>> create(const CacheConfig& config);

  KvCache& cache() { return *cache_; }
  const CacheConfig& config() const { return config_; }
  HostMemory& memory() { return memory_; }
  const std::map<SequenceId, std::vector<uint32_t>>& sequences() const { return sequences_; }
  const std::vector<uint32_t>& tokens(SequenceId id) const { return sequences_.at(id); }

  Result<SequenceId> add();
  Result<SequenceId> fork(SequenceId id);
  void remove(SequenceId id);
  Result<int64_t> truncate(SequenceId id, int64_t length);

  // begin_step, then per layer append and a check of everything that a query of the step may read,
  // then commit or abort. Errors of begin_step are returned as they are; wrong content is
  // kInternal.
  Status step(std::span<const NewTokens> batch, StepEnd end = StepEnd::kCommit);
  // One sequence.
  Status extend(SequenceId id, std::span<const uint32_t> tokens);

  // All groups' objects of a page; a group that cannot export it (left the window) has an empty
  // one.
  Result<std::vector<std::vector<std::byte>>> export_page(SequenceId id, int64_t page) const;
  Status import_page(SequenceId id, const std::vector<std::vector<std::byte>>& objects,
                     std::span<const uint32_t> tokens);

  // Appends held pages, whose tokens are given.
  Status attach(SequenceId id, std::span<const HeldPage* const> pages,
                std::span<const uint32_t> tokens);
  // Tokens that came to a sequence in another way than through this harness.
  void note(SequenceId id, std::span<const uint32_t> tokens) {
    sequences_.at(id).insert(sequences_.at(id).end(), tokens.begin(), tokens.end());
  }
  // All groups' objects of a held page of these tokens; empty where it lacks the group's page.
  Result<std::vector<std::vector<std::byte>>> export_held(const HeldPage& held,
                                                          std::span<const uint32_t> tokens) const;

  // Payload of a page object of these tokens, computed without the cache.
  const std::vector<std::byte>& expected_page(int group, int64_t page,
                                              std::span<const uint32_t> tokens);
  // The decoded K or V values of a page as attention reads it, [page_tokens][head_dim].
  float value(int layer, SideRole role, int head, int64_t position, uint32_t token,
              int channel) const;
  // The values of rows of one side as they enter a BF16 page (through the codec with +strict).
  std::vector<float> expected_rows(int layer, SideRole role, int head, int64_t first_position,
                                   std::span<const uint32_t> tokens) const;

  // Lengths and integrity; an empty string if all is well.
  std::string check() const;

 private:
  CacheHarness() = default;
  formats::SideFormat side_format(int layer, SideRole role) const;
  formats::SideParams side_params(int layer, SideRole role, int head) const;
  bool stays_bf16(int group, int64_t page) const;
  Status append_and_check(std::span<const NewTokens> batch, int layer);
  Status check_sequence(const GroupView& view, int group, int group_layer,
                        const SequenceView& sequence, std::span<const uint32_t> tokens);
  Status check_bf16_page(const GroupView& view, int layer, int group_layer, int64_t page,
                         PageEntry entry, std::span<const uint32_t> tokens) const;
  Status check_stored_page(const GroupView& view, int group, int group_layer, int64_t page,
                           PageEntry entry, std::span<const uint32_t> tokens);

  HostMemory memory_;
  CacheConfig config_;
  std::unique_ptr<KvCache> cache_;
  std::map<SequenceId, std::vector<uint32_t>> sequences_;
  // Computed payloads by group, page and tokens.
  std::map<std::pair<std::pair<int, int64_t>, std::vector<uint32_t>>, std::vector<std::byte>>
      expected_;
};

// `count` token ids from a small generator; `seed` changes with each call's result.
std::vector<uint32_t> random_tokens(uint64_t& seed, int64_t count);
uint64_t next_random(uint64_t& seed);

// A plan with plausible scales, biases and factors for every layer.
formats::QuantPlan make_test_plan(std::span<const LayerGeometry> layers);

}  // namespace kvant::cache::testing
