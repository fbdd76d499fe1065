#include "kvant/backend/cpu/append.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <optional>
#include <string>

#include "kvant/backend/cpu/attention_task.h"
#include "kvant/base/check.h"
#include "kvant/cache/layout.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/sections.h"

namespace kvant::backend::cpu {

using cache::CloseItem;
using cache::GroupView;
using cache::PageEntry;
using cache::PageKind;
using cache::SequenceView;
using formats::Codec;
using formats::EncodeStats;
using formats::SideParams;

namespace {

// Up to so many keys in items of one token, handing them out costs more than writing them.
constexpr int64_t kAloneValues = 2048;
constexpr int kRowsPerTask = 16;  // tokens; tasks start at multiples of it, so none share a word

// Values that BF16 holds as Inf or NaN: at or above the midpoint of its largest value and 2^128.
int64_t count_non_finite(const float* x, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    count += (std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu) >= 0x7f7f8000u ? 1 : 0;
  }
  return count;
}

// What a task does to rows before they are rounded to BF16: nothing, or the codec's rounding.
class StrictSide {
 public:
  static Result<StrictSide> create(const GroupView& view, int layer, bool keys, CpuLevel level) {
    StrictSide side;
    const PageKind& stored = view.kinds[cache::kKindStored];
    formats::SideFormat format = keys ? stored.k_format[layer] : stored.v_format[layer];
    if (!view.strict || format.base == formats::FormatId::kBf16) return side;
    if (formats::format_info(format.base).axis == formats::BlockAxis::kToken) {
      return Error(ErrorCode::kUnsupported,
                   "+strict quantises token by token; " +
                       std::string(formats::format_info(format.base).name) +
                       " needs the whole page: leave +strict out or choose a format whose blocks "
                       "lie within one token");
    }
    KVANT_ASSIGN(Codec codec, Codec::create(format, view.head_dim, level));
    side.codec_.emplace(std::move(codec));
    return side;
  }

  // Returns the row to store: `x`, or its rounding in `scratch` (head_dim values, then bytes).
  const float* round(const float* x, float global_scale, float* scratch) const {
    if (!codec_) return x;
    auto* codes = reinterpret_cast<uint8_t*>(scratch + codec_->head_dim());
    uint8_t* scales = codes + codec_->row_code_bytes();
    codec_->encode_rows(x, 1, global_scale, codes, scales);
    codec_->decode_rows(codes, scales, 1, global_scale, scratch);
    return scratch;
  }

 private:
  std::optional<Codec> codec_;
};

struct AppendCall {
  const AppendArgs& args;
  const GroupView& view;
  const WorkspaceLayout& layout;
  AttentionWorkspace& workspace;
  const StrictSide& strict_k;
  const StrictSide& strict_v;

  float* scratch(int worker) const {
    return reinterpret_cast<float*>(workspace.data + layout.workers_at +
                                    worker * layout.worker_bytes);
  }
};

void list_rows(const GroupView& view, std::vector<AttentionItem>& items) {
  items.clear();
  for (size_t s = 0; s < view.sequences.size(); ++s) {
    const SequenceView& seq = view.sequences[s];
    for (int32_t begin = 0; begin < seq.num_new_tokens;) {
      const int64_t position = seq.first_position + begin;
      const auto room = static_cast<int32_t>(kRowsPerTask - position % kRowsPerTask);
      AttentionItem item;
      item.sequence = static_cast<int32_t>(s);
      item.token_begin = begin;
      item.num_tokens = std::min(room, seq.num_new_tokens - begin);
      begin += item.num_tokens;
      for (int head = 0; head < view.num_kv_heads; ++head) {
        item.kv_head = head;
        items.push_back(item);
      }
    }
  }
}

// Writes the item's rows into their BF16 page; returns how many values are not finite.
int64_t append_rows(const AppendCall& call, const AttentionItem& item, float* scratch) {
  const GroupView& view = call.view;
  const SequenceView& seq = view.sequences[item.sequence];
  const int d = view.head_dim;
  const int layer = call.args.group_layer;
  const auto& params = view.layers[layer];
  int64_t non_finite = 0;
  for (int t = item.token_begin; t < item.token_begin + item.num_tokens; ++t) {
    const int64_t position = seq.first_position + t;
    const int64_t page = position / view.page_tokens;
    const PageEntry entry = seq.bf16[page - seq.bf16_first_page];
    KVANT_CHECK(entry.valid(), "the page of a new token has a BF16 slot");
    const PageKind& kind = view.kinds[entry.kind];
    const int64_t offset =
        (static_cast<int64_t>(seq.first_row + t) * view.num_kv_heads + item.kv_head) * d;
    const float* k = static_cast<const float*>(call.args.k) + offset;
    const float* v = static_cast<const float*>(call.args.v) + offset;
    non_finite += count_non_finite(k, d) + count_non_finite(v, d);
    k = call.strict_k.round(k, params.k[item.kv_head].global_scale, scratch);
    v = call.strict_v.round(v, params.v[item.kv_head].global_scale, scratch + 4 * d);
    cache::write_f32_token(kind.layout, view.page_tokens, d, kind.unit(entry, layer, item.kv_head),
                           static_cast<int>(position % view.page_tokens), k, v);
  }
  return non_finite;
}

// One side of one head's unit of a full page: what a task closes.
struct SideOfPage {
  const CloseItem& item;
  int head = 0;
  cache::SideRole role = cache::SideRole::kKeys;
};

// Returns how many values saturated.
int64_t close_side(const AppendCall& call, const SideOfPage& part, const Codec& codec,
                   float* rows) {
  const GroupView& view = call.view;
  const int layer = call.args.group_layer;
  const int d = view.head_dim;
  const int tokens = view.page_tokens;
  const bool keys = part.role == cache::SideRole::kKeys;
  const PageKind& from = view.kinds[part.item.source.kind];
  const PageKind& to = view.kinds[part.item.target.kind];
  const std::byte* source = from.unit(part.item.source, layer, part.head);
  std::byte* target = to.unit(part.item.target, layer, part.head);
  const auto& sections = to.units[layer];
  const int64_t begin = keys ? 0 : sections.v_codes;
  const int64_t end = keys ? sections.v_codes : sections.bytes;
  if (part.item.target.kind != cache::kKindStored) {  // a sink page that was staged
    std::copy(source + begin, source + end, target + begin);
    return 0;
  }
  const cache::SideShape shape{codec.side(), part.role, tokens, d};
  auto* planar = reinterpret_cast<std::byte*>(rows + static_cast<int64_t>(tokens) * d);
  const formats::PlanarSide encoded = cache::side_of_unit(planar, sections, shape);
  const SideParams& params =
      keys ? view.layers[layer].k[part.head] : view.layers[layer].v[part.head];
  cache::read_bf16_side(from.layout, tokens, d, source, part.role, tokens, rows);
  const EncodeStats stats = codec.encode_page_in_place(rows, tokens, params, encoded);
  std::fill(target + begin, target + end, std::byte{0});  // padding
  cache::convert_side(shape, cache::Layout::kPlanar, {encoded.codes, encoded.scales, encoded.mean},
                      to.layout, cache::side_of_unit(target, sections, shape));
  return stats.saturated;
}

}  // namespace

Result<EncodeStats> append(const AppendArgs& args, ThreadPool& pool, CpuLevel level,
                           AttentionWorkspace& workspace) {
  const GroupView& view = *args.view;
  const WorkspaceLayout layout =
      workspace_layout(view.head_dim, view.page_tokens, pool.num_threads());
  if (workspace.data == nullptr || layout.partials_at > workspace.bytes) {
    return Error(ErrorCode::kInvalidArgument, "append needs " + std::to_string(layout.partials_at) +
                                                  " bytes of workspace and has " +
                                                  std::to_string(workspace.bytes) +
                                                  ": reserve it for this geometry");
  }
  KVANT_ASSIGN(const StrictSide strict_k, StrictSide::create(view, args.group_layer, true, level));
  KVANT_ASSIGN(const StrictSide strict_v, StrictSide::create(view, args.group_layer, false, level));
  const AppendCall call{args, view, layout, workspace, strict_k, strict_v};

  list_rows(view, workspace.items);
  std::atomic<int64_t> non_finite{0};
  const auto append_item = [&](int64_t i, int worker) {
    const int64_t count = append_rows(call, workspace.items[i], call.scratch(worker));
    if (count > 0) non_finite.fetch_add(count, std::memory_order_relaxed);
  };
  const auto num_items = static_cast<int64_t>(workspace.items.size());
  if (num_items * view.head_dim <= kAloneValues) {
    for (int64_t i = 0; i < num_items; ++i) append_item(i, 0);
  } else {
    pool.parallel_for(num_items, append_item);
  }
  EncodeStats stats;
  stats.non_finite = non_finite.load();
  if (view.closes.empty()) return stats;

  const PageKind& stored = view.kinds[cache::kKindStored];
  KVANT_ASSIGN(Codec k, Codec::create(stored.k_format[args.group_layer], view.head_dim, level));
  KVANT_ASSIGN(Codec v, Codec::create(stored.v_format[args.group_layer], view.head_dim, level));
  std::atomic<int64_t> saturated{0};
  const int64_t num_sides = static_cast<int64_t>(view.closes.size()) * view.num_kv_heads * 2;
  pool.parallel_for(num_sides, [&](int64_t i, int worker) {
    const bool keys = i % 2 == 0;
    const SideOfPage part{.item = view.closes[i / 2 / view.num_kv_heads],
                          .head = static_cast<int>(i / 2 % view.num_kv_heads),
                          .role = keys ? cache::SideRole::kKeys : cache::SideRole::kValues};
    const int64_t count = close_side(call, part, keys ? k : v, call.scratch(worker));
    if (count > 0) saturated.fetch_add(count, std::memory_order_relaxed);
  });
  stats.saturated = saturated.load();
  return stats;
}

}  // namespace kvant::backend::cpu
