#include "kvant/backend/cpu/attention_task.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kvant/backend/cpu/page_decoder.h"
#include "kvant/base/check.h"
#include "kvant/formats/codec.h"

namespace kvant::backend::cpu {

using cache::GroupView;
using cache::PageEntry;
using cache::PageKind;
using formats::SideFormat;
using formats::SideParams;

namespace {

constexpr float kMinusInfinity = -__builtin_huge_valf();
// A position that reads all of any page as stored.
constexpr int64_t kBehindAllPages = int64_t{1} << 40;
// Decoded in registers for each tile of rows rather than once.
constexpr int kFewRows = 8;
// Keys of four bits or fewer are unpacked for tiles: with more channels that takes so long that the
// unit falls asleep meanwhile, and with a smaller group E2M1 is multiplied sooner as it is stored.
constexpr int kMaxTileChannels = 128;
constexpr int kMinTileGroup = 4;
// 64ths of what is fetched meanwhile that have been asked for when a pass ends: about its part
// of the time, so that lines are asked for evenly. All formats together are fastest with these.
constexpr int kFetchedByRounding = 5;  // where queries are rounded for each page
constexpr int kFetchedByScores = 22;
constexpr int kFetchedBySoftmax = 33;
constexpr int kFetchedByValues = 64;

// Open, sink, recent and staging pages hold plain values.
bool is_plain(uint32_t kind) {
  return kind == cache::kKindBf16 || kind == cache::kKindStaging;
}

const PageKind& stored_kind(const Call& call) {
  return call.view.kinds[cache::kKindStored];
}

bool is_untouched(const PartialRows& p, int row) {
  return p.max[row] == kMinusInfinity && p.sum[row] == 0.0f;
}

}  // namespace

// Rows [begin, end) of the item read one page in one way.
struct Task::Pass {
  PageEntry entry;
  int64_t page = 0;
  int row_begin = 0;
  int row_end = 0;
  int token_begin = 0;  // tokens of the page that some of the rows read
  int token_end = 0;
  bool all_see = false;  // all rows of the task all of the page, as stored

  int rows() const { return row_end - row_begin; }
  int num_tiles() const { return (token_end + 15) / 16; }
};

// The terms of rows that have none.
alignas(64) constexpr float kZeros[kMaxQueryRows] = {};

// What completes the products of queries and decoded keys.
struct Task::ScoreTerms {
  float multiplier = 1.0f;
  const float* offset = nullptr;
};

Task::Task(const Call& call, const AttentionItem& item, int64_t first_position,
           const WorkerMemory& memory)
    : call_(call),
      item_(item),
      sequence_(call.view.sequences[item.sequence]),
      first_position_(first_position),
      memory_(memory),
      stored_(sides_of(page_decoder(stored_kind(call).k_format[call.args.group_layer],
                                    call.k_params[item.kv_head], call.head_dim),
                       page_decoder(stored_kind(call).v_format[call.args.group_layer],
                                    call.v_params[item.kv_head], call.head_dim))),
      plain_(sides_of(PageDecoder{}, PageDecoder{})),
      all_in_tiles_(all_in_tiles()),
      unit_lines_(stored_kind(call).units[call.args.group_layer].bytes / 64),
      tile_rows_(rows() <= kMaxTileRows / 2 ? kMaxTileRows / 2 : kMaxTileRows) {}

Task::Task(const Call& call, const AttentionItem& item, const WorkerMemory& memory)
    : Task(call, item, call.view.sequences[item.sequence].first_position + item.token_begin,
           memory) {
  load_queries(sequence_.first_row + item.token_begin, item.num_tokens, 0);
}

Task::Task(const Call& call, const AttentionItem& item, std::span<const int32_t> sequences,
           const WorkerMemory& memory)
    : Task(call, item, kBehindAllPages, memory) {
  int token = 0;
  for (const int32_t s : sequences) {
    const cache::SequenceView& seq = call.view.sequences[s];
    load_queries(seq.first_row, seq.num_new_tokens, token);
    token += seq.num_new_tokens;
  }
}

Task::~Task() {
  if (tiles_begun_) call_.kernels.tiles->end();
}

void Task::load_queries(int64_t first_row, int num_tokens, int token_begin) {
  const auto* q = static_cast<const float*>(call_.args.q);
  const int64_t row_values = static_cast<int64_t>(call_.group) * call_.head_dim;
  const int64_t token_values =
      static_cast<int64_t>(call_.args.params.num_query_heads) * call_.head_dim;
  for (int t = 0; t < num_tokens; ++t) {
    std::memcpy(memory_.q_plain + (token_begin + t) * row_values,
                q + (first_row + t) * token_values + item_.kv_head * row_values,
                static_cast<size_t>(row_values) * sizeof(float));
  }
}

// Queries in the frame of stored keys: multiplied by the smoothing factors, rotated.
void Task::prepare_frame(const SideFormat& k_format, const SideParams& params) {
  const QueryFrame wanted{k_format.rotate, k_format.smooth, k_format.bias};
  if (frame_ready_ && frame_ == wanted) return;
  frame_ = wanted;
  frame_ready_ = true;
  packed_q_ = nullptr;
  rounded_block_ = 0;
  const int d = call_.head_dim;
  std::memcpy(memory_.q_stored, memory_.q_plain,
              static_cast<size_t>(rows()) * static_cast<size_t>(d) * sizeof(float));
  for (int r = 0; r < rows(); ++r) {
    float* q = memory_.q_stored + static_cast<int64_t>(r) * d;
    if (wanted.smooth && params.smooth != nullptr) {
      for (int c = 0; c < d; ++c) q[c] *= params.smooth[c];
    }
    if (wanted.rotate) formats::rotate_row(q, d);
  }
  if (wanted.bias && params.bias != nullptr) {
    call_.kernels.dot_rows(memory_.q_stored, rows(), d, params.bias, memory_.bias_dot);
  } else {
    std::fill_n(memory_.bias_dot, rows(), 0.0f);
  }
}

DecodeArgs Task::decode_args(const Pass& pass, const PageDecoder& decoder, const std::byte* codes,
                             const std::byte* scales) const {
  return {.codes = reinterpret_cast<const uint8_t*>(codes),
          .scales = reinterpret_cast<const uint8_t*>(scales),
          .code = decoder.code,
          .scale = decoder.scale,
          .block = decoder.block,
          .page_tokens = call_.view.page_tokens,
          .head_dim = call_.head_dim,
          .token_end = pass.token_end,
          .out = memory_.page,
          .scratch = memory_.scratch};
}

// Decoded keys to plain keys after RoPE.
void Task::finish_pre_rope(const Pass& pass, const SideFormat& format, const SideParams& params,
                           const uint16_t* mean, float factor) {
  const int half = call_.args.params.rope.rotary_dim / 2;
  const int64_t split_pages = attention::kSplitTokens / call_.view.page_tokens;
  if (factor != 1.0f) {  // terms are added to keys, which must have their magnitude
    const int64_t values = static_cast<int64_t>(call_.head_dim) * call_.view.page_tokens;
    for (int64_t i = 0; i < values; ++i) memory_.page[i] *= factor;
  }
  PreRopeArgs a;
  a.k = memory_.page;
  a.head_dim = call_.head_dim;
  a.page_tokens = call_.view.page_tokens;
  a.num_tiles = pass.num_tiles();
  if (!is_plain(pass.entry.kind)) {
    a.mean = mean;
    a.bias = format.bias ? params.bias : nullptr;
    a.rotated = format.rotate;
    a.smooth = format.smooth ? params.smooth : nullptr;
  }
  a.rotary_dim = 2 * half;
  a.page_cos = memory_.page_cos + pass.page % split_pages * half;
  a.page_sin = memory_.page_sin + pass.page % split_pages * half;
  a.token_cos = call_.rope.token_cos;
  a.token_sin = call_.rope.token_sin;
  call_.kernels.pre_rope(a);
}

// `dot` + q . mean + q . bias of the pass's rows.
const float* Task::add_terms(const Pass& pass, const float* q, const uint16_t* mean,
                             const float* dot) {
  if (mean == nullptr && !frame_.bias) return dot;
  const float* of_mean = kZeros;
  if (mean != nullptr) {
    for (int c = 0; c < call_.head_dim; ++c) {
      memory_.row[c] = std::bit_cast<float>(static_cast<uint32_t>(mean[c]) << 16);
    }
    call_.kernels.dot_rows(q, pass.rows(), call_.head_dim, memory_.row, memory_.dot);
    of_mean = memory_.dot;
  }
  const float* of_bias = memory_.bias_dot + pass.row_begin;
  for (int r = 0; r < pass.rows(); ++r) memory_.offset[r] = dot[r] + of_mean[r] + of_bias[r];
  return memory_.offset;
}

Task::ScoreTerms Task::score_page(const Pass& pass, const PageKind& kind, const std::byte* unit) {
  const int layer = call_.args.group_layer;
  const int d = call_.head_dim;
  const auto& sections = kind.units[layer];
  const SideFormat& format = kind.k_format[layer];
  const SideParams& params = call_.k_params[item_.kv_head];
  const bool plain_page = is_plain(pass.entry.kind);
  const Side& side = sides_of(pass).k;
  const PageDecoder& decoder = side.decoder;
  const auto* mean = plain_page || !format.mean
                         ? nullptr
                         : reinterpret_cast<const uint16_t*>(unit + sections.k_mean);

  const bool plain_query = plain_page || call_.pre_rope;
  if (!plain_query) prepare_frame(format, params);
  ScoreTerms terms;
  terms.multiplier = call_.args.params.scale * decoder.factor;
  terms.offset = kZeros;
  const float* q =
      (plain_query ? memory_.q_plain : memory_.q_stored) + static_cast<int64_t>(pass.row_begin) * d;
  if (side.way == Way::kIntegers) {
    terms.offset = add_terms(pass, q, mean, score_codes(pass, decoder, unit, sections));
    return terms;
  }
  const DecodeArgs codes =
      decode_args(pass, decoder, unit + sections.k_codes, unit + sections.k_scales);
  ScoreArgs a{.q = q,
              .k = memory_.page,
              .s = memory_.s,
              .rows = pass.rows(),
              .head_dim = d,
              .page_tokens = call_.view.page_tokens,
              .num_tiles = pass.num_tiles(),
              .fetch = part_of_next(0, kFetchedByScores),
              .q_tiles = nullptr,
              .tile_rows = tile_rows_};
  if (side.way == Way::kBf16) {
    a.q_tiles = pack_queries(q, pass.rows(), decoder.code);
    call_.kernels.bf16->scores(codes, a);
  } else if (!call_.pre_rope && pass.rows() <= kFewRows && decodes_in_registers(decoder)) {
    call_.kernels.scores_of_codes(codes, a);
  } else {
    call_.kernels.decode_k(codes);
    if (call_.pre_rope) {
      finish_pre_rope(pass, format, params, mean, decoder.factor);
      terms.multiplier = call_.args.params.scale;
    }
    call_.kernels.scores(a);
  }
  if (!plain_query) terms.offset = add_terms(pass, q, mean, kZeros);
  return terms;
}

// Scores from codes as they are stored. Returns q . zero of the channels, 0 if they have none.
const float* Task::score_codes(const Pass& pass, const PageDecoder& decoder, const std::byte* unit,
                               const formats::UnitSections& sections) {
  const auto* scales = reinterpret_cast<const uint8_t*>(unit + sections.k_scales);
  const bool per_channel = decoder.scale == PageScale::kChannelPair;
  // All fields: g++ 12 clears others by an instruction that takes tens of cycles to begin.
  IntegerScoreArgs a{.q = rounded_queries(pass, decoder, scales),
                     .codes = reinterpret_cast<const uint8_t*>(unit + sections.k_codes),
                     .scales = scales,
                     .code = decoder.code,
                     .scale = decoder.scale,
                     .block = per_channel ? call_.head_dim : decoder.block,
                     .s = memory_.s,
                     .rows = pass.rows(),
                     .head_dim = call_.head_dim,
                     .page_tokens = call_.view.page_tokens,
                     .num_tiles = pass.num_tiles(),
                     .scratch = reinterpret_cast<uint8_t*>(memory_.page),
                     .tile_rows = tile_rows_,
                     .fetch = part_of_next(per_channel ? kFetchedByRounding : 0, kFetchedByScores)};
  if (per_channel && integers_in_tiles(pass.rows())) {
    call_.kernels.tiles->channel_scores(a);
  } else {
    call_.kernels.integer->scores(a);
  }
  return per_channel ? a.q.sum : kZeros;
}

// E2M1 keys are in tiles where values can be. (Prompts must have the bits of decode.)
Task::Sides Task::sides_of(const PageDecoder& k, const PageDecoder& v) const {
  const auto takes = [&](const PageDecoder& decoder) {
    return call_.kernels.bf16 != nullptr &&
           in_bf16(decoder, call_.head_dim, call_.view.page_tokens);
  };
  const bool integers = call_.kernels.integer != nullptr;
  const bool e2m1 = k.code == Code::kE2m1 && k.scale == PageScale::kE4m3;
  const bool beside_tiles = call_.kernels.tiles != nullptr && takes(PageDecoder{}) &&
                            (takes(v) || (integer_values(v) && call_.group >= kMinTileGroup &&
                                          call_.head_dim <= kMaxTileChannels));
  Sides sides{{k, Way::kFloats}, {v, Way::kFloats}};
  if (!call_.pre_rope) {
    if (e2m1 ? beside_tiles : takes(k)) {
      sides.k.way = Way::kBf16;
    } else if (integers && integer_keys(k)) {
      sides.k.way = Way::kIntegers;
    }
  }
  if (takes(v)) {
    sides.v.way = Way::kBf16;
  } else if (integers && integer_values(v)) {
    sides.v.way = Way::kIntegers;
  }
  return sides;
}

const Task::Sides& Task::sides_of(const Pass& pass) const {
  return is_plain(pass.entry.kind) ? plain_ : stored_;
}

// Whether tiles have both sides of stored pages for any number of rows.
bool Task::all_in_tiles() const {
  if (call_.kernels.tiles == nullptr || call_.pre_rope) return false;
  const bool channels =
      stored_.k.decoder.scale == PageScale::kChannelPair && call_.head_dim <= kMaxTileChannels;
  return (channels || stored_.k.way == Way::kBf16) && stored_.v.way != Way::kFloats;
}

// Integers for few rows are in tiles only if the other side is, too: the unit falls asleep after
// two thousand cycles without a product and takes a thousand to wake up.
bool Task::integers_in_tiles(int rows) const {
  return all_in_tiles_ || (rows > kFewRows && call_.kernels.tiles != nullptr);
}

// Rows `q` as tiles, unless they are already.
const uint8_t* Task::pack_queries(const float* q, int rows, Code code) {
  if (packed_q_ != q || packed_rows_ != rows || packed_code_ != code) {
    call_.kernels.bf16->pack_queries(q, rows, call_.head_dim, code, tile_rows_, memory_.q_tiles);
    packed_q_ = q;
    packed_rows_ = rows;
    packed_code_ = code;
  }
  return memory_.q_tiles;
}

// The pass's rows of q_integer. Scales per channel make them a matter of each page.
IntegerRows Task::rounded_queries(const Pass& pass, const PageDecoder& decoder,
                                  const uint8_t* scales) {
  const auto round = [&](const float* q, int rows, int block, const uint8_t* channel, int tile_rows,
                         const FetchPart& fetch) {
    call_.kernels.integer->round_queries({.q = q,
                                          .rows = rows,
                                          .head_dim = call_.head_dim,
                                          .code = decoder.code,
                                          .block = block,
                                          .channel = channel,
                                          .tile_rows = tile_rows,
                                          .out = memory_.q_integer,
                                          .fetch = fetch});
  };
  if (decoder.scale == PageScale::kChannelPair) {
    rounded_block_ = 0;
    round(memory_.q_stored + static_cast<int64_t>(pass.row_begin) * call_.head_dim, pass.rows(),
          call_.head_dim, scales, integers_in_tiles(pass.rows()) ? tile_rows_ : 0,
          part_of_next(0, kFetchedByRounding));
    return memory_.q_integer;
  }
  if (rounded_block_ != decoder.block || rounded_code_ != decoder.code) {
    rounded_block_ = decoder.block;
    rounded_code_ = decoder.code;
    round(memory_.q_stored, rows(), decoder.block, nullptr, 0, {});
  }
  return rows_from(memory_.q_integer, pass.row_begin, call_.head_dim);
}

void Task::run_pass(const Pass& pass, const PartialRows& out) {
  const GroupView& view = call_.view;
  const int layer = call_.args.group_layer;
  const int d = call_.head_dim;
  const PageKind& kind = view.kinds[pass.entry.kind];
  const std::byte* unit = kind.unit(pass.entry, layer, item_.kv_head);
  look_ahead(pass.page);
  const SideFormat& v_format = kind.v_format[layer];
  const bool plain_page = is_plain(pass.entry.kind);
  const Side& side = sides_of(pass).v;
  const ScoreTerms terms = score_page(pass, kind, unit);

  const PartialRows rows_out = rows_from(out, pass.row_begin);
  const SoftmaxArgs softmax{
      .s = memory_.s,
      .rows = pass.rows(),
      .page_tokens = view.page_tokens,
      .num_tiles = pass.num_tiles(),
      .group = call_.group,
      .first_position = first_position() + (pass.all_see ? 0 : pass.row_begin / call_.group),
      .page_begin = pass.page * view.page_tokens,
      .all_see = pass.all_see,
      .window = view.window,
      .sink_tokens = call_.args.params.sink_tokens,
      .multiplier = terms.multiplier,
      .offset = terms.offset,
      .offset_scale = call_.args.params.scale,
      .softcap = call_.args.params.softcap,
      .weight_scale = side.decoder.factor,
      .max = rows_out.max,
      .sum = rows_out.sum,
      .share = rows_out.share,
      .add_to_share = !plain_page && v_format.bias,
      .factor = memory_.factor,
      .fetch = part_of_next(kFetchedByScores, kFetchedBySoftmax)};
  call_.kernels.softmax(softmax);

  const bool rotated = call_.rotated_v && !plain_page && v_format.rotate;
  PartialRows target = rows_out;
  target.acc += rotated ? d : 0;
  add_values(pass, side, unit, target);
  if (call_.rotated_v) {  // the other accumulator follows the new maximum too
    call_.kernels.scale_rows(rows_out.acc + (rotated ? 0 : d), rows_out.stride, pass.rows(), d,
                             memory_.factor);
  }
}

// Adds the weights in memory_.s times the page's values to out.acc.
void Task::add_values(const Pass& pass, const Side& side, const std::byte* unit,
                      const PartialRows& out) {
  const auto& sections = call_.view.kinds[pass.entry.kind].units[call_.args.group_layer];
  const PageDecoder& decoder = side.decoder;
  if (side.way == Way::kIntegers) {
    const IntegerValueArgs a{.p = memory_.s,
                             .codes = reinterpret_cast<const uint8_t*>(unit + sections.v_codes),
                             .scales = reinterpret_cast<const uint8_t*>(unit + sections.v_scales),
                             .scale = decoder.scale,
                             .factor = memory_.factor,
                             .acc = out.acc,
                             .acc_stride = out.stride,
                             .rows = pass.rows(),
                             .head_dim = call_.head_dim,
                             .page_tokens = call_.view.page_tokens,
                             .num_tiles = pass.num_tiles(),
                             .scratch = memory_.integer_scratch,
                             .unpacked = reinterpret_cast<uint8_t*>(memory_.page),
                             .tile_rows = tile_rows_,
                             .fetch = part_of_next(kFetchedBySoftmax, kFetchedByValues)};
    if (integers_in_tiles(pass.rows())) {
      call_.kernels.tiles->integer_values(a);
    } else {
      call_.kernels.integer->values(a);
    }
    return;
  }
  const DecodeArgs codes =
      decode_args(pass, decoder, unit + sections.v_codes, unit + sections.v_scales);
  const ValueArgs a{.p = memory_.s,
                    .v = memory_.page,
                    .factor = memory_.factor,
                    .acc = out.acc,
                    .acc_stride = out.stride,
                    .rows = pass.rows(),
                    .head_dim = call_.head_dim,
                    .page_tokens = call_.view.page_tokens,
                    .token_begin = pass.token_begin,
                    .token_end = pass.token_end,
                    .fetch = part_of_next(kFetchedBySoftmax, kFetchedByValues),
                    .tile_rows = tile_rows_};
  if (side.way == Way::kBf16) {  // tokens before token_begin weigh 0
    call_.kernels.bf16->values(codes, a);
    return;
  }
  if (pass.token_begin == 0 && pass.rows() <= kFewRows && decodes_in_registers(decoder)) {
    call_.kernels.values_of_codes(codes, a);
    return;
  }
  call_.kernels.decode_v(codes);
  call_.kernels.values(a);
}

PageEntry Task::entry_of(int64_t page, bool bf16) const {
  const PageEntry entry =
      bf16 ? sequence_.bf16[page - sequence_.bf16_first_page] : sequence_.stored[page];
  KVANT_CHECK(entry.valid(), "a page that a query reads has a slot");
  return entry;
}

// The rows at positions [first, end) that read something of `page`: none if rows() is 0.
Task::Pass Task::visible_part(int64_t page, int64_t first, int64_t end) const {
  const GroupView& view = call_.view;
  const int64_t page_begin = page * view.page_tokens;
  const bool has_sinks = page_begin < call_.args.params.sink_tokens;
  first = std::max(first, page_begin);
  if (view.window > 0 && !has_sinks) {
    end = std::min(end, page_begin + view.page_tokens - 1 + view.window);
  }
  Pass pass;
  pass.page = page;
  if (end <= first) return pass;
  pass.row_begin = static_cast<int>(first - first_position()) * call_.group;
  pass.row_end = static_cast<int>(end - first_position()) * call_.group;
  pass.token_end = static_cast<int>(std::min<int64_t>(view.page_tokens, end - page_begin));
  if (view.window > 0 && !has_sinks) {
    pass.token_begin = static_cast<int>(std::max<int64_t>(0, first - view.window + 1 - page_begin));
  }
  return pass;
}

bool Task::sees_split(int64_t split) const {
  const int64_t begin = split * attention::kSplitTokens;
  return call_.view.window == 0 || begin < call_.args.params.sink_tokens ||
         begin + attention::kSplitTokens > first_position() - call_.view.window + 1;
}

void Task::split_rope(int64_t split) {
  const attention::RopeParams& rope = call_.args.params.rope;
  const int half = rope.rotary_dim / 2;
  const int64_t pages = attention::kSplitTokens / call_.view.page_tokens;
  for (int i = 0; i < half; ++i) {
    const double angle = static_cast<double>(split * attention::kSplitTokens) * call_.rope.angle[i];
    double c = std::cos(angle), s = std::sin(angle);
    const double step_c = call_.rope.page_step[2 * i], step_s = call_.rope.page_step[2 * i + 1];
    for (int64_t p = 0; p < pages; ++p) {
      memory_.page_cos[p * half + i] = static_cast<float>(c * rope.attention_factor);
      memory_.page_sin[p * half + i] = static_cast<float>(s * rope.attention_factor);
      const double next_c = c * step_c - s * step_s;
      s = s * step_c + c * step_s;
      c = next_c;
    }
  }
}

void Task::run_split(int64_t split, const PartialRows& out) {
  const GroupView& view = call_.view;
  std::fill_n(out.max, rows(), kMinusInfinity);
  std::fill_n(out.sum, rows(), 0.0f);
  std::fill_n(out.share, rows(), 0.0f);
  if (!sees_split(split)) return;
  for (int r = 0; r < rows(); ++r) std::fill_n(out.acc + r * out.stride, call_.width(), 0.0f);
  if (call_.pre_rope) split_rope(split);
  if (call_.kernels.tiles != nullptr && !tiles_begun_) {
    call_.kernels.tiles->begin(tile_rows_);
    tiles_begun_ = true;
  }
  const int64_t first = first_position();
  const int64_t end = first + item_.num_tokens;
  const int64_t page_begin = split * attention::kSplitTokens / view.page_tokens;
  const int64_t page_end = std::min((split + 1) * attention::kSplitTokens / view.page_tokens,
                                    (end - 1) / view.page_tokens + 1);
  for (int64_t page = page_begin; page < page_end; ++page) {
    const int64_t boundary = boundary_of(page);
    if (boundary <= first && view.window == 0) {  // the rule: all rows read all of it as stored
      run_pass({.entry = entry_of(page, false),
                .page = page,
                .row_begin = 0,
                .row_end = rows(),
                .token_begin = 0,
                .token_end = view.page_tokens,
                .all_see = true},
               out);
      continue;
    }
    for (const bool bf16 : {true, false}) {
      Pass pass = bf16 ? visible_part(page, first, std::min(end, boundary))
                       : visible_part(page, std::max(first, boundary), end);
      if (pass.rows() <= 0) continue;
      pass.entry = entry_of(page, bf16);
      run_pass(pass, out);
    }
  }
}

void Task::clear_total(const PartialRows& total) const {
  for (int r = 0; r < rows(); ++r) std::fill_n(total.acc + r * total.stride, call_.width(), 0.0f);
  std::fill_n(total.max, rows(), kMinusInfinity);
  std::fill_n(total.sum, rows(), 0.0f);
  std::fill_n(total.share, rows(), 0.0f);
}

void Task::copy_split(const PartialRows& to, const PartialRows& split) const {
  for (int r = 0; r < rows(); ++r) {
    to.max[r] = split.max[r];
    to.sum[r] = split.sum[r];
    to.share[r] = split.share[r];
    if (!is_untouched(split, r)) {
      std::copy_n(split.acc + r * split.stride, call_.width(), to.acc + r * to.stride);
    }
  }
}

void Task::merge_split(const PartialRows& total, const PartialRows& split) const {
  for (int r = 0; r < rows();) {
    if (is_untouched(split, r)) {
      ++r;
      continue;
    }
    int end = r + 1;
    while (end < rows() && !is_untouched(split, end)) ++end;
    call_.kernels.merge(rows_from(total, r), rows_from(split, r), end - r, call_.width());
    r = end;
  }
}

void Task::write_rows(const PartialRows& total) const {
  const AttentionArgs& args = call_.args;
  const int d = call_.head_dim;
  const float* bias = call_.v_params[item_.kv_head].bias;
  const int64_t first_row = sequence_.first_row + item_.token_begin;
  for (int r = 0; r < rows(); ++r) {
    const int head = item_.kv_head * call_.group + r % call_.group;
    const int64_t row = first_row + r / call_.group;
    float* out = static_cast<float*>(args.out) + (row * args.params.num_query_heads + head) * d;
    float* acc = total.acc + r * total.stride;
    float sum = total.sum[r];
    float scale = 1.0f;
    if (args.params.sink_logits != nullptr) {
      const float sink = args.params.sink_logits[head];
      const float max = std::max(total.max[r], sink);
      scale = std::exp(total.max[r] - max);
      sum = sum * scale + std::exp(sink - max);
    }
    float* terms = call_.rotated_v ? acc + d : acc;
    if (total.share[r] != 0.0f && bias != nullptr) {
      for (int c = 0; c < d; ++c) terms[c] += bias[c] * total.share[r];
    }
    if (call_.rotated_v) {
      formats::rotate_row(terms, d);
      for (int c = 0; c < d; ++c) acc[c] += terms[c];
    }
    const float inverse = scale / sum;
    for (int c = 0; c < d; ++c) out[c] = acc[c] * inverse;
  }
}

}  // namespace kvant::backend::cpu
