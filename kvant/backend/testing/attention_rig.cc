#include "kvant/backend/testing/attention_rig.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvant/attention/reference.h"
#include "kvant/backend/cpu/append.h"
#include "kvant/backend/cpu/attention.h"
#include "kvant/base/check.h"
#include "kvant/cache/scalar_append.h"

namespace kvant::backend::testing {
namespace {

enum RowKind { kQuery, kKey, kValue };

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// About normal; keys have channels with an offset and channels that are larger, as in real models.
float value_at(int kind, int sequence, int layer, int head, int64_t position, int channel) {
  uint64_t h = mix(static_cast<uint64_t>(kind * 1000003 + sequence * 1009 + layer * 31 + head));
  h = mix(h ^ static_cast<uint64_t>(position * 512 + channel));
  float x = -2.0f;
  for (int i = 0; i < 4; ++i) x += static_cast<float>((h >> (16 * i)) & 0xffff) / 65536.0f;
  x *= 1.7f;
  if (kind != kKey) return x;
  const uint64_t c = mix(static_cast<uint64_t>(layer * 977 + head * 131 + channel));
  if (c % 11 == 0) x += 4.0f;
  if (c % 13 == 0) x *= 5.0f;
  return x;
}

formats::QuantPlan make_plan(const RigOptions& options) {
  formats::QuantPlan plan;
  plan.layers.resize(static_cast<size_t>(options.num_layers));
  const int n = options.num_kv_heads * options.head_dim;
  for (int l = 0; l < options.num_layers; ++l) {
    for (formats::SidePlan* side : {&plan.layers[l].k, &plan.layers[l].v}) {
      const float g = side == &plan.layers[l].k ? 0.03f : 0.011f;
      for (int h = 0; h < options.num_kv_heads; ++h) {
        side->global_scale.push_back(g * static_cast<float>(h + 1));
      }
      for (int i = 0; i < n; ++i) {
        side->bias.push_back(0.3f * value_at(7, 0, l, 0, i, 0));
        side->smooth.push_back(std::exp2(0.5f * value_at(8, 0, l, 0, i, 0)));
      }
    }
  }
  return plan;
}

}  // namespace

Result<void*> PoisonedMemory::allocate(int64_t bytes, MemoryUse use) {
  KVANT_ASSIGN(void* data, memory_.allocate(bytes, use));
  if (poison_ && use == MemoryUse::kPages) std::memset(data, 0xff, static_cast<size_t>(bytes));
  return data;
}

void PoisonedMemory::deallocate(void* pointer, int64_t bytes, MemoryUse use) {
  memory_.deallocate(pointer, bytes, use);
}

void PoisonedMemory::copy(void* target, const void* source, int64_t bytes) {
  memory_.copy(target, source, bytes);
}

AttentionRig::AttentionRig(const RigOptions& options)
    : options_(options),
      memory_(options.poison),
      plan_(make_plan(options)),
      pool_(options.num_threads) {
  options_.params.num_query_heads = options.num_kv_heads * options.group;
  if (options_.params.scale == 1.0f) {
    options_.params.scale = 1.0f / std::sqrt(static_cast<float>(options.head_dim));
  }
  auto format = formats::parse_cache_format(options.kv);
  KVANT_CHECK(format.has_value(), format ? "" : format.error().message().c_str());
  cache::CacheConfig config;
  for (int l = 0; l < options.num_layers; ++l) {
    const bool odd = l % 2 == 1 && options.odd_window >= 0;
    config.layers.push_back(
        {options.num_kv_heads, options.head_dim, odd ? options.odd_window : options.window});
  }
  config.format = *format;
  config.plan = &plan_;
  config.page_tokens = options.page_tokens;
  config.max_tokens = options.max_tokens;
  config.max_sequences = options.max_sequences;
  config.max_step_tokens = options.max_step_tokens;
  auto cache = cache::KvCache::create(config, memory_);
  KVANT_CHECK(cache.has_value(), cache ? "" : cache.error().message().c_str());
  cache_ = std::move(cache).value();
  for (int s = 0; s < options.num_sequences; ++s) {
    auto id = cache_->add_sequence();
    KVANT_CHECK(id.has_value(), "the cache has room for its sequences");
    ids_.push_back(*id);
    content_.push_back(s);
  }
  length_.assign(ids_.size(), 0);
  outputs_.resize(ids_.size() * static_cast<size_t>(options.num_layers));

  WorkspaceNeeds needs;
  needs.max_rows = options.max_step_tokens;
  needs.max_context = options.max_tokens;
  needs.num_query_heads = options_.params.num_query_heads;
  needs.num_kv_heads = options.num_kv_heads;
  needs.head_dim = options.head_dim;
  needs.page_tokens = options.page_tokens;
  needs.max_sequences = options.max_sequences;
  const int64_t bytes = cpu::attention_workspace_bytes(needs, options.num_threads);
  workspace_buffer_ = Buffer::create(memory_, bytes, MemoryUse::kWorkspace).value();
  std::memset(workspace_buffer_.data(), 0xff, static_cast<size_t>(bytes));
  workspace_.data = workspace_buffer_.data();
  workspace_.bytes = bytes;
}

AttentionRig::~AttentionRig() = default;

void AttentionRig::fill_rows(int layer, std::span<const Chunk> batch, int kind, int heads,
                             std::vector<float>& rows) const {
  rows.clear();
  for (const Chunk& chunk : batch) {
    for (int t = 0; t < chunk.num_tokens; ++t) {
      for (int h = 0; h < heads; ++h) {
        for (int c = 0; c < options_.head_dim; ++c) {
          rows.push_back(
              value_at(kind, content_[chunk.sequence], layer, h, length_[chunk.sequence] + t, c));
        }
      }
    }
  }
}

void AttentionRig::run_layer(int layer, std::span<const Chunk> batch) {
  const cache::KvCache::LayerPlace place = cache_->place(layer);
  cache::GroupView view = cache_->view(place.group);
  if (options_.mask_window > 0) view.window = options_.mask_window;
  std::vector<float> q, k, v;
  fill_rows(layer, batch, kQuery, options_.params.num_query_heads, q);
  fill_rows(layer, batch, kKey, options_.num_kv_heads, k);
  fill_rows(layer, batch, kValue, options_.num_kv_heads, v);
  const auto stats = options_.scalar_append
                         ? cache::scalar_append(view, place.index, k.data(), v.data())
                         : cpu::append({&view, place.index, k.data(), v.data()}, pool_,
                                       options_.level, workspace_);
  ASSERT_TRUE(stats.has_value()) << stats.error().message();
  EXPECT_EQ(stats->non_finite, 0);

  std::vector<float> out(q.size(), std::nanf(""));
  AttentionArgs args;
  args.view = &view;
  args.group_layer = place.index;
  args.params = options_.params;
  args.q = q.data();
  args.out = out.data();
  const Status status = cpu::attention(args, pool_, options_.level, workspace_);
  ASSERT_TRUE(status.has_value()) << status.error().message();
  if (options_.compare_with_reference) {
    std::vector<double> exact(q.size());
    attention::ReferenceArgs reference;
    reference.view = &view;
    reference.group_layer = place.index;
    reference.params = options_.params;
    reference.q = q.data();
    reference.out = exact.data();
    const Status ok = attention::reference_attention(reference);
    ASSERT_TRUE(ok.has_value()) << ok.error().message();
    const double error = attention::relative_l2(out, exact);
    worst_error_ = std::isnan(error) ? error : std::max(worst_error_, error);
    ASSERT_FALSE(std::isnan(error)) << "a value of the output is not finite";
  }
  size_t at = 0;
  for (const Chunk& chunk : batch) {
    const size_t count = static_cast<size_t>(chunk.num_tokens) *
                         static_cast<size_t>(options_.params.num_query_heads * options_.head_dim);
    auto& outputs = outputs_[chunk.sequence * options_.num_layers + layer];
    outputs.insert(outputs.end(), out.begin() + at, out.begin() + at + count);
    at += count;
  }
}

void AttentionRig::step(std::span<const Chunk> batch) {
  std::vector<cache::StepSequence> sequences;
  for (const Chunk& chunk : batch) sequences.push_back({ids_[chunk.sequence], chunk.num_tokens});
  const Status begun = cache_->begin_step(sequences);
  ASSERT_TRUE(begun.has_value()) << begun.error().message();
  for (int layer = 0; layer < options_.num_layers; ++layer) {
    run_layer(layer, batch);
    if (::testing::Test::HasFatalFailure()) return;
  }
  cache_->commit_step();
  for (const Chunk& chunk : batch) length_[chunk.sequence] += chunk.num_tokens;
}

void AttentionRig::extend(int sequence, int64_t length, int chunk) {
  while (length_[sequence] < length) {
    const auto n = static_cast<int>(std::min<int64_t>(chunk, length - length_[sequence]));
    step({{sequence, n}});
    if (::testing::Test::HasFatalFailure()) return;
  }
}

void AttentionRig::truncate(int sequence, int64_t length) {
  const auto kept = cache_->truncate(ids_[sequence], length);
  ASSERT_TRUE(kept.has_value()) << kept.error().message();
  length_[sequence] = *kept;
  const size_t row = static_cast<size_t>(options_.params.num_query_heads * options_.head_dim);
  for (int layer = 0; layer < options_.num_layers; ++layer) {
    outputs_[sequence * options_.num_layers + layer].resize(static_cast<size_t>(*kept) * row);
  }
}

int AttentionRig::fork(int sequence) {
  const auto id = cache_->fork(ids_[sequence]);
  KVANT_CHECK(id.has_value(), "the cache has room for a fork");
  ids_.push_back(*id);
  length_.push_back(length_[sequence]);
  content_.push_back(content_[sequence]);
  for (int layer = 0; layer < options_.num_layers; ++layer) {
    std::vector<float> copy = outputs(sequence, layer);
    outputs_.push_back(std::move(copy));
  }
  return static_cast<int>(ids_.size()) - 1;
}

Status AttentionRig::load_pages(const AttentionRig& from, int sequence, int64_t num_pages) {
  KVANT_CHECK(length_[sequence] == 0, "pages are loaded into an empty sequence");
  const std::vector<uint32_t> tokens(static_cast<size_t>(options_.page_tokens), 1);
  for (int64_t page = 0; page < num_pages; ++page) {
    std::vector<std::vector<std::byte>> objects;
    for (int g = 0; g < cache_->num_groups(); ++g) {
      cache::KvCache::PageIdentity identity{};
      identity.key[0] = static_cast<uint8_t>(page + 1);
      identity.parent_key[0] = static_cast<uint8_t>(page);
      identity.token_ids = tokens;
      auto object = from.cache_->export_page(from.ids_[sequence], g, page, identity);
      // A window group has let go of its old pages; no later query reads them.
      if (!object && cache_->group(g).geometry.window == 0) return object.error();
      objects.push_back(object ? std::move(*object) : std::vector<std::byte>{});
    }
    const std::vector<std::span<const std::byte>> spans(objects.begin(), objects.end());
    KVANT_TRY(cache_->import_page(ids_[sequence], spans));
    length_[sequence] += options_.page_tokens;
  }
  const auto row = static_cast<int64_t>(options_.params.num_query_heads) * options_.head_dim;
  for (int layer = 0; layer < options_.num_layers; ++layer) {
    const std::vector<float>& source = from.outputs(sequence, layer);
    outputs_[sequence * options_.num_layers + layer].assign(
        source.begin(), source.begin() + length_[sequence] * row);
  }
  return {};
}

std::vector<std::byte> AttentionRig::page_bytes(int sequence) {
  std::vector<std::byte> bytes;
  const cache::StepSequence one{ids_[sequence], 1};
  EXPECT_TRUE(cache_->begin_step(std::span(&one, 1)).has_value());
  for (int g = 0; g < cache_->num_groups(); ++g) {
    const cache::GroupView& view = cache_->view(g);
    const cache::SequenceView& seq = view.sequences[0];
    const auto add = [&](cache::PageEntry entry) {
      const cache::PageKind& kind = view.kinds[entry.kind];
      for (size_t l = 0; l < kind.units.size(); ++l) {
        for (int h = 0; h < view.num_kv_heads; ++h) {
          const std::byte* unit = kind.unit(entry, static_cast<int>(l), h);
          bytes.insert(bytes.end(), unit, unit + kind.units[l].bytes);
        }
      }
    };
    const int64_t own = seq.first_position / view.page_tokens;
    for (int64_t page = seq.first_page; page <= own; ++page) {
      const bool bf16 = own - page <= seq.recent_pages;
      add(bf16 ? seq.bf16[page - seq.bf16_first_page] : seq.stored[page]);
    }
  }
  cache_->abort_step();
  return bytes;
}

}  // namespace kvant::backend::testing
