#include "kvant/cache/testing/cache_harness.h"

#include <algorithm>
#include <cstring>

#include "kvant/base/small_floats.h"
#include "kvant/cache/fingerprint.h"
#include "kvant/cache/scalar_append.h"

namespace kvant::cache::testing {

using formats::Codec;
using formats::SideFormat;

namespace {

// SplitMix64's output function.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

Error wrong(const std::string& what) {
  return Error(ErrorCode::kInternal, what);
}

std::string place_name(int layer, int64_t page) {
  return "layer " + std::to_string(layer) + ", page " + std::to_string(page);
}

}  // namespace

uint64_t next_random(uint64_t& seed) {
  seed += 0x9e3779b97f4a7c15ull;
  return mix(seed);
}

std::vector<uint32_t> random_tokens(uint64_t& seed, int64_t count) {
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) token = static_cast<uint32_t>(next_random(seed) % 50000);
  return tokens;
}

formats::QuantPlan make_test_plan(std::span<const LayerGeometry> layers) {
  formats::QuantPlan plan;
  uint64_t seed = 7;
  const auto fill = [&](std::vector<float>& values, size_t count, float low, float high) {
    values.resize(count);
    for (float& value : values)
      value = low + (high - low) * static_cast<float>(next_random(seed) % 1024) / 1024.0f;
  };
  for (const LayerGeometry& geometry : layers) {
    const size_t vector = static_cast<size_t>(geometry.num_kv_heads) * geometry.head_dim;
    formats::LayerPlan layer;
    for (formats::SidePlan* side : {&layer.k, &layer.v}) {
      fill(side->global_scale, geometry.num_kv_heads, 0.05f, 0.1f);
      fill(side->bias, vector, -0.5f, 0.5f);
      fill(side->smooth, vector, 0.5f, 2.0f);
    }
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

Result<std::unique_ptr<CacheHarness>> CacheHarness::create(const CacheConfig& config) {
  std::unique_ptr<CacheHarness> harness(new CacheHarness());
  harness->config_ = config;
  KVANT_ASSIGN(harness->cache_, KvCache::create(config, harness->memory_));
  return harness;
}

Result<SequenceId> CacheHarness::add() {
  KVANT_ASSIGN(const SequenceId id, cache_->add_sequence());
  sequences_[id] = {};
  return id;
}

Result<SequenceId> CacheHarness::fork(SequenceId id) {
  KVANT_ASSIGN(const SequenceId copy, cache_->fork(id));
  sequences_[copy] = sequences_.at(id);
  return copy;
}

void CacheHarness::remove(SequenceId id) {
  cache_->remove_sequence(id);
  sequences_.erase(id);
}

Result<int64_t> CacheHarness::truncate(SequenceId id, int64_t length) {
  KVANT_ASSIGN(const int64_t remain, cache_->truncate(id, length));
  sequences_.at(id).resize(remain);
  return remain;
}

// ---- what pages must hold ----

float CacheHarness::value(int layer, SideRole role, int head, int64_t position, uint32_t token,
                          int channel) const {
  const uint64_t where = (static_cast<uint64_t>(layer) * 2 + static_cast<uint64_t>(role)) * 64 +
                         static_cast<uint64_t>(head);
  const uint64_t h = mix(mix(where * 1000003 + static_cast<uint64_t>(position)) * 31 +
                         static_cast<uint64_t>(token) * 1024 + static_cast<uint64_t>(channel));
  const float noise = static_cast<float>(static_cast<int64_t>(h % 4096) - 2048) / 1024.0f;
  // Some channels are large and far from zero, as keys are.
  return channel % 7 == 3 ? 6.0f + 3.0f * noise : noise;
}

SideFormat CacheHarness::side_format(int layer, SideRole role) const {
  const formats::CacheFormat& format =
      config_.layer_formats.empty() ? config_.format : config_.layer_formats[layer];
  return role == SideRole::kKeys ? format.k : format.v;
}

formats::SideParams CacheHarness::side_params(int layer, SideRole role, int head) const {
  formats::SideParams params;
  if (config_.plan == nullptr) return params;
  const formats::LayerPlan& layer_plan = config_.plan->layers[layer];
  const formats::SidePlan& plan = role == SideRole::kKeys ? layer_plan.k : layer_plan.v;
  const SideFormat format = side_format(layer, role);
  const int64_t offset = static_cast<int64_t>(head) * config_.layers[layer].head_dim;
  if (formats::format_info(format.base).global_scale != formats::GlobalScale::kNone &&
      !plan.global_scale.empty())
    params.global_scale = plan.global_scale[plan.global_scale.size() == 1 ? 0 : head];
  if (format.bias) params.bias = plan.bias.data() + offset;
  if (format.smooth) params.smooth = plan.smooth.data() + offset;
  return params;
}

bool CacheHarness::stays_bf16(int group, int64_t page) const {
  const LayerGroup& layers = cache_->group(group);
  bool plain = true;
  for (const int layer : layers.layers) {
    if (side_format(layer, SideRole::kKeys).base != formats::FormatId::kBf16 ||
        side_format(layer, SideRole::kValues).base != formats::FormatId::kBf16)
      plain = false;
  }
  // Recent pages that cover the window leave nothing to encode.
  const int t = config_.page_tokens;
  const int window = layers.geometry.window;
  const int recent_pages = (config_.format.recent_tokens + t - 1) / t;
  if (window > 0 && recent_pages * t >= window - 1) plain = true;
  return plain || (config_.format.sink && window == 0 && page == 0);
}

std::vector<float> CacheHarness::expected_rows(int layer, SideRole role, int head,
                                               int64_t first_position,
                                               std::span<const uint32_t> tokens) const {
  const int head_dim = config_.layers[layer].head_dim;
  std::vector<float> rows(tokens.size() * head_dim);
  for (size_t t = 0; t < tokens.size(); ++t) {
    for (int channel = 0; channel < head_dim; ++channel)
      rows[t * head_dim + channel] =
          value(layer, role, head, first_position + static_cast<int64_t>(t), tokens[t], channel);
  }
  if (config_.format.strict) {
    const auto codec = Codec::create(side_format(layer, role), head_dim);
    const formats::SideParams params = side_params(layer, role, head);
    std::vector<uint8_t> codes(codec->row_code_bytes()), scales(codec->row_scale_bytes());
    for (size_t t = 0; t < tokens.size(); ++t) {
      float* row = rows.data() + t * head_dim;
      codec->encode_page(row, 1, params, {codes.data(), scales.data(), nullptr});
      codec->decode_page({codes.data(), scales.data(), nullptr}, 1, params, Codec::Frame::kPlain,
                         row);
    }
  }
  for (float& x : rows) x = from_bf16(to_bf16(x));
  return rows;
}

const std::vector<std::byte>& CacheHarness::expected_page(int group, int64_t page,
                                                          std::span<const uint32_t> tokens) {
  const std::pair key{std::pair{group, page}, std::vector<uint32_t>(tokens.begin(), tokens.end())};
  const auto found = expected_.find(key);
  if (found != expected_.end()) return found->second;
  if (expected_.size() > 2000) expected_.clear();
  const LayerGroup& layers = cache_->group(group);
  const int head_dim = layers.geometry.head_dim;
  std::vector<std::byte> payload;
  for (const int layer : layers.layers) {
    UnitShape shape{side_format(layer, SideRole::kKeys), side_format(layer, SideRole::kValues),
                    config_.page_tokens, head_dim};
    if (stays_bf16(group, page)) shape.k = shape.v = {};
    const formats::UnitSections sections =
        formats::unit_sections(shape.k, shape.v, shape.page_tokens, head_dim);
    for (int head = 0; head < layers.geometry.num_kv_heads; ++head) {
      std::vector<std::byte> unit(sections.bytes);
      for (const SideShape& side : {shape.keys(), shape.values()}) {
        const std::vector<float> rows =
            expected_rows(layer, side.role, head, page * config_.page_tokens, tokens);
        const auto codec = Codec::create(side.format, head_dim);
        const formats::SideParams params =
            stays_bf16(group, page) ? formats::SideParams{} : side_params(layer, side.role, head);
        codec->encode_page(rows.data(), config_.page_tokens, params,
                           side_of_unit(unit.data(), sections, side));
      }
      payload.insert(payload.end(), unit.begin(), unit.end());
    }
  }
  return expected_[key] = std::move(payload);
}

// ---- steps ----

Status CacheHarness::check_bf16_page(const GroupView& view, int layer, int group_layer,
                                     int64_t page, PageEntry entry,
                                     std::span<const uint32_t> tokens) const {
  if (!entry.valid() || entry.kind == kKindStored)
    return wrong(place_name(layer, page) + " should be BF16");
  const PageKind& kind = view.kinds[entry.kind];
  for (int head = 0; head < view.num_kv_heads; ++head) {
    for (const SideRole role : {SideRole::kKeys, SideRole::kValues}) {
      const std::vector<float> expected =
          expected_rows(layer, role, head, page * view.page_tokens, tokens);
      std::vector<float> found(expected.size());
      read_bf16_side(kind.layout, view.page_tokens, view.head_dim,
                     kind.unit(entry, group_layer, head), role, static_cast<int>(tokens.size()),
                     found.data());
      if (found != expected) return wrong(place_name(layer, page) + " has other BF16 values");
    }
  }
  return {};
}

Status CacheHarness::check_stored_page(const GroupView& view, int group, int group_layer,
                                       int64_t page, PageEntry entry,
                                       std::span<const uint32_t> tokens) {
  const int layer = cache_->group(group).layers[group_layer];
  const uint32_t kind_index = stays_bf16(group, page) ? kKindBf16 : kKindStored;
  if (!entry.valid() || entry.kind != kind_index)
    return wrong(place_name(layer, page) + " is not stored as it should be");
  const PageKind& kind = view.kinds[entry.kind];
  const UnitShape shape{kind.k_format[group_layer], kind.v_format[group_layer], view.page_tokens,
                        view.head_dim};
  const std::vector<std::byte>& expected = expected_page(group, page, tokens);
  for (int head = 0; head < view.num_kv_heads; ++head) {
    std::vector<std::byte> planar(kind.units[group_layer].bytes);
    convert_unit(shape, kind.layout, kind.unit(entry, group_layer, head), Layout::kPlanar,
                 planar.data());
    const int64_t offset = kind.layer_offset[group_layer] + head * kind.units[group_layer].bytes;
    if (std::memcmp(planar.data(), expected.data() + offset, planar.size()) != 0)
      return wrong(place_name(layer, page) + " has other stored bytes");
  }
  return {};
}

Status CacheHarness::check_sequence(const GroupView& view, int group, int group_layer,
                                    const SequenceView& sequence,
                                    std::span<const uint32_t> tokens) {
  const int64_t t = view.page_tokens;
  const int64_t length = sequence.first_position + sequence.num_new_tokens;
  const int64_t last_page = (length - 1) / t;
  const int layer = cache_->group(group).layers[group_layer];
  // Every query reads its own and recent pages in BF16, and the rest of its window as stored.
  for (int64_t position = sequence.first_position; position < length; ++position) {
    const int64_t oldest =
        view.window == 0 ? 0 : std::max<int64_t>(0, (position - view.window + 1)) / t;
    if (oldest < sequence.first_page)
      return wrong(place_name(layer, oldest) + " left the window too early");
  }
  const int64_t first_query_page = sequence.first_position / t;
  for (int64_t page = sequence.first_page; page <= last_page; ++page) {
    const std::span<const uint32_t> page_tokens =
        tokens.subspan(page * t, std::min<int64_t>(t, length - page * t));
    if (page >= first_query_page - sequence.recent_pages) {
      if (page < sequence.bf16_first_page)
        return wrong(place_name(layer, page) + " is missing in the BF16 table");
      KVANT_TRY(check_bf16_page(view, layer, group_layer, page,
                                sequence.bf16[page - sequence.bf16_first_page], page_tokens));
    }
    if (page < last_page - sequence.recent_pages)
      KVANT_TRY(
          check_stored_page(view, group, group_layer, page, sequence.stored[page], page_tokens));
  }
  return {};
}

Status CacheHarness::append_and_check(std::span<const NewTokens> batch, int layer) {
  const KvCache::LayerPlace place = cache_->place(layer);
  const GroupView& view = cache_->view(place.group);
  std::vector<float> k, v;
  for (size_t i = 0; i < batch.size(); ++i) {
    const SequenceView& sequence = view.sequences[i];
    for (size_t t = 0; t < batch[i].tokens.size(); ++t) {
      for (int head = 0; head < view.num_kv_heads; ++head) {
        for (int channel = 0; channel < view.head_dim; ++channel) {
          const int64_t position = sequence.first_position + static_cast<int64_t>(t);
          const uint32_t token = batch[i].tokens[t];
          k.push_back(value(layer, SideRole::kKeys, head, position, token, channel));
          v.push_back(value(layer, SideRole::kValues, head, position, token, channel));
        }
      }
    }
  }
  KVANT_ASSIGN(const formats::EncodeStats stats,
               scalar_append(view, place.index, k.data(), v.data()));
  if (stats.non_finite != 0) return wrong("finite values were counted as non-finite");
  for (size_t i = 0; i < batch.size(); ++i) {
    std::vector<uint32_t> tokens = sequences_.at(batch[i].id);
    tokens.insert(tokens.end(), batch[i].tokens.begin(), batch[i].tokens.end());
    KVANT_TRY(check_sequence(view, place.group, place.index, view.sequences[i], tokens));
  }
  return {};
}

Status CacheHarness::step(std::span<const NewTokens> batch, StepEnd end) {
  std::vector<StepSequence> items;
  for (const NewTokens& item : batch)
    items.push_back({item.id, static_cast<int32_t>(item.tokens.size())});
  KVANT_TRY(cache_->begin_step(items));
  Status status = cache_->check_integrity();
  for (int layer = 0; status && layer < static_cast<int>(config_.layers.size()); ++layer)
    status = append_and_check(batch, layer);
  if (end == StepEnd::kAbort || !status) {
    cache_->abort_step();
    return status;
  }
  cache_->commit_step();
  for (const NewTokens& item : batch) {
    std::vector<uint32_t>& tokens = sequences_.at(item.id);
    tokens.insert(tokens.end(), item.tokens.begin(), item.tokens.end());
  }
  return {};
}

Status CacheHarness::extend(SequenceId id, std::span<const uint32_t> tokens) {
  const NewTokens item{id, {tokens.begin(), tokens.end()}};
  return step(std::span(&item, 1));
}

// ---- page objects ----

Result<std::vector<std::vector<std::byte>>> CacheHarness::export_page(SequenceId id,
                                                                      int64_t page) const {
  const std::vector<uint32_t>& tokens = sequences_.at(id);
  std::vector<std::vector<std::byte>> objects;
  for (int g = 0; g < cache_->num_groups(); ++g) {
    KvCache::PageIdentity identity{};
    PageKey parent{}, key{};
    for (int64_t p = 0; p <= page; ++p) {
      parent = key;
      identity.token_ids = std::span(tokens).subspan(p * config_.page_tokens, config_.page_tokens);
      key = page_key(parent, cache_->fingerprint(), "", identity.token_ids);
    }
    std::memcpy(identity.key, key.data(), key.size());
    std::memcpy(identity.parent_key, parent.data(), parent.size());
    auto object = cache_->export_page(id, g, page, identity);
    const bool windowed = cache_->group(g).geometry.window > 0;
    if (!object && !windowed) return object.error();
    objects.push_back(object ? std::move(*object) : std::vector<std::byte>{});
  }
  return objects;
}

Status CacheHarness::import_page(SequenceId id, const std::vector<std::vector<std::byte>>& objects,
                                 std::span<const uint32_t> tokens) {
  const std::vector<std::span<const std::byte>> spans(objects.begin(), objects.end());
  KVANT_TRY(cache_->import_page(id, spans));
  std::vector<uint32_t>& held = sequences_.at(id);
  held.insert(held.end(), tokens.begin(), tokens.end());
  return {};
}

Status CacheHarness::attach(SequenceId id, std::span<const HeldPage* const> pages,
                            std::span<const uint32_t> tokens) {
  KVANT_TRY(cache_->attach_pages(id, pages));
  std::vector<uint32_t>& held = sequences_.at(id);
  held.insert(held.end(), tokens.begin(), tokens.end());
  return {};
}

Result<std::vector<std::vector<std::byte>>> CacheHarness::export_held(
    const HeldPage& held, std::span<const uint32_t> tokens) const {
  std::vector<std::vector<std::byte>> objects(cache_->num_groups());
  KvCache::PageIdentity identity{};
  const PageKey key = page_key({}, cache_->fingerprint(), "", tokens);
  std::memcpy(identity.key, key.data(), key.size());
  identity.token_ids = tokens;
  for (int g = 0; g < cache_->num_groups(); ++g) {
    if (!held.has(g)) continue;
    KVANT_ASSIGN(objects[g], cache_->export_held(held, g, identity));
  }
  return objects;
}

std::string CacheHarness::check() const {
  const Status status = cache_->check_integrity();
  if (!status) return status.error().message();
  int64_t tokens = 0;
  for (const auto& [id, held] : sequences_) {
    if (cache_->length(id) != static_cast<int64_t>(held.size()))
      return "sequence " + std::to_string(id) + " has another length than its model";
    tokens += static_cast<int64_t>(held.size());
  }
  if (cache_->bytes().tokens_now != tokens) return "tokens_now is not the sum of lengths";
  return "";
}

}  // namespace kvant::cache::testing
