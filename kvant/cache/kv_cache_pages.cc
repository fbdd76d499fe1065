// Stored page objects out of and into the cache.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/cache/kv_cache_state.h"
#include "kvant/cache/layout.h"
#include "kvant/cache/page_object.h"

namespace kvant::cache {

namespace {

// Rewrites every unit of a page; `to_object` means from the cache to a planar payload.
void convert_page(const GroupPlan& group, const PageKind& kind, int page_tokens, PageEntry entry,
                  std::byte* payload, bool to_object) {
  for (size_t i = 0; i < group.group.layers.size(); ++i) {
    const UnitShape shape{kind.k_format[i], kind.v_format[i], page_tokens,
                          group.group.geometry.head_dim};
    for (int head = 0; head < group.group.geometry.num_kv_heads; ++head) {
      std::byte* unit = kind.unit(entry, static_cast<int>(i), head);
      std::byte* planar = payload + kind.layer_offset[i] + head * kind.units[i].bytes;
      if (to_object)
        convert_unit(shape, kind.layout, unit, Layout::kPlanar, planar);
      else
        convert_unit(shape, Layout::kPlanar, planar, kind.layout, unit);
    }
  }
}

// Pages may lie where the host cannot read them: one of the kind in host memory, in the first slot.
constexpr PageEntry kFirstSlot = PageEntry::make(kKindStored, 0);
PageKind on_host(const PageKind& kind, std::vector<std::byte>& bytes) {
  PageKind copy = kind;
  copy.base = bytes.data();
  return copy;
}

Error mismatch(ErrorCode code, size_t group, const std::string& what) {
  return Error(code, "page of layer group " + std::to_string(group) + ": " + what);
}

std::string expected_found(const char* what, uint64_t expected, uint64_t found) {
  return std::string(what) + " is " + std::to_string(found) + ", expected " +
         std::to_string(expected);
}

}  // namespace

Result<std::vector<std::byte>> KvCache::export_page(SequenceId id, int group, int64_t page,
                                                    const PageIdentity& identity) const {
  const State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_TRY(s.check_no_step());
  if (group < 0 || group >= num_groups())
    return Error(ErrorCode::kInvalidArgument, "no layer group " + std::to_string(group));
  const int64_t full = s.sequences[id].length / s.page_tokens();
  if (page < s.groups[group].first_page[id] || page >= full) {
    return Error(
        ErrorCode::kInvalidArgument,
        "page " + std::to_string(page) + " is not a full page of this sequence: it holds [" +
            std::to_string(s.groups[group].first_page[id]) + ", " + std::to_string(full) + ")");
  }
  const PageEntry entry = s.stored(group, id)[page];
  if (!entry.valid()) {
    return Error(
        ErrorCode::kInvalidArgument,
        "page " + std::to_string(page) + " is still BF16 (+recent), only closed pages are kept");
  }
  return s.export_entry({.group = group, .page = page, .entry = entry}, identity);
}

Result<std::vector<std::byte>> KvCache::State::export_entry(const Exported& what,
                                                            const PageIdentity& identity) const {
  if (static_cast<int64_t>(identity.token_ids.size()) != page_tokens()) {
    return Error(ErrorCode::kInvalidArgument, std::to_string(identity.token_ids.size()) +
                                                  " token ids for a page of " +
                                                  std::to_string(page_tokens()) + " tokens");
  }
  const GroupPlan& planned = plan.groups[what.group];
  const PageKind& kind = groups[what.group].kinds[what.entry.kind];
  std::vector<std::byte> payload(kind.page_bytes);
  memory->read(payload.data(), kind.base + what.entry.slot * kind.page_bytes, kind.page_bytes);
  if (what.layout != kind.layout) {
    std::vector<std::byte> bytes = std::move(payload);
    payload.assign(kind.page_bytes, std::byte{0});
    convert_page(planned, on_host(kind, bytes), page_tokens(), kFirstSlot, payload.data(), true);
  }

  PageObjectHeader header;
  header.fingerprint = fingerprint;
  std::memcpy(header.key.data(), identity.key, sizeof(identity.key));
  std::memcpy(header.parent_key.data(), identity.parent_key, sizeof(identity.parent_key));
  header.page_tokens = header.num_tokens = static_cast<uint32_t>(page_tokens());
  header.layer_group = static_cast<uint32_t>(what.group);
  header.layout = what.layout;
  header.num_kv_heads = static_cast<uint32_t>(planned.group.geometry.num_kv_heads);
  header.first_position = static_cast<uint64_t>(what.page * page_tokens());
  header.token_ids.assign(identity.token_ids.begin(), identity.token_ids.end());
  return build_page_object(header, payload);
}

Result<PageObject> KvCache::State::check_object(int group, int64_t page,
                                                std::span<const std::byte> bytes) const {
  const size_t g = static_cast<size_t>(group);
  auto parsed = parse_page_object(bytes);
  if (!parsed) return parsed.error().with_context("page of layer group " + std::to_string(group));
  const PageObjectHeader& header = parsed->header;
  if (header.fingerprint != fingerprint) {
    return mismatch(
        ErrorCode::kInvalidArgument, g,
        "its fingerprint is another one: it was made by another model, cache format, plan "
        "or page size and must be recomputed");
  }
  if (header.layer_group != g)
    return mismatch(ErrorCode::kInvalidArgument, g,
                    expected_found("layer_group", g, header.layer_group));
  if (header.page_tokens != static_cast<uint32_t>(page_tokens()))
    return mismatch(ErrorCode::kInvalidArgument, g,
                    expected_found("page_tokens", page_tokens(), header.page_tokens));
  const int heads = plan.groups[group].group.geometry.num_kv_heads;
  if (header.first_kv_head != 0 || header.num_kv_heads != static_cast<uint32_t>(heads))
    return mismatch(ErrorCode::kInvalidArgument, g,
                    expected_found("num_kv_heads", heads, header.num_kv_heads));
  const uint64_t position = static_cast<uint64_t>(page * page_tokens());
  if (header.first_position != position)
    return mismatch(ErrorCode::kInvalidArgument, g,
                    expected_found("first_position", position, header.first_position));
  if (header.layout != Layout::kPlanar && header.layout != config.layout) {
    return mismatch(ErrorCode::kInvalidArgument, g,
                    "its layout is another backend's; objects are exchanged in planar layout");
  }
  const int64_t expected = groups[group].kinds[closed_kind(group, page)].page_bytes;
  if (static_cast<int64_t>(parsed->payload.size()) != expected)
    return mismatch(ErrorCode::kCorruptData, g,
                    expected_found("payload size", expected, parsed->payload.size()));
  return parsed;
}

Status KvCache::import_page(SequenceId id, std::span<const std::span<const std::byte>> objects) {
  State& s = *state_;
  KVANT_TRY(s.check_known(id));
  KVANT_TRY(s.check_no_step());
  const int64_t length = s.sequences[id].length;
  const int64_t page = length / s.page_tokens();
  if (length % s.page_tokens() != 0 || length + s.page_tokens() > s.plan.max_sequence_tokens) {
    return Error(ErrorCode::kInvalidArgument,
                 "a page is imported at a page boundary with room for it; the sequence has " +
                     std::to_string(length) + " tokens of " +
                     std::to_string(s.plan.max_sequence_tokens));
  }
  KVANT_ASSIGN(const std::vector<PageObject> parsed, s.check_objects(page, objects));
  for (int g = 0; g < num_groups(); ++g) s.place_object(g, id, page, parsed[g]);
  s.sequences[id].length = length + s.page_tokens();
  for (int g = 0; g < num_groups(); ++g) s.retire_window(g, id);
  return {};
}

Result<std::vector<PageObject>> KvCache::State::check_objects(
    int64_t page, std::span<const std::span<const std::byte>> objects) const {
  if (objects.size() != groups.size()) {
    return Error(ErrorCode::kInvalidArgument, std::to_string(objects.size()) +
                                                  " page objects for " +
                                                  std::to_string(groups.size()) + " layer groups");
  }
  std::vector<PageObject> parsed(objects.size());
  std::vector<int64_t> needed(plan.classes.size(), 0);
  for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
    if (plan.groups[g].recent_pages > 0) {
      return Error(ErrorCode::kUnsupported,
                   "with +recentN the last pages are BF16 and are not exchanged; recompute them");
    }
    if (objects[g].empty() && plan.groups[g].group.geometry.window > 0) continue;
    KVANT_ASSIGN(parsed[g], check_object(g, page, objects[g]));
    ++needed[slab_class(g, closed_kind(g, page))];
  }
  for (int c = 0; c < static_cast<int>(needed.size()); ++c) {
    if (needed[c] > pool[0].free_slots(c))
      return Error(ErrorCode::kResourceExhausted, "the cache is full: no free page of " +
                                                      std::to_string(plan.classes[c].page_bytes) +
                                                      " bytes; end a sequence");
  }
  return parsed;
}

void KvCache::State::place_object(int group, SequenceId id, int64_t page,
                                  const PageObject& object) {
  PageEntry& stored_entry = stored(group, id)[page];
  PageEntry& bf16_entry = bf16(group, id)[page];
  stored_entry = bf16_entry = PageEntry::none();
  if (object.payload.empty()) {
    // A window group's page that no later query reads: everything before the next page is gone.
    int64_t& first = groups[group].first_page[id];
    for (; first < page; ++first) drop_page(group, id, first);
    first = page + 1;
    return;
  }
  stored_entry = load_payload(group, page, object);
  if (stored_entry.kind == kKindBf16) bf16_entry = stored_entry;
}

PageEntry KvCache::State::load_payload(int group, int64_t page, const PageObject& object) {
  const uint32_t kind = closed_kind(group, page);
  const PageEntry entry = take(group, kind);
  const PageKind& pages = groups[group].kinds[kind];
  const std::byte* source = object.payload.data();
  std::vector<std::byte> bytes;
  if (object.header.layout != pages.layout) {
    bytes.resize(pages.page_bytes);
    // convert_page only reads the payload in this direction.
    convert_page(plan.groups[group], on_host(pages, bytes), page_tokens(), kFirstSlot,
                 const_cast<std::byte*>(source), false);
    source = bytes.data();
  }
  memory->copy(pages.base + entry.slot * pages.page_bytes, source, pages.page_bytes);
  return entry;
}

Result<std::vector<std::byte>> KvCache::convert_object(std::span<const std::byte> object,
                                                       Layout layout) const {
  // Reads only what never changes after creation.
  const State& s = *state_;
  KVANT_ASSIGN(const PageObject parsed, parse_page_object(object));
  const int group = static_cast<int>(parsed.header.layer_group);
  const int64_t page = static_cast<int64_t>(parsed.header.first_position) / s.page_tokens();
  if (parsed.header.layer_group >= s.groups.size())
    return mismatch(ErrorCode::kInvalidArgument, parsed.header.layer_group, "there is none");
  KVANT_TRY(s.check_object(group, page, object));
  if (layout != Layout::kPlanar && layout != s.config.layout)
    return Error(ErrorCode::kInvalidArgument, "objects are in planar or the cache's own layout");
  if (layout == parsed.header.layout) return std::vector(object.begin(), object.end());
  const PageKind& kind = s.groups[group].kinds[s.closed_kind(group, page)];
  std::vector<std::byte> from(parsed.payload.begin(), parsed.payload.end());
  std::vector<std::byte> to(from.size());
  const bool to_planar = layout == Layout::kPlanar;
  convert_page(s.plan.groups[group], on_host(kind, to_planar ? from : to), s.page_tokens(),
               kFirstSlot, (to_planar ? to : from).data(), to_planar);
  PageObjectHeader header = parsed.header;
  header.layout = layout;
  return build_page_object(header, to);
}

// ---- integrity ----

namespace {

Error violation(const std::string& what) {
  return Error(ErrorCode::kInternal, what);
}

}  // namespace

Status KvCache::State::check_tables(int group, SequenceId id,
                                    std::vector<std::vector<uint32_t>>& references) const {
  const std::string name =
      "group " + std::to_string(group) + ", sequence " + std::to_string(id) + ", page ";
  const GroupPlan& planned = plan.groups[group];
  const int64_t full = sequences[id].length / page_tokens();
  for (int64_t page = groups[group].first_page[id]; page < num_pages(id); ++page) {
    const PageEntry stored_entry = stored(group, id)[page];
    const PageEntry bf16_entry = bf16(group, id)[page];
    const std::string where = name + std::to_string(page);
    for (const PageEntry entry : {stored_entry, bf16_entry}) {
      if (!entry.valid() || entry.kind == kKindStaging) continue;
      if (entry.kind > kKindStaging ||
          entry.slot >= pool[0].num_slots(slab_class(group, entry.kind)))
        return violation(where + " names a slot that does not exist");
    }
    if (bf16_entry.valid() && bf16_entry.kind == kKindStaging && !in_step())
      return violation(where + " is staged outside a step");
    if (stored_entry.valid() && stored_entry.kind == kKindStored)
      ++references[planned.stored_class][stored_entry.slot];
    if (bf16_entry.valid() && bf16_entry.kind == kKindBf16)
      ++references[planned.bf16_class][bf16_entry.slot];
    if (stays_bf16(group, page) && !(stored_entry == bf16_entry && bf16_entry.kind == kKindBf16))
      return violation(where + " should stay BF16 and does not");
    if (in_step() || stays_bf16(group, page)) continue;
    const bool closed = page < full - planned.recent_pages;
    if (closed != (stored_entry.valid() && stored_entry.kind == kKindStored) ||
        closed != !bf16_entry.valid())
      return violation(where + (closed ? " should be closed" : " should be BF16"));
  }
  return {};
}

Status KvCache::check_integrity() const {
  const State& s = *state_;
  std::vector<std::vector<uint32_t>> references(s.plan.classes.size());
  for (size_t c = 0; c < references.size(); ++c) references[c].resize(s.plan.classes[c].num_slots);
  for (int g = 0; g < num_groups(); ++g) {
    for (SequenceId id = 0; id < static_cast<SequenceId>(s.sequences.size()); ++id) {
      if (!s.sequences[id].used) continue;
      const int64_t length = s.sequences[id].length;
      if (length < 0 || length > s.plan.max_sequence_tokens)
        return violation("sequence " + std::to_string(id) + " has an impossible length");
      const int64_t first = s.groups[g].first_page[id];
      if (first < 0 || first > s.num_pages(id))
        return violation("sequence " + std::to_string(id) + " begins after its end");
      if (!s.in_step() &&
          first < s.plan.groups[g].kept_from(length / s.page_tokens(), s.page_tokens()))
        return violation("sequence " + std::to_string(id) + " holds pages that left the window");
      KVANT_TRY(s.check_tables(g, id, references));
    }
  }
  KVANT_TRY(s.check_held(references));
  KVANT_TRY(s.pool[0].check(references));
  std::vector<int64_t> in_use(s.plan.classes.size(), 0);
  for (int g = 0; g < num_groups(); ++g) {
    in_use[s.plan.groups[g].bf16_class] += s.groups[g].bf16_in_use;
    if (!s.plan.groups[g].plain) in_use[s.plan.groups[g].stored_class] += s.groups[g].stored_in_use;
  }
  for (int c = 0; c < static_cast<int>(in_use.size()); ++c) {
    if (in_use[c] != s.pool[0].slots_in_use(c))
      return violation("groups count " + std::to_string(in_use[c]) + " pages of class " +
                       std::to_string(c) + ", the pool " +
                       std::to_string(s.pool[0].slots_in_use(c)));
  }
  return {};
}

}  // namespace kvant::cache
