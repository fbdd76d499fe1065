#include "kvant/model/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kvant/base/check.h"
#include "kvant/model/blocks.h"
#include "kvant/model/identity.h"
#include "kvant/model/memory_plan.h"
#include "kvant/model/random_rows.h"
#include "kvant/model/weights.h"

namespace kvant::model {
namespace {

// The parts of a step that Backend::repeat() is given: what comes before the attention of layer
// `part`, and two ends.
constexpr int64_t kEndOfAllRows = -1;
constexpr int64_t kEndOfWantedRows = -2;

}  // namespace

struct Model::State {
  std::unique_ptr<ModelSource> source;
  backend::Backend* backend = nullptr;
  ModelWeights weights;  // may read the bytes of `source`

  // Since reserve().
  bool reserved = false;
  RuntimeOptions runtime;
  Buffer activation_buffer;
  Activations activations;
  // Filled per step, never grown.
  std::vector<int64_t> positions;          // [max_step_tokens]
  std::vector<int32_t> ids;                // [max_step_tokens]
  std::vector<int64_t> wanted_rows;        // rows whose logits are wanted
  std::vector<uint8_t> only_greatest;      // of wanted_rows
  std::vector<backend::RowQuery> queries;  // the same; kGreatest: none
  std::vector<cache::StepSequence> step_sequences;
  Buffer host_rows;                           // HostRowBytes
  float* host_logits = nullptr;               // there, or null: the backend's can be read
  backend::RowMaximum* maxima = nullptr;      // there, or in own_maxima
  backend::RowQuery* turn_queries = nullptr;  // there, if the backend has queries
  backend::RowAnswers answers;                // the same
  std::vector<backend::RowMaximum> own_maxima;
  std::vector<LogitsRow> turn;  // rows that are computed at once

  LayerObserver observer;                                 // may be empty
  std::vector<float> observed_q, observed_k, observed_v;  // LayerRows

  const ModelConfig& config() const { return source->config(); }
  Status collect(std::span<const ForwardSequence> sequences, const cache::KvCache& cache);
  Status observe(const StepContext& step, int layer);
  Status run_layers(const cache::KvCache& cache, const std::atomic<bool>* cancel, Activations& act);
  Status check_room(const cache::KvCache& cache, cache::SequenceId id, int64_t new_tokens) const;
  Status check_appended();
  Status append_rows(const cache::KvCache& cache, RandomRows& rows);
  template <typename Work>
  Status transact(cache::KvCache& cache, const Work& work);
  Status repeat(int64_t part, int64_t num_rows, const std::function<Status()>& enqueue);
  Status run_head(const Activations& act, const RowsSink& sink);
  Result<float*> fetch_logits(void* device_logits, int64_t first, int64_t num_rows);
  Result<bool> ask(void* device_logits, int64_t first, int64_t count);
  Status read_turn(void* device_logits, int64_t first, int64_t count);
  void cap(std::span<float> logits) const;
  Status step(const cache::KvCache& cache, const RowsSink& sink, const std::atomic<bool>* cancel);
};

Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::load(std::unique_ptr<ModelSource> source,
                                           backend::Backend& backend, const LoadOptions& options) {
  std::unique_ptr<Model> model(new Model());
  model->state_ = std::make_unique<State>();
  State& state = *model->state_;
  state.source = std::move(source);
  state.backend = &backend;
  KVANT_ASSIGN(state.weights, load_weights(*state.source, backend, options.progress));
  return model;
}

const ModelConfig& Model::config() const {
  return state_->config();
}
const ModelSource& Model::source() const {
  return *state_->source;
}
backend::Backend& Model::backend() const {
  return *state_->backend;
}
int Model::max_step_tokens() const {
  return step_tokens(state_->runtime);
}
int Model::max_sequences() const {
  return state_->runtime.max_sequences;
}
int64_t Model::context_tokens() const {
  return state_->runtime.context_tokens;
}

void Model::set_observer(LayerObserver observer) {
  state_->observer = std::move(observer);
}

Status Model::reserve(const RuntimeOptions& runtime) {
  KVANT_TRY(check_runtime(runtime));
  State& state = *state_;
  const ModelConfig& config = state.config();
  backend::Backend& backend = *state.backend;
  KVANT_TRY(backend.supports(runtime.format, config.head_dim, config.query_heads_per_kv_head()));
  state.reserved = false;
  state.activation_buffer = Buffer();  // first give back, then ask
  const int rows = step_tokens(runtime);
  const backend::ActivationType type = backend.info().activation_type;
  KVANT_ASSIGN(state.activation_buffer,
               Buffer::create(
                   backend.memory(),
                   layout_activations(config, type, rows, runtime.max_logit_rows, nullptr, nullptr),
                   MemoryUse::kWorkspace));
  layout_activations(config, type, rows, runtime.max_logit_rows, state.activation_buffer.data(),
                     &state.activations);
  state.host_rows = Buffer();
  state.host_logits = nullptr;
  if (const HostRowBytes bytes = host_row_bytes(config, backend, runtime); bytes.total() > 0) {
    KVANT_ASSIGN(state.host_rows,
                 Buffer::create(backend.memory(), bytes.total(), MemoryUse::kTables));
    std::byte* at = state.host_rows.data();
    state.maxima = reinterpret_cast<backend::RowMaximum*>(at);
    state.turn_queries = reinterpret_cast<backend::RowQuery*>(at += bytes.maxima);
    state.answers.maxima = state.maxima;
    state.answers.choices = reinterpret_cast<backend::RowChoice*>(at += bytes.queries);
    state.answers.candidates = reinterpret_cast<backend::RowMaximum*>(at += bytes.choices);
    state.host_logits = reinterpret_cast<float*>(at += bytes.candidates);
    state.answers.values = state.host_logits;
  } else {
    state.own_maxima.resize(static_cast<size_t>(runtime.max_logit_rows));
    state.maxima = state.own_maxima.data();
  }
  KVANT_TRY(backend.reserve_workspace(workspace_needs(config, runtime)));
  state.positions.reserve(rows);
  state.ids.reserve(rows);
  state.wanted_rows.reserve(rows);
  state.only_greatest.reserve(rows);
  state.queries.reserve(rows);
  state.turn.reserve(static_cast<size_t>(runtime.max_logit_rows));
  state.step_sequences.reserve(runtime.max_sequences);
  state.runtime = runtime;
  state.reserved = true;
  return {};
}

Result<std::unique_ptr<cache::KvCache>> Model::create_cache(const RuntimeOptions& runtime,
                                                            Identity identity) const {
  const State& state = *state_;
  const ModelConfig& config = state.config();
  KVANT_TRY(check_formats(*state.backend, config, runtime));
  KVANT_ASSIGN(const auto quant_plan, fitted_plan(config, runtime));
  cache::CacheConfig cache = cache_config(config, *state.backend, runtime, quant_plan);
  std::string description = identity_json(config);
  if (identity == Identity::kWithWeights) {
    KVANT_ASSIGN(const Sha256 weights, weights_id(*state.source, default_cache_dir()));
    description += to_hex(weights);
  }
  const Sha256 digest = sha256(description);
  std::memcpy(cache.fingerprint_model, digest.data(), digest.size());
  return cache::KvCache::create(cache, state.backend->memory());
}

Status Model::State::check_room(const cache::KvCache& cache, cache::SequenceId id,
                                int64_t new_tokens) const {
  const int64_t held = cache.length(id);
  if (held + new_tokens <= runtime.context_tokens) return {};
  return Error(ErrorCode::kResourceExhausted,
               fmt::format("the context is full: {} tokens are in it and {} are to come, it holds "
                           "{}",
                           held, new_tokens, runtime.context_tokens));
}

// Checks the batch and lays it out in rows.
Status Model::State::collect(std::span<const ForwardSequence> sequences,
                             const cache::KvCache& cache) {
  const auto bad = [](std::string text) {
    return Error(ErrorCode::kInvalidArgument, std::move(text));
  };
  positions.clear();
  ids.clear();
  wanted_rows.clear();
  only_greatest.clear();
  queries.clear();
  step_sequences.clear();
  if (sequences.empty() || static_cast<int>(sequences.size()) > runtime.max_sequences) {
    return bad(fmt::format("a step of {} sequences; reserved for 1 to {}", sequences.size(),
                           runtime.max_sequences));
  }
  for (const ForwardSequence& sequence : sequences) {
    const int64_t count = static_cast<int64_t>(sequence.tokens.size());
    if (count == 0 || sequence.num_logit_rows < 0 || sequence.num_logit_rows > count) {
      return bad(fmt::format("{} rows of logits of {} new tokens", sequence.num_logit_rows, count));
    }
    if (count + static_cast<int64_t>(ids.size()) > step_tokens(runtime)) {
      return bad(fmt::format("a step of more than {} tokens; give longer inputs in several steps",
                             step_tokens(runtime)));
    }
    KVANT_CHECK(sequence.queries.empty() ||
                    static_cast<int>(sequence.queries.size()) == sequence.num_logit_rows,
                "a query for each row of logits");
    KVANT_TRY(check_room(cache, sequence.id, count));
    const int64_t first = cache.length(sequence.id);
    const int64_t first_wanted = count - sequence.num_logit_rows;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = sequence.tokens[i];
      if (id < 0 || id >= config().vocab_size) {
        return bad(
            fmt::format("token id {}; the vocabulary has {} tokens", id, config().vocab_size));
      }
      if (i >= first_wanted) {
        wanted_rows.push_back(static_cast<int64_t>(ids.size()));
        only_greatest.push_back(sequence.only_greatest ? 1 : 0);
        queries.push_back(sequence.queries.empty() || sequence.only_greatest
                              ? backend::RowQuery{}
                              : sequence.queries[static_cast<size_t>(i - first_wanted)]);
      }
      ids.push_back(id);
      positions.push_back(first + i);
    }
    step_sequences.push_back({sequence.id, static_cast<int32_t>(count)});
  }
  return {};
}

Status Model::State::observe(const StepContext& step, int layer) {
  const auto download = [&](const void* rows, int heads, std::vector<float>& host) {
    const int64_t values = step.num_rows * heads * config().head_dim;
    host.resize(static_cast<size_t>(values));
    return backend->download_f32(rows, values, host.data());
  };
  KVANT_TRY(download(step.act.q, config().num_query_heads, observed_q));
  KVANT_TRY(download(step.act.k, config().num_kv_heads, observed_k));
  KVANT_TRY(download(step.act.v, config().num_kv_heads, observed_v));
  KVANT_TRY(backend->synchronize());
  return observer({.layer = layer,
                   .positions = step.positions,
                   .q = observed_q,
                   .k = observed_k,
                   .v = observed_v});
}

// Experts read what the router says on the host.
Status Model::State::repeat(int64_t part, int64_t num_rows,
                            const std::function<Status()>& enqueue) {
  if (config().num_experts > 0) return enqueue();
  return backend->repeat({.owner = this, .part = part, .num_rows = num_rows}, enqueue);
}

// Leaves the wanted rows of the residual stream in act.x.
Status Model::State::run_layers(const cache::KvCache& cache, const std::atomic<bool>* cancel,
                                Activations& act) {
  StepContext step{config(), *backend, act, static_cast<int64_t>(ids.size()), positions};
  KVANT_TRY(backend->embed(weights.embedding, ids, config().embedding_scale, act.x));
  const int last = config().num_layers - 1;
  for (int i = 0; i <= last; ++i) {
    if (cancel != nullptr && cancel->load(std::memory_order_relaxed)) {
      return Error(ErrorCode::kCancelled, "cancelled");
    }
    const bool windowed = config().layer_window[i] > 0;
    const attention::RopeParams& rope = windowed ? weights.local_rope : weights.rope;
    const bool is_end = i == last && wanted_rows.empty();  // nothing reads what else it computes
    const auto projections =
        is_end && observer == nullptr ? Projections::kKeysAndValues : Projections::kAll;
    const auto up_to_attention = [&]() -> Status {
      if (i > 0) KVANT_TRY(join_layer(step, weights.layers[i - 1]));
      return project(step, weights.layers[i], projections);
    };
    // The part without queries is another one, which comes with prompts only.
    KVANT_TRY(projections == Projections::kAll ? repeat(i, step.num_rows, up_to_attention)
                                               : up_to_attention());
    KVANT_TRY(append_rotated(step, rope, cache, i, projections));
    if (observer != nullptr) KVANT_TRY(observe(step, i));
    if (is_end) return {};
    KVANT_TRY(attend(step, rope, cache, i));
  }
  const bool all = wanted_rows.size() == ids.size();
  if (!all) {
    const int q_width = config().num_query_heads * config().head_dim;
    KVANT_TRY(backend->gather_rows(act.attended, wanted_rows, q_width, act.q));
    KVANT_TRY(backend->gather_rows(act.x, wanted_rows, config().dim, act.branch));
    std::swap(act.attended, act.q);
    std::swap(act.x, act.branch);
    step.num_rows = static_cast<int64_t>(wanted_rows.size());
  }
  return repeat(all ? kEndOfAllRows : kEndOfWantedRows, step.num_rows,
                [&] { return join_layer(step, weights.layers[last]); });
}

// Rows `first` to first + num_rows of a turn, [num_rows][vocab_size] in host memory. Waits for the
// layers and the head.
Result<float*> Model::State::fetch_logits(void* device_logits, int64_t first, int64_t num_rows) {
  const int64_t width = config().vocab_size;
  std::byte* const from = static_cast<std::byte*>(device_logits) +
                          backend::activation_bytes(backend->info().activation_type, first * width);
  if (host_logits == nullptr) {
    KVANT_TRY(backend->synchronize());
    return reinterpret_cast<float*>(from);
  }
  float* const to = host_logits + first * width;
  KVANT_TRY(backend->download_f32(from, num_rows * width, to));
  return to;
}

// Puts the queries of a turn's rows, if there are any, and says so.
Result<bool> Model::State::ask(void* device_logits, int64_t first, int64_t count) {
  const auto asks = [](const backend::RowQuery& query) {
    return query.kind != backend::RowQuery::Kind::kGreatest;
  };
  const std::span turn_of =
      std::span(queries).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
  if (!backend->info().has_queries || host_logits == nullptr ||
      std::ranges::none_of(turn_of, asks)) {
    return false;
  }
  std::ranges::copy(turn_of, turn_queries);
  KVANT_TRY(
      backend->answer_queries(device_logits, count, config().vocab_size, turn_queries, answers));
  return true;
}

void Model::State::cap(std::span<float> logits) const {
  const float most = config().logit_softcap;
  for (float& logit : logits) logit = most * std::tanh(logit / most);
}

// What is wanted of the rows from `first` on whose logits are in `device_logits`: fills `turn`.
Status Model::State::read_turn(void* device_logits, int64_t first, int64_t count) {
  const auto width = static_cast<size_t>(config().vocab_size);
  const bool capped = config().logit_softcap > 0;  // logits that differ may not, once capped
  bool asked = false;
  if (!capped) {
    KVANT_ASSIGN(asked, ask(device_logits, first, count));
    if (!asked) {
      KVANT_TRY(backend->greatest_in_rows(device_logits, count, config().vocab_size, maxima));
    }
  }
  const auto has_query = [&](int64_t i) {
    return asked &&
           queries[static_cast<size_t>(first + i)].kind != backend::RowQuery::Kind::kGreatest;
  };
  // The host gets all rows from the first to the last that it needs.
  int64_t begin = count;
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!capped && (only_greatest[first + i] != 0 || has_query(i))) continue;
    begin = std::min(begin, i);
    end = i + 1;
  }
  float* logits = nullptr;
  if (begin < end) {
    KVANT_ASSIGN(logits, fetch_logits(device_logits, begin, end - begin));
  }
  if (first == 0) KVANT_TRY(check_appended());
  if (logits == nullptr) KVANT_TRY(backend->synchronize());
  turn.clear();
  for (int64_t i = 0; i < count; ++i) {
    LogitsRow row{.index = first + i, .greatest = {}, .logits = {}, .choice = {}, .candidates = {}};
    std::span<float> values;
    if (begin <= i && i < end) values = {logits + (i - begin) * config().vocab_size, width};
    if (capped) {
      cap(values);
      maxima[i] = backend::greatest_value(values);
    }
    if (maxima[i].index < 0) {
      return Error(ErrorCode::kNumericError,
                   "the model's output is infinite or not a number; its weights may be damaged");
    }
    row.greatest = maxima[i];
    if (has_query(i)) {
      row.choice = answers.choices[i];
      row.candidates = {answers.candidates + i * backend::kMostCandidates,
                        static_cast<size_t>(row.choice.num_candidates)};
      // Where nothing was found the device has copied the row.
      if (!row.choice.found()) row.logits = {answers.values + i * config().vocab_size, width};
    } else if (only_greatest[first + i] == 0) {
      row.logits = values;
    }
    turn.push_back(row);
  }
  return {};
}

// Waits for the layers.
Status Model::State::check_appended() {
  KVANT_ASSIGN(const formats::EncodeStats stats, backend->take_encode_stats());
  if (stats.non_finite == 0) return {};
  return Error(ErrorCode::kNumericError,
               fmt::format("{} keys or values are infinite or not a number; the weights or the "
                           "input are damaged, nothing was added to the cache",
                           stats.non_finite));
}

// Logits of the rows in act.x, `max_logit_rows` at a time.
Status Model::State::run_head(const Activations& act, const RowsSink& sink) {
  const int64_t num_rows = static_cast<int64_t>(wanted_rows.size());
  const backend::ActivationType type = backend->info().activation_type;
  const ModelConfig& model = config();
  for (int64_t first = 0; first < num_rows; first += runtime.max_logit_rows) {
    const int64_t count = std::min<int64_t>(runtime.max_logit_rows, num_rows - first);
    const std::byte* input =
        static_cast<const std::byte*>(act.x) + backend::activation_bytes(type, first * model.dim);
    const backend::LinearTarget target{.matrix = weights.head.get(), .out = act.logits};
    KVANT_TRY(backend->norm_linear({.x = input,
                                    .weight = weights.output_norm,
                                    .out = act.normed,
                                    .num_rows = count,
                                    .dim = model.dim,
                                    .epsilon = model.norm_epsilon},
                                   std::span(&target, 1)));
    KVANT_TRY(read_turn(act.logits, first, count));
    KVANT_TRY(sink(turn));
  }
  return {};
}

Status Model::State::step(const cache::KvCache& cache, const RowsSink& sink,
                          const std::atomic<bool>* cancel) {
  Activations act = activations;
  KVANT_TRY(run_layers(cache, cancel, act));
  if (!wanted_rows.empty()) return run_head(act, sink);
  KVANT_TRY(check_appended());
  return backend->synchronize();
}

// `work` as one step of the cache with the sequences of step_sequences: committed if it succeeds.
template <typename Work>
Status Model::State::transact(cache::KvCache& cache, const Work& work) {
  KVANT_TRY(cache.begin_step(step_sequences));
  Status done;
  try {
    done = work();
  } catch (...) {
    cache.abort_step();
    throw;
  }
  if (!done) {
    static_cast<void>(backend->take_encode_stats());  // the next step starts from zero
    cache.abort_step();
    return done;
  }
  cache.commit_step();
  return {};
}

Status Model::forward(std::span<const ForwardSequence> sequences, cache::KvCache& cache,
                      const RowsSink& sink, const std::atomic<bool>* cancel) {
  State& state = *state_;
  KVANT_CHECK(state.reserved, "reserve() comes before forward()");
  KVANT_TRY(state.collect(sequences, cache));
  return state.transact(cache, [&] { return state.step(cache, sink, cancel); });
}

Status Model::forward(std::span<const ForwardSequence> sequences, cache::KvCache& cache,
                      const LogitsSink& sink, const std::atomic<bool>* cancel) {
  const RowsSink each = [&sink](std::span<const LogitsRow> rows) -> Status {
    for (const LogitsRow& row : rows) {
      KVANT_CHECK(!row.logits.empty(), "sinks of single rows get their logits");
      KVANT_TRY(sink(row.index, row.logits));
    }
    return {};
  };
  return forward(sequences, cache, each, cancel);
}

// One step of random keys and values, in every layer.
Status Model::State::append_rows(const cache::KvCache& cache, RandomRows& rows) {
  const int64_t count = step_sequences.front().num_new_tokens;
  for (int layer = 0; layer < config().num_layers; ++layer) {
    const cache::KvCache::LayerPlace place = cache.place(layer);
    KVANT_TRY(backend->append({.view = &cache.view(place.group),
                               .group_layer = place.index,
                               .k = rows.take(count),
                               .v = rows.take(count)}));
  }
  KVANT_TRY(check_appended());
  return backend->synchronize();
}

Status Model::append_random(std::span<const cache::SequenceId> sequences, cache::KvCache& cache,
                            const RandomFill& fill) {
  State& state = *state_;
  KVANT_CHECK(state.reserved, "reserve() comes before append_random()");
  if (fill.num_tokens < 1) return {};
  const int64_t step = std::min<int64_t>(max_step_tokens(), fill.num_tokens);
  // Between steps the activations hold nothing.
  const std::span scratch(state.activation_buffer.data(),
                          static_cast<size_t>(state.activation_buffer.bytes()));
  KVANT_ASSIGN(RandomRows rows,
               RandomRows::create(*state.backend, scratch,
                                  {.width = int64_t{config().num_kv_heads} * config().head_dim,
                                   .num_rows = 3 * step,
                                   .seed = fill.seed}));
  int64_t done = 0;
  for (const cache::SequenceId id : sequences) {
    KVANT_TRY(state.check_room(cache, id, fill.num_tokens));
    for (int64_t left = fill.num_tokens; left > 0;) {
      if (fill.cancel != nullptr && fill.cancel->load(std::memory_order_relaxed)) {
        return Error(ErrorCode::kCancelled, "cancelled");
      }
      const int64_t count = std::min(step, left);
      state.step_sequences.assign(1, {id, static_cast<int32_t>(count)});
      KVANT_TRY(state.transact(cache, [&] { return state.append_rows(cache, rows); }));
      left -= count;
      done += count;
      if (fill.on_step) fill.on_step(done);
    }
  }
  return {};
}

}  // namespace kvant::model
