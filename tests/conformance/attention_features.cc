// Features of attention: for every format, the CPU backend's append and attention over a real cache
// give what the exact reference gives, with the same bits however the tokens came to be in the
// cache.
#include <gtest/gtest.h>

#include "kvant/backend/testing/attention_rig.h"
#include "tests/conformance/conformance.h"

namespace kvant::conformance {

using backend::testing::AttentionRig;
using backend::testing::Chunk;
using backend::testing::RigOptions;

namespace {

constexpr int kPage = 16;
// Against float64 on the decoded cache; integer products round queries and weights
// (backend/cpu/attention_integer.h).
constexpr double kMaxError = 3e-4;

// A full-attention layer and a window layer, keys with RoPE applied by attention where the format
// asks for it.
RigOptions rig_options(const std::string& spec) {
  RigOptions options;
  options.kv = spec.c_str();
  options.num_layers = 2;
  options.odd_window = 20;
  options.num_kv_heads = 1;
  options.group = 2;
  options.head_dim = 48;
  options.page_tokens = kPage;
  options.max_tokens = 320;
  options.max_sequences = 4;
  options.num_sequences = 3;
  options.max_step_tokens = 100;
  options.params.rope.rotary_dim = 48;
  options.level = detect_cpu_level();
  return options;
}

void expect_same_outputs(const AttentionRig& a, int sequence_a, const AttentionRig& b,
                         int sequence_b) {
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_FALSE(a.outputs(sequence_a, layer).empty());
    EXPECT_TRUE(a.outputs(sequence_a, layer) == b.outputs(sequence_b, layer))
        << "layer " << layer << ": other bits";
  }
}

// Decode token by token, one prefill and odd chunks.
void attend_chunked(const std::string& spec) {
  RigOptions options = rig_options(spec);
  AttentionRig single(options), whole(options), chunked(options);
  single.extend(0, 70, 1);
  whole.extend(0, 70, 70);
  for (const int n : {3, 13, 20, 29, 1, 4}) chunked.step({{0, n}});
  EXPECT_LT(single.worst_error(), kMaxError);
  EXPECT_LT(whole.worst_error(), kMaxError);
  EXPECT_LT(chunked.worst_error(), kMaxError);
  expect_same_outputs(single, 0, whole, 0);
  expect_same_outputs(single, 0, chunked, 0);
}

// Sequences of different lengths in one step.
void attend_ragged(const std::string& spec) {
  RigOptions options = rig_options(spec);
  AttentionRig batch(options), alone(options);
  batch.step({{0, 1}, {1, 40}, {2, 17}});
  batch.step({{2, 9}, {0, 30}, {1, 1}});
  batch.step({{1, 1}, {0, 1}, {2, 1}});
  EXPECT_LT(batch.worst_error(), kMaxError);
  for (const int sequence : {0, 1, 2}) {
    alone.extend(sequence, batch.length(sequence), 100);
    expect_same_outputs(batch, sequence, alone, sequence);
  }
}

// Sequences much longer than the window of the window group.
void attend_windowed(const std::string& spec) {
  RigOptions options = rig_options(spec);
  AttentionRig rig(options);
  rig.step({{0, 90}});
  rig.step({{0, 1}});
  rig.step({{0, 50}});
  rig.step({{0, 3}});
  EXPECT_LT(rig.worst_error(), kMaxError);
}

void attend_truncated(const std::string& spec) {
  RigOptions options = rig_options(spec);
  AttentionRig straight(options), back(options);
  straight.extend(0, 90, 90);
  back.extend(0, 85, 50);
  for (const int64_t length : {83, 60, 37}) {
    back.truncate(0, length);
    EXPECT_LE(back.length(0), length);
    back.extend(0, 90, 33);
  }
  EXPECT_LT(back.worst_error(), kMaxError);
  expect_same_outputs(straight, 0, back, 0);
}

void attend_forked(const std::string& spec) {
  RigOptions options = rig_options(spec);
  AttentionRig straight(options), forked(options);
  straight.extend(0, 80, 80);
  forked.extend(0, 39, 39);
  const int copy = forked.fork(0);
  forked.step({{copy, 2}, {0, 20}});
  forked.extend(copy, 80, 7);
  forked.extend(0, 80, 40);
  EXPECT_LT(forked.worst_error(), kMaxError);
  expect_same_outputs(straight, 0, forked, 0);
  expect_same_outputs(straight, 0, forked, copy);
}

// Pages that were exported and imported are read like those that were computed.
void attend_loaded(const std::string& spec) {
  RigOptions options = rig_options(spec);
  AttentionRig source(options), target(options);
  source.extend(0, 48, 48);
  const Status loaded = target.load_pages(source, 0, 3);
  const auto format = formats::parse_cache_format(spec);
  if (format->recent_tokens > 0 && !loaded) {  // refused by design unless stored pages are BF16
    EXPECT_EQ(loaded.error().code(), ErrorCode::kUnsupported) << loaded.error().message();
    EXPECT_FALSE(format->is_bf16());
    return;
  }
  ASSERT_TRUE(loaded.has_value()) << loaded.error().message();
  source.extend(0, 70, 5);
  target.extend(0, 70, 9);
  EXPECT_LT(target.worst_error(), kMaxError);
  expect_same_outputs(source, 0, target, 0);
}

constexpr Feature kFeatures[] = {
    {"attend_chunked", attend_chunked},   {"attend_ragged", attend_ragged},
    {"attend_windowed", attend_windowed}, {"attend_truncated", attend_truncated},
    {"attend_forked", attend_forked},     {"attend_loaded", attend_loaded},
};

}  // namespace

std::span<const Feature> attention_features() {
  return kFeatures;
}

}  // namespace kvant::conformance
