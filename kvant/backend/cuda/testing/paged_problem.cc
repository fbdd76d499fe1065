#include "kvant/backend/cuda/testing/paged_problem.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>

#include "kvant/attention/reference.h"
#include "kvant/base/check.h"
#include "kvant/cache/layout.h"
#include "kvant/formats/codec.h"

namespace kvant::backend::cuda::testing {
namespace {

using cache::Layout;
using cache::PageEntry;
using cache::SideRole;

void check(cudaError_t error) {
  KVANT_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

float gaussian(uint64_t& state) {
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    sum += static_cast<float>(state >> 40) * (1.0f / 16777216.0f) - 0.5f;
  }
  return sum * 1.7320508f;  // four uniforms of variance 1/12
}

}  // namespace

// Pages of one kind.
struct PagedProblem::Slab {
  formats::SideFormat k, v;
  formats::UnitSections unit;
  int64_t layer_offset = 0;
  std::vector<std::byte> bytes;
  std::byte* device = nullptr;

  cache::PageKind kind(std::byte* base, int num_kv_heads) {
    cache::PageKind kind;
    kind.base = base;
    kind.page_bytes = unit.bytes * num_kv_heads;
    kind.layout = Layout::kSm90;
    kind.layer_offset = {&layer_offset, 1};
    kind.units = {&unit, 1};
    kind.k_format = {&k, 1};
    kind.v_format = {&v, 1};
    return kind;
  }
};

PagedProblem::PagedProblem(const ProblemOptions& options) : options_(options) {
  random_ = options.seed;
  const Result<formats::CacheFormat> format = formats::parse_cache_format(options.kv);
  KVANT_CHECK(format.has_value(), "a test names a format that exists");
  format_ = *format;
  for (int kind = 0; kind < 2; ++kind) {
    slabs_[kind] = std::make_unique<Slab>();
    Slab& slab = *slabs_[kind];
    if (kind == cache::kKindStored) slab.k = format_.k, slab.v = format_.v;
    slab.unit = formats::unit_sections(slab.k, slab.v, options.page_tokens, options.head_dim);
  }
  fill_terms();
  for (size_t i = 0; i < options.lengths.size(); ++i) {
    add_sequence(options.lengths[i], options.new_tokens[std::min(i, options.new_tokens.size() - 1)],
                 i < options.prefixes.size() ? options.prefixes[i] : ProblemOptions::Prefix{});
  }
  fill_rows();
  mirror();
}

PagedProblem::~PagedProblem() {
  for (auto& slab : slabs_) cudaFree(slab->device);
  cudaFree(device_q_);
  cudaFree(device_out_);
  cudaFree(device_sinks_);
  cudaFree(device_rope_);
}

// What a plan gives formats with +bias and +smooth.
void PagedProblem::fill_terms() {
  const auto dim = static_cast<size_t>(options_.head_dim);
  const auto heads = static_cast<size_t>(options_.num_kv_heads);
  uint64_t state = 12345;
  terms_.resize(2 * heads * 2 * dim);
  for (size_t i = 0; i < terms_.size(); ++i) {
    const float x = gaussian(state);
    terms_[i] = i / dim % 2 == 0 ? 0.3f * x : std::exp2(0.5f * x);
  }
  for (size_t side = 0; side < 2; ++side) {
    const formats::SideFormat& format = side == 0 ? format_.k : format_.v;
    params_[side].resize(heads);
    for (size_t head = 0; head < heads; ++head) {
      const float* bias = terms_.data() + (side * heads + head) * 2 * dim;
      if (format.bias) params_[side][head].bias = bias;
      if (format.smooth) params_[side][head].smooth = bias + dim;
    }
  }
}

// Tokens of one page into a new slot, every head with values of its own.
void PagedProblem::write_page(int64_t first_token, int64_t num_tokens, bool stored,
                              PageEntry entry) {
  Slab& slab = *slabs_[stored ? cache::kKindStored : cache::kKindBf16];
  const int64_t page_bytes = slab.unit.bytes * options_.num_kv_heads;
  const size_t end = static_cast<size_t>((entry.slot + 1) * page_bytes);
  if (slab.bytes.size() < end) slab.bytes.resize(end, std::byte{0xff});
  const int dim = options_.head_dim;
  const int tokens = options_.page_tokens;
  for (int head = 0; head < options_.num_kv_heads; ++head) {
    // The same values whichever kind the page has: some pages are in both tables.
    uint64_t state = options_.seed * 977 + tables_.size() * 7919 +
                     static_cast<uint64_t>(first_token) * 131 + static_cast<uint64_t>(head);
    std::vector<float> k(static_cast<size_t>(tokens) * dim), v(k.size());
    for (int t = 0; t < tokens; ++t) {
      const float rise = options_.rising ? static_cast<float>(first_token + t) * 0.01f : 0.0f;
      for (int c = 0; c < dim; ++c) {
        const float channel = std::sin(static_cast<float>(c * 7 + head));
        k[t * dim + c] = gaussian(state) + 0.5f * channel + rise;
        v[t * dim + c] = gaussian(state) + 0.3f * channel;
      }
    }
    std::byte* unit = slab.bytes.data() + entry.slot * page_bytes + head * slab.unit.bytes;
    if (!stored) {
      for (int t = 0; t < num_tokens; ++t)
        cache::write_f32_token(Layout::kSm90, tokens, dim, unit, t, &k[t * dim], &v[t * dim]);
      continue;
    }
    // Closing reads the BF16 values of the open page.
    std::vector<std::byte> open(static_cast<size_t>(slabs_[cache::kKindBf16]->unit.bytes));
    std::vector<std::byte> planar(static_cast<size_t>(slab.unit.bytes));
    for (int t = 0; t < tokens; ++t)
      cache::write_f32_token(Layout::kPlanar, tokens, dim, open.data(), t, &k[t * dim],
                             &v[t * dim]);
    const cache::UnitShape shape{slab.k, slab.v, tokens, dim};
    for (const SideRole role : {SideRole::kKeys, SideRole::kValues}) {
      const bool keys = role == SideRole::kKeys;
      cache::read_bf16_side(Layout::kPlanar, tokens, dim, open.data(), role, tokens, k.data());
      const auto codec = formats::Codec::create(keys ? slab.k : slab.v, dim);
      KVANT_CHECK(codec.has_value(), "a parsed format has a codec");
      codec->encode_page(
          k.data(), tokens, params_[keys ? 0 : 1][static_cast<size_t>(head)],
          cache::side_of_unit(planar.data(), slab.unit, keys ? shape.keys() : shape.values()));
    }
    cache::convert_unit(shape, Layout::kPlanar, planar.data(), Layout::kSm90, unit);
  }
}

void PagedProblem::add_sequence(int64_t length, int new_tokens,
                                const ProblemOptions::Prefix& prefix) {
  const int tokens = options_.page_tokens;
  const int64_t first = length - new_tokens;
  const int64_t last_page = (length - 1) / tokens;
  const int64_t recent = (format_.recent_tokens + tokens - 1) / tokens;
  cache::SequenceView view;
  view.first_row = static_cast<int32_t>(num_rows_);
  view.num_new_tokens = new_tokens;
  view.first_position = first;
  view.recent_pages = static_cast<int32_t>(recent);
  if (options_.window > 0 && options_.params.sink_tokens == 0)
    view.first_page = std::max<int64_t>(0, first - options_.window + 1) / tokens;
  view.bf16_first_page = std::max(view.first_page, first / tokens - recent);
  num_rows_ += new_tokens;
  const int64_t shared_pages = prefix.tokens / tokens;
  KVANT_CHECK(shared_pages <= view.bf16_first_page, "shared pages are closed");

  const auto slot = [&](bool stored) {
    const Slab& slab = *slabs_[stored ? cache::kKindStored : cache::kKindBf16];
    return static_cast<uint32_t>(slab.bytes.size()) /
           static_cast<uint32_t>(slab.unit.bytes * options_.num_kv_heads);
  };
  std::vector<PageEntry> stored_table, bf16_table;
  for (int64_t page = 0; page <= last_page; ++page) {
    const int64_t num_tokens = std::min<int64_t>(tokens, length - page * tokens);
    if (page < view.first_page) {
      stored_table.push_back(PageEntry::none());
      continue;
    }
    if (page < shared_pages) {
      stored_table.push_back(tables_[2 * static_cast<size_t>(prefix.parent)][page]);
      continue;
    }
    if (page < last_page) {
      const bool bf16 = (page == 0 && format_.sink) || format_.is_bf16();
      stored_table.push_back(
          PageEntry::make(bf16 ? cache::kKindBf16 : cache::kKindStored, slot(!bf16)));
      write_page(page * tokens, num_tokens, !bf16, stored_table.back());
    }
    if (page >= view.bf16_first_page) {
      bf16_table.push_back(PageEntry::make(cache::kKindBf16, slot(false)));
      write_page(page * tokens, num_tokens, false, bf16_table.back());
    }
  }
  stored_table.push_back(PageEntry::none());
  tables_.push_back(std::move(stored_table));
  tables_.push_back(std::move(bf16_table));
  sequences_.push_back(view);
}

void PagedProblem::fill_rows() {
  const int heads = options_.num_kv_heads * options_.group;
  options_.params.num_query_heads = heads;
  options_.params.scale = 1.0f / std::sqrt(static_cast<float>(options_.head_dim));
  q_.resize(static_cast<size_t>(num_rows_) * heads * options_.head_dim);
  for (float& x : q_) x = gaussian(random_) * options_.score_deviation;
  if (options_.rising) {  // along the direction in which keys grow
    for (float& x : q_) x = std::abs(x) * 0.2f;
  }
}

void PagedProblem::mirror() {
  layer_ = {params_[0], params_[1]};
  for (int kind = 0; kind < 2; ++kind) {
    Slab& slab = *slabs_[kind];
    check(cudaMalloc(reinterpret_cast<void**>(&slab.device), slab.bytes.size() + 128));
    check(cudaMemcpy(slab.device, slab.bytes.data(), slab.bytes.size(), cudaMemcpyHostToDevice));
    kinds_.push_back(slab.kind(slab.bytes.data(), options_.num_kv_heads));
    device_kinds_.push_back(slab.kind(slab.device, options_.num_kv_heads));
  }
  for (size_t i = 0; i < sequences_.size(); ++i) {
    sequences_[i].stored = tables_[2 * i].data();
    sequences_[i].bf16 = tables_[2 * i + 1].data();
  }
  view_.page_tokens = options_.page_tokens;
  view_.num_kv_heads = options_.num_kv_heads;
  view_.head_dim = options_.head_dim;
  view_.window = options_.window;
  view_.sequences = sequences_;
  view_.layers = {&layer_, 1};
  device_view_ = view_;
  view_.kinds = kinds_;
  device_view_.kinds = device_kinds_;

  const size_t bytes = q_.size() * sizeof(float);
  check(cudaMalloc(reinterpret_cast<void**>(&device_q_), bytes));
  check(cudaMalloc(reinterpret_cast<void**>(&device_out_), bytes));
  check(cudaMemcpy(device_q_, q_.data(), bytes, cudaMemcpyHostToDevice));
  device_args_ = {
      .view = &device_view_, .params = options_.params, .q = device_q_, .out = device_out_};
  if (const float* sinks = options_.params.sink_logits; sinks != nullptr) {
    const size_t sink_bytes = sizeof(float) * static_cast<size_t>(options_.params.num_query_heads);
    check(cudaMalloc(reinterpret_cast<void**>(&device_sinks_), sink_bytes));
    check(cudaMemcpy(device_sinks_, sinks, sink_bytes, cudaMemcpyHostToDevice));
    device_args_.params.sink_logits = device_sinks_;
  }
  if (const float* factors = options_.params.rope.frequency_factors; factors != nullptr) {
    const size_t bytes_of =
        sizeof(float) * static_cast<size_t>(options_.params.rope.rotary_dim / 2);
    check(cudaMalloc(reinterpret_cast<void**>(&device_rope_), bytes_of));
    check(cudaMemcpy(device_rope_, factors, bytes_of, cudaMemcpyHostToDevice));
    device_args_.params.rope.frequency_factors = device_rope_;
  }
  poison_output();
}

void PagedProblem::poison_output() {
  check(cudaMemset(device_out_, 0xff, q_.size() * sizeof(float)));
}

std::vector<float> PagedProblem::download() const {
  std::vector<float> out(q_.size());
  check(cudaMemcpy(out.data(), device_out_, out.size() * sizeof(float), cudaMemcpyDeviceToHost));
  return out;
}

double PagedProblem::error_of(const std::vector<float>& out) const {
  std::vector<double> exact(q_.size());
  const Status status = attention::reference_attention(
      {.view = &view_, .params = options_.params, .q = q_.data(), .out = exact.data()});
  KVANT_CHECK(status.has_value(), "the reference knows every format");
  return attention::relative_l2(out, exact);
}

}  // namespace kvant::backend::cuda::testing
