// The halves of a transformer block, shared by all architectures: what differs between them is data
// (ModelConfig, null weights), never code per architecture or per backend. Internal to model/.
//
//   x += post(attention_out(attend(rope(qk_norm(qkv(norm(x)))))))
//   x += post(down(act(gate(norm(x))) * up(norm(x))))        or a mixture of experts
#pragma once

#include <span>

#include "kvant/backend/backend.h"
#include "kvant/base/memory.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/model/config.h"
#include "kvant/model/weights.h"

namespace kvant::model {

// Activations of one step, rows of the backend's activation type.
struct Activations {
  void* x = nullptr;       // [rows][dim], the residual stream
  void* normed = nullptr;  // [rows][dim]
  void* branch = nullptr;  // [rows][dim], a branch's output before it joins x
  void* q = nullptr;       // [rows][query heads * head_dim]
  void* k = nullptr;       // [rows][kv heads * head_dim]
  void* v = nullptr;
  void* attended = nullptr;  // like q
  void* gate = nullptr;      // [rows][ffn_dim]; null with experts
  void* up = nullptr;
  void* logits = nullptr;  // [max_logit_rows][vocab]
};

// Bytes of all activations together; every buffer starts at a multiple of 128 bytes. Where `base`
// is given, `out` points into it.
int64_t layout_activations(const ModelConfig& config, backend::ActivationType type,
                           int64_t max_rows, int64_t max_logit_rows, std::byte* base,
                           Activations* out);

// What one step of the forward pass shares between its layers.
struct StepContext {
  const ModelConfig& config;
  backend::Backend& backend;
  const Activations& act;
  int64_t num_rows = 0;
  std::span<const int64_t> positions;  // [num_rows]
};

// Fills act.k and act.v (and act.q unless kKeysAndValues), before RoPE.
enum class Projections { kAll, kKeysAndValues };
Status project(const StepContext& step, const LayerWeights& layer, Projections projections);
// Rotates what project() made, and appends K and V to the cache.
Status append_rotated(const StepContext& step, const attention::RopeParams& rope,
                      const cache::KvCache& cache, int index, Projections projections);
// act.attended = attention of act.q over the cache.
Status attend(const StepContext& step, const attention::RopeParams& rope,
              const cache::KvCache& cache, int index);
// x += post_norm(attention_out(act.attended)), then x += post_norm(feed_forward(norm(x)))
Status join_layer(const StepContext& step, const LayerWeights& layer);

}  // namespace kvant::model
