// Features of the codecs alone, with the cache's test values.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kvant/formats/codec.h"
#include "kvant/formats/sections.h"
#include "tests/conformance/cache_fixture.h"
#include "tests/conformance/conformance.h"

namespace kvant::conformance {

using cache::SideRole;

namespace {

// Relative L2 error of one side of a page after closing, decoded completely.
double closing_error(Fixture& f, int layer, SideRole role) {
  const int head_dim = f.config.layers[layer].head_dim;
  const formats::SideFormat side = role == SideRole::kKeys ? f.config.format.k : f.config.format.v;
  uint64_t seed = 12;
  const std::vector<uint32_t> tokens = cache::testing::random_tokens(seed, kPage);
  const std::vector<float> x = f.harness->expected_rows(layer, role, 0, 0, tokens);
  const auto codec = formats::Codec::create(side, head_dim);
  const formats::SideParams params =
      f.plan.side_params(layer, role == SideRole::kKeys, 0, head_dim);
  const formats::SideBytes bytes = formats::side_bytes(side, kPage, head_dim);
  std::vector<uint8_t> codes(bytes.codes), scales(bytes.scales);
  std::vector<uint16_t> mean(head_dim);
  codec->encode_page(x.data(), kPage, params, {codes.data(), scales.data(), mean.data()});
  std::vector<float> y(x.size());
  codec->decode_page({codes.data(), scales.data(), mean.data()}, kPage, params,
                     formats::Codec::Frame::kPlain, y.data());
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
    norm += static_cast<double>(x[i]) * x[i];
  }
  return std::sqrt(error / norm);
}

// What is read back is close to what was written: catches a codec that is exact about the wrong
// thing.
void stored_values(const std::string& spec) {
  Fixture f(spec);
  if (!f.create()) return;
  for (const SideRole role : {SideRole::kKeys, SideRole::kValues}) {
    const formats::SideFormat& side =
        role == SideRole::kKeys ? f.config.format.k : f.config.format.v;
    const FormatCell* cell = find_cell(side.base);
    // Options shift where the error is; they must not make it much larger on these values.
    const bool options = !(side == formats::SideFormat{.base = side.base});
    EXPECT_LE(closing_error(f, 0, role), cell->max_relative_error * (options ? 1.5 : 1.0))
        << (role == SideRole::kKeys ? "keys" : "values");
  }
}

constexpr Feature kFeatures[] = {
    {"stored_values", stored_values},
};

}  // namespace

std::span<const Feature> codec_features() {
  return kFeatures;
}

}  // namespace kvant::conformance
