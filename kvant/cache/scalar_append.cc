#include "kvant/cache/scalar_append.h"

#include <vector>

#include "kvant/base/check.h"
#include "kvant/cache/layout.h"

namespace kvant::cache {

using formats::Codec;
using formats::EncodeStats;
using formats::SideFormat;

namespace {

// One side of one layer: its codec, parameters and scratch.
struct Side {
  SideShape shape;
  Codec codec;
  std::span<const formats::SideParams> params;  // [num_kv_heads]
  const float* rows;                            // [num_rows][num_kv_heads][head_dim]
};

Result<Side> make_side(const GroupView& view, int group_layer, SideRole role, const float* rows) {
  const bool keys = role == SideRole::kKeys;
  const PageKind& kind = view.kinds[kKindStored];
  const SideFormat& format = (keys ? kind.k_format : kind.v_format)[group_layer];
  KVANT_ASSIGN(Codec codec, Codec::create(format, view.head_dim));
  const LayerParams& params = view.layers[group_layer];
  return Side{.shape = {format, role, view.page_tokens, view.head_dim},
              .codec = codec,
              .params = keys ? params.k : params.v,
              .rows = rows};
}

EncodeStats append_rows(const GroupView& view, int group_layer, const Side& k, const Side& v) {
  EncodeStats stats;
  std::vector<uint8_t> scratch;
  std::vector<float> key(view.head_dim), value(view.head_dim);
  for (const SequenceView& sequence : view.sequences) {
    for (int i = 0; i < sequence.num_new_tokens; ++i) {
      const int64_t position = sequence.first_position + i;
      const PageEntry entry = sequence.bf16[position / view.page_tokens - sequence.bf16_first_page];
      const PageKind& kind = view.kinds[entry.kind];
      for (int head = 0; head < view.num_kv_heads; ++head) {
        const int64_t row =
            (static_cast<int64_t>(sequence.first_row + i) * view.num_kv_heads + head) *
            view.head_dim;
        key.assign(k.rows + row, k.rows + row + view.head_dim);
        value.assign(v.rows + row, v.rows + row + view.head_dim);
        if (view.strict) {
          stats += round_strict_row(k.codec, k.params[head], scratch, key.data());
          stats += round_strict_row(v.codec, v.params[head], scratch, value.data());
        }
        write_f32_token(kind.layout, view.page_tokens, view.head_dim,
                        kind.unit(entry, group_layer, head),
                        static_cast<int>(position % view.page_tokens), key.data(), value.data());
      }
    }
  }
  return stats;
}

EncodeStats close_side(const GroupView& view, int group_layer, const CloseItem& item, int kv_head,
                       const Side& side) {
  const PageKind& source = view.kinds[item.source.kind];
  const PageKind& target = view.kinds[item.target.kind];
  std::vector<float> rows(static_cast<size_t>(view.page_tokens) * view.head_dim);
  read_bf16_side(source.layout, view.page_tokens, view.head_dim,
                 source.unit(item.source, group_layer, kv_head), side.shape.role, view.page_tokens,
                 rows.data());
  const formats::SideBytes bytes =
      formats::side_bytes(side.shape.format, view.page_tokens, view.head_dim);
  std::vector<uint8_t> codes(bytes.codes), scales(bytes.scales);
  std::vector<uint16_t> mean(side.shape.format.mean ? view.head_dim : 0);
  const formats::PlanarSide planar{codes.data(), scales.data(),
                                   side.shape.format.mean ? mean.data() : nullptr};
  const EncodeStats stats =
      side.codec.encode_page(rows.data(), view.page_tokens, side.params[kv_head], planar);
  convert_side(side.shape, Layout::kPlanar, {planar.codes, planar.scales, planar.mean},
               target.layout,
               side_of_unit(target.unit(item.target, group_layer, kv_head),
                            target.units[group_layer], side.shape));
  return stats;
}

}  // namespace

EncodeStats round_strict_row(const Codec& codec, const formats::SideParams& params,
                             std::vector<uint8_t>& scratch, float* row) {
  const int64_t code_bytes = codec.row_code_bytes();
  scratch.resize(static_cast<size_t>(code_bytes + codec.row_scale_bytes()));
  uint8_t* scales = scratch.data() + code_bytes;
  const EncodeStats stats = codec.encode_page(row, 1, params, {scratch.data(), scales, nullptr});
  codec.decode_page({scratch.data(), scales, nullptr}, 1, params, Codec::Frame::kPlain, row);
  return stats;
}

Result<EncodeStats> scalar_append(const GroupView& view, int group_layer, const float* k,
                                  const float* v) {
  KVANT_ASSIGN(const Side keys, make_side(view, group_layer, SideRole::kKeys, k));
  KVANT_ASSIGN(const Side values, make_side(view, group_layer, SideRole::kValues, v));
  EncodeStats stats = append_rows(view, group_layer, keys, values);
  for (const CloseItem& item : view.closes) {
    KVANT_CHECK(item.target.kind == kKindStored, "pages that stay BF16 are never staged");
    for (int head = 0; head < view.num_kv_heads; ++head) {
      stats += close_side(view, group_layer, item, head, keys);
      stats += close_side(view, group_layer, item, head, values);
    }
  }
  return stats;
}

Status decode_unit_side(const GroupView& view, PageEntry entry, int group_layer, int kv_head,
                        bool keys, Codec::Frame frame, float* rows) {
  const PageKind& kind = view.kinds[entry.kind];
  const SideFormat& format = (keys ? kind.k_format : kind.v_format)[group_layer];
  const SideShape shape{format, keys ? SideRole::kKeys : SideRole::kValues, view.page_tokens,
                        view.head_dim};
  const std::byte* unit = kind.unit(entry, group_layer, kv_head);
  if (entry.kind != kKindStored) {
    read_bf16_side(kind.layout, view.page_tokens, view.head_dim, unit, shape.role, view.page_tokens,
                   rows);
    return {};
  }
  KVANT_ASSIGN(const Codec codec, Codec::create(format, view.head_dim));
  const formats::SideBytes bytes = formats::side_bytes(format, view.page_tokens, view.head_dim);
  std::vector<uint8_t> codes(bytes.codes), scales(bytes.scales);
  std::vector<uint16_t> mean(format.mean ? view.head_dim : 0);
  convert_side(shape, kind.layout, side_of_unit(unit, kind.units[group_layer], shape),
               Layout::kPlanar, {codes.data(), scales.data(), format.mean ? mean.data() : nullptr});
  const LayerParams& params = view.layers[group_layer];
  codec.decode_page({codes.data(), scales.data(), format.mean ? mean.data() : nullptr},
                    view.page_tokens, (keys ? params.k : params.v)[kv_head], frame, rows);
  return {};
}

}  // namespace kvant::cache
