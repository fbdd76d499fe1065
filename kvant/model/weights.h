// The weights of a model as its blocks use them, and the one list of names and shapes that loading
// and planning share. Internal to model/.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/base/memory.h"
#include "kvant/model/config.h"
#include "kvant/model/source.h"

namespace kvant::model {

using MatrixPtr = std::unique_ptr<backend::Matrix>;

// Float vectors lie in ModelWeights::parameters (the backend's memory); absent ones are null.
struct LayerWeights {
  const float* attention_norm = nullptr;  // [dim]
  MatrixPtr q, k, v;                      // [heads * head_dim][dim]
  const float* q_bias = nullptr;
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const float* q_norm = nullptr;  // [head_dim]
  const float* k_norm = nullptr;
  MatrixPtr attention_out;                     // [dim][query heads * head_dim]
  const float* post_attention_norm = nullptr;  // [dim]
  const float* ffn_norm = nullptr;
  MatrixPtr gate, up, down;  // [ffn_dim][dim] twice, [dim][ffn_dim]
  const float* post_ffn_norm = nullptr;
  MatrixPtr router;  // [experts][dim]
  std::vector<MatrixPtr> expert_gate, expert_up, expert_down;
  // The same as the backend wants them.
  std::vector<const backend::Matrix*> expert_gate_list, expert_up_list, expert_down_list;
};

struct ModelWeights {
  backend::MatrixSource embedding;  // [vocab][dim]
  std::vector<LayerWeights> layers;
  const float* output_norm = nullptr;  // [dim]
  MatrixPtr head;                      // [vocab][dim]
  // Rotary frequencies of layers without and with a window.
  attention::RopeParams rope, local_rope;
  Buffer parameters;
};

// What loading will take, without loading.
Result<WeightBytes> plan_weights(const ModelSource& source, const backend::Backend& backend);

Result<ModelWeights> load_weights(ModelSource& source, backend::Backend& backend,
                                  const LoadProgress& progress);

}  // namespace kvant::model
