// A loaded model: ragged batches of tokens in, logits out, keys and values in a KvCache.
//
//   auto backend = create_backend({});
//   auto source = ModelSource::open("model.gguf");
//   auto model = Model::load(std::move(*source), **backend, {});
//   RuntimeOptions runtime{.format = *parse_cache_format("4bit"), .context_tokens = 4096};
//   (*model)->reserve(runtime);
//   auto cache = (*model)->create_cache(runtime);
//   auto id = (*cache)->add_sequence();
//   (*model)->forward({{.id = *id, .tokens = ids, .num_logit_rows = 1}}, **cache, sink);
//
// Thread-compatible: one thread at a time, the backend's. Several caches (of several formats) may
// be used in turn with one model.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/memory.h"
#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/formats/plan.h"
#include "kvant/formats/spec.h"
#include "kvant/model/config.h"
#include "kvant/model/source.h"

namespace kvant::model {

// What buffers and caches are sized for.
struct RuntimeOptions {
  formats::CacheFormat format;
  // One for each layer, or empty: `format` for all. +sink, +recentN and +strict are those of
  // `format`.
  std::vector<formats::CacheFormat> layer_formats;
  // Scales, biases and factors, made for this geometry and any format that they can be fitted to
  // (formats::fit_plan). May be null; read when the cache is created.
  const formats::QuantPlan* plan = nullptr;
  int page_tokens = 64;
  int64_t context_tokens = 4096;  // longest sequence
  int max_sequences = 1;
  // Of all sequences and held pages together; 0: context_tokens * max_sequences.
  int64_t total_tokens = 0;
  // Room for pages held outside sequences, as in cache::CacheConfig.
  int64_t held_sink_pages = 0;
  int64_t held_windows = 0;
  int max_step_tokens = 512;  // new tokens of one step, all sequences together
  int max_logit_rows = 16;    // rows of logits computed at once; more rows take several turns
};

// kInvalidArgument if the plan was made for another geometry. Whoever runs a model with a plan gets
// the same check; this one needs no weights.
Status check_plan_geometry(const formats::QuantPlan& plan, const ModelConfig& config);

// Every byte that a model and its cache take from the backend's memory, by purpose.
struct MemoryPlan {
  WeightBytes weights;
  cache::CacheBytes cache;
  std::vector<cache::GroupBytes> groups;  // what the pages in `cache` are made of
  int64_t activations = 0;                // and, of a device, what the host gets of logits
  int64_t backend_workspace = 0;
  int64_t total() const;
  // Highest total at any time, loading included: what the allocator's high-water mark will show.
  int64_t peak() const;
};

// For the model of `source`, without loading it.
Result<MemoryPlan> plan_memory(const ModelSource& source, const backend::Backend& backend,
                               const RuntimeOptions& runtime);

// `runtime` with total_tokens and the room for held pages that make the cache as large as
// `cache_bytes` allow, by plan_memory's count of pages, staging and tables; at least one sequence
// of context_tokens. kResourceExhausted says how much that takes.
Result<RuntimeOptions> fit_cache_memory(const ModelSource& source, const backend::Backend& backend,
                                        const RuntimeOptions& runtime, int64_t cache_bytes,
                                        const cache::HeldShares& shares = {});

// One sequence's part of a step.
struct ForwardSequence {
  cache::SequenceId id = 0;
  std::span<const int32_t> tokens;  // new tokens, at least one
  int num_logit_rows = 0;           // logits of the last so many tokens are wanted
  bool only_greatest = false;       // of these rows, nothing but which logit is the greatest
  // What is asked of each of these rows in place of its logits, where the backend has an answer
  // (BackendInfo::has_queries); empty: nothing.
  std::span<const backend::RowQuery> queries = {};
};

// Called once per wanted row, in batch order: `row` counts them over the whole batch, `logits` is
// [vocab_size] and valid during the call. An error ends the step and is returned.
using LogitsSink = std::function<Status(int64_t row, std::span<const float> logits)>;

// A wanted row, valid during a call of RowsSink.
struct LogitsRow {
  int64_t index = 0;              // counts the wanted rows over the whole batch, in batch order
  backend::RowMaximum greatest;   // of its logits, ties to the lowest id
  std::span<const float> logits;  // [vocab_size]; empty with ForwardSequence::only_greatest, and if
                                  // choice.found()
  backend::RowChoice choice;      // what its query found
  std::span<const backend::RowMaximum> candidates;  // the query's, in order
};
// Called with all rows that are computed at once (up to max_logit_rows), in batch order, which may
// be read by several threads. An error ends the step and is returned.
using RowsSink = std::function<Status(std::span<const LogitsRow> rows)>;

// What one layer works with in a step, in host memory: rows of the batch, valid during the call.
struct LayerRows {
  int layer = 0;
  std::span<const int64_t> positions;  // [rows]
  std::span<const float> q;            // [rows][query heads][head_dim], after RoPE
  std::span<const float> k;            // [rows][KV heads][head_dim], as they enter the cache: after
                                       // RoPE (before it with +prerope), not yet BF16
  std::span<const float> v;            // like k
};
// An error ends the step and is returned.
using LayerObserver = std::function<Status(const LayerRows& rows)>;

// A context that no text led to: see Model::append_random.
struct RandomFill {
  int64_t num_tokens = 0;  // of each sequence
  uint64_t seed = 1;
  std::function<void(int64_t tokens)> on_step = {};  // tokens so far, all sequences; may be empty
  const std::atomic<bool>* cancel = nullptr;         // may be null; looked at between steps
};

class Model {
 public:
  struct LoadOptions {
    LoadProgress progress;  // may be empty
  };
  // The backend must outlive the model.
  static Result<std::unique_ptr<Model>> load(std::unique_ptr<ModelSource> source,
                                             backend::Backend& backend, const LoadOptions& options);
  ~Model();

  const ModelConfig& config() const;
  const ModelSource& source() const;
  backend::Backend& backend() const;

  // Allocates activations and the backend's workspace; again with other sizes, while no step runs.
  Status reserve(const RuntimeOptions& runtime);
  // A cache for this model. With Identity::kWithWeights its fingerprint includes the weights (their
  // hash is computed, or read from the cache directory), which pages need that leave the process.
  enum class Identity { kGeometryOnly, kWithWeights };
  Result<std::unique_ptr<cache::KvCache>> create_cache(
      const RuntimeOptions& runtime, Identity identity = Identity::kGeometryOnly) const;

  // From the next step on, `observer` sees every layer's queries, keys and values in order of the
  // layers, at the cost of copying them to the host; an empty function ends that.
  void set_observer(LayerObserver observer);

  // One step: appends the tokens to the cache, calls `sink` for the wanted logits, commits. On any
  // error (kInvalidArgument, kResourceExhausted, kNumericError, kCancelled) the cache is unchanged.
  // `cancel` may be null; it is looked at between layers.
  Status forward(std::span<const ForwardSequence> sequences, cache::KvCache& cache,
                 const RowsSink& sink, const std::atomic<bool>* cancel = nullptr);
  // Row by row; not with only_greatest or queries.
  Status forward(std::span<const ForwardSequence> sequences, cache::KvCache& cache,
                 const LogitsSink& sink, const std::atomic<bool>* cancel = nullptr);
  // Appends tokens to each sequence whose keys and values are random normal numbers, the same for
  // the same seed, in steps as forward() makes them but without running the model: each layer's
  // backend append stores and encodes them. Contexts of any length in seconds, on which only speed
  // and memory mean something. Errors as in forward(); the steps before stay.
  Status append_random(std::span<const cache::SequenceId> sequences, cache::KvCache& cache,
                       const RandomFill& fill);
  int max_step_tokens() const;
  int max_sequences() const;
  int64_t context_tokens() const;

 private:
  Model() = default;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvant::model
