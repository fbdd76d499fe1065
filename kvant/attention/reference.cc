#include "kvant/attention/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/cache/layout.h"
#include "kvant/formats/codec.h"

namespace kvant::attention {

using cache::GroupView;
using cache::PageEntry;
using cache::PageKind;
using cache::SequenceView;
using formats::Codec;

namespace {

bool is_plain(uint32_t kind) {
  return kind == cache::kKindBf16 || kind == cache::kKindStaging;
}

// Keys (after RoPE) and values of one head's page, [page_tokens][head_dim].
struct DecodedPage {
  std::vector<double> k;
  std::vector<double> v;
};

void apply_rope(const RopeParams& rope, int64_t position, double* k) {
  const int half = rope.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    double frequency = std::pow(static_cast<double>(rope.base), -2.0 * i / rope.rotary_dim);
    if (rope.frequency_factors != nullptr) frequency /= rope.frequency_factors[i];
    const double angle = static_cast<double>(position) * rope.position_scale * frequency;
    const double c = std::cos(angle) * rope.attention_factor;
    const double s = std::sin(angle) * rope.attention_factor;
    const double x = k[i], y = k[i + half];
    k[i] = x * c - y * s;
    k[i + half] = x * s + y * c;
  }
}

class PageReader {
 public:
  PageReader(const ReferenceArgs& args, int kv_head)
      : args_(args), view_(*args.view), kv_head_(kv_head) {}

  // Codecs of every kind, so that decoding cannot fail later.
  Status prepare() {
    for (size_t kind = 0; kind < view_.kinds.size(); ++kind) {
      codecs_.emplace_back();
      if (is_plain(static_cast<uint32_t>(kind))) continue;
      const PageKind& k = view_.kinds[kind];
      KVANT_ASSIGN(Codec keys, Codec::create(k.k_format[args_.group_layer], view_.head_dim));
      KVANT_ASSIGN(Codec values, Codec::create(k.v_format[args_.group_layer], view_.head_dim));
      codecs_.back().emplace(Pair{std::move(keys), std::move(values)});
    }
    return {};
  }

  // `num_tokens`: how many tokens of the page have been written at least.
  const DecodedPage& read(PageEntry entry, int64_t page, int num_tokens) {
    KVANT_CHECK(entry.valid(), "a page that a query reads has a slot");
    DecodedPage& decoded = pages_[{page, is_plain(entry.kind)}];
    const auto wanted = static_cast<size_t>(num_tokens) * static_cast<size_t>(view_.head_dim);
    if (decoded.k.size() < wanted) decode(entry, page, num_tokens, decoded);
    return decoded;
  }

 private:
  struct Pair {
    Codec k;
    Codec v;
  };

  void decode(PageEntry entry, int64_t page, int num_tokens, DecodedPage& decoded) const {
    const PageKind& kind = view_.kinds[entry.kind];
    const int layer = args_.group_layer;
    const int d = view_.head_dim;
    const int tokens = view_.page_tokens;
    const std::byte* unit = kind.unit(entry, layer, kv_head_);
    std::vector<float> k(static_cast<size_t>(tokens) * d), v(k.size());
    if (is_plain(entry.kind)) {
      cache::read_bf16_side(kind.layout, tokens, d, unit, cache::SideRole::kKeys, num_tokens,
                            k.data());
      cache::read_bf16_side(kind.layout, tokens, d, unit, cache::SideRole::kValues, num_tokens,
                            v.data());
    } else {
      const Pair& codecs = *codecs_[entry.kind];
      const cache::UnitShape shape{codecs.k.side(), codecs.v.side(), tokens, d};
      const auto& sections = kind.units[layer];
      std::vector<std::byte> planar(static_cast<size_t>(sections.bytes));
      cache::convert_unit(shape, kind.layout, unit, cache::Layout::kPlanar, planar.data());
      const std::byte* bytes = planar.data();
      const auto& params = view_.layers[layer];
      codecs.k.decode_page(cache::side_of_unit(bytes, sections, shape.keys()), tokens,
                           params.k[kv_head_], Codec::Frame::kPlain, k.data());
      codecs.v.decode_page(cache::side_of_unit(bytes, sections, shape.values()), tokens,
                           params.v[kv_head_], Codec::Frame::kPlain, v.data());
    }
    const auto used = static_cast<int64_t>(num_tokens) * d;
    decoded.k.assign(k.begin(), k.begin() + used);
    decoded.v.assign(v.begin(), v.begin() + used);
    if (!view_.kinds[cache::kKindStored].k_format[layer].pre_rope) return;
    for (int t = 0; t < num_tokens; ++t) {
      apply_rope(args_.params.rope, page * tokens + t,
                 decoded.k.data() + static_cast<int64_t>(t) * d);
    }
  }

  const ReferenceArgs& args_;
  const GroupView& view_;
  const int kv_head_;
  std::vector<std::optional<Pair>> codecs_;  // by kind
  std::map<std::pair<int64_t, bool>, DecodedPage> pages_;
};

// One query row: its scores and the places of its values.
void attend(const ReferenceArgs& args, const SequenceView& seq, PageReader& reader,
            int64_t position, int head, const float* q, double* out) {
  const GroupView& view = *args.view;
  const AttentionParams& params = args.params;
  const int d = view.head_dim;
  const int64_t own_page = position / view.page_tokens;
  std::vector<double> scores;
  std::vector<const double*> values;
  for (int64_t j = 0; j <= position; ++j) {
    if (view.window > 0 && j <= position - view.window && j >= params.sink_tokens) continue;
    const int64_t page = j / view.page_tokens;
    const bool bf16 = own_page - page <= seq.recent_pages;
    const PageEntry entry = bf16 ? seq.bf16[page - seq.bf16_first_page] : seq.stored[page];
    const int64_t written = seq.first_position + seq.num_new_tokens - page * view.page_tokens;
    const DecodedPage& decoded =
        reader.read(entry, page, static_cast<int>(std::min<int64_t>(written, view.page_tokens)));
    const double* k = decoded.k.data() + (j % view.page_tokens) * d;
    double dot = 0.0;
    for (int c = 0; c < d; ++c) dot += static_cast<double>(q[c]) * k[c];
    dot *= params.scale;
    if (params.softcap > 0.0f) dot = params.softcap * std::tanh(dot / params.softcap);
    scores.push_back(dot);
    values.push_back(decoded.v.data() + (j % view.page_tokens) * d);
  }
  double max = *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  if (params.sink_logits != nullptr) {
    max = std::max(max, static_cast<double>(params.sink_logits[head]));
    sum = std::exp(params.sink_logits[head] - max);
  }
  std::fill_n(out, d, 0.0);
  for (size_t n = 0; n < scores.size(); ++n) {
    const double weight = std::exp(scores[n] - max);
    sum += weight;
    for (int c = 0; c < d; ++c) out[c] += weight * values[n][c];
  }
  for (int c = 0; c < d; ++c) out[c] /= sum;
}

}  // namespace

Status reference_attention(const ReferenceArgs& args) {
  const GroupView& view = *args.view;
  const int num_heads = args.params.num_query_heads;
  const int group = num_heads / view.num_kv_heads;
  for (const SequenceView& seq : view.sequences) {
    for (int kv_head = 0; kv_head < view.num_kv_heads; ++kv_head) {
      if (args.kv_head >= 0 && kv_head != args.kv_head) continue;
      PageReader reader(args, kv_head);
      KVANT_TRY(reader.prepare());
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int t = 0; t < seq.num_new_tokens; ++t) {
          const int64_t row =
              (static_cast<int64_t>(seq.first_row + t) * num_heads + head) * view.head_dim;
          attend(args, seq, reader, seq.first_position + t, head, args.q + row, args.out + row);
        }
      }
    }
  }
  return {};
}

double relative_l2(std::span<const float> x, std::span<const double> exact) {
  KVANT_CHECK(x.size() == exact.size(), "an error is that of vectors of one length");
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i])) return std::numeric_limits<double>::quiet_NaN();
    error += (x[i] - exact[i]) * (x[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  if (norm == 0.0) return error == 0.0 ? 0.0 : std::numeric_limits<double>::infinity();
  return std::sqrt(error / norm);
}

}  // namespace kvant::attention
