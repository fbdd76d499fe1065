#include "kvant/cache/fingerprint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "kvant/base/check.h"
#include "kvant/cache/cache_plan.h"

namespace kvant::cache {

namespace {

// Incremental SHA-256.
class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    KVANT_CHECK(context_ != nullptr && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1,
                "SHA-256 is part of every OpenSSL");
  }
  ~Sha256() { EVP_MD_CTX_free(context_); }
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void add(const void* data, size_t bytes) {
    if (bytes > 0)
      KVANT_CHECK(EVP_DigestUpdate(context_, data, bytes) == 1, "hashing memory does not fail");
  }
  PageKey finish() {
    PageKey digest;
    KVANT_CHECK(EVP_DigestFinal_ex(context_, digest.data(), nullptr) == 1,
                "hashing memory does not fail");
    return digest;
  }

 private:
  EVP_MD_CTX* context_;
};

std::string hex(std::span<const uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

void add_vector(Sha256& hash, const std::vector<float>& values) {
  const uint64_t size = values.size();
  hash.add(&size, sizeof(size));
  hash.add(values.data(), values.size() * sizeof(float));
}

// Scales, biases and factors that this side's bytes depend on.
void add_side_plan(Sha256& hash, const formats::SideFormat& side, const formats::SidePlan& plan) {
  const std::vector<float> absent;
  const bool reads_scale =
      formats::format_info(side.base).global_scale != formats::GlobalScale::kNone;
  add_vector(hash, reads_scale ? plan.global_scale : absent);
  add_vector(hash, side.bias ? plan.bias : absent);
  add_vector(hash, side.smooth ? plan.smooth : absent);
}

std::string plan_hash(const CacheConfig& config) {
  if (config.plan == nullptr) return "";
  Sha256 hash;
  for (size_t layer = 0; layer < config.layers.size(); ++layer) {
    const formats::CacheFormat& format = layer_format(config, static_cast<int>(layer));
    add_side_plan(hash, format.k, config.plan->layers[layer].k);
    add_side_plan(hash, format.v, config.plan->layers[layer].v);
  }
  return hex(hash.finish());
}

}  // namespace

std::string fingerprint_json(const CacheConfig& config) {
  nlohmann::json layers = nlohmann::json::array();
  for (size_t layer = 0; layer < config.layers.size(); ++layer) {
    const LayerGeometry& geometry = config.layers[layer];
    layers.push_back(
        {{"kv", formats::canonical_name(layer_format(config, static_cast<int>(layer)))},
         {"num_kv_heads", geometry.num_kv_heads},
         {"head_dim", geometry.head_dim},
         {"window", geometry.window}});
  }
  // nlohmann::json keeps objects sorted by key, which makes the text canonical.
  const nlohmann::json json = {{"codec_version", kCodecVersion},
                               {"layers", std::move(layers)},
                               {"model", hex(config.fingerprint_model)},
                               {"page_tokens", config.page_tokens},
                               {"plan", plan_hash(config)}};
  return json.dump();
}

std::array<uint8_t, 16> cache_fingerprint(const CacheConfig& config) {
  const std::string json = fingerprint_json(config);
  Sha256 hash;
  hash.add(json.data(), json.size());
  const PageKey digest = hash.finish();
  std::array<uint8_t, 16> fingerprint;
  std::copy_n(digest.begin(), fingerprint.size(), fingerprint.begin());
  return fingerprint;
}

PageKey page_key(const PageKey& parent, std::span<const uint8_t, 16> fingerprint,
                 std::string_view salt, std::span<const uint32_t> token_ids) {
  Sha256 hash;
  hash.add(parent.data(), parent.size());
  hash.add(fingerprint.data(), fingerprint.size());
  hash.add(salt.data(), salt.size());
  hash.add(token_ids.data(), token_ids.size_bytes());
  return hash.finish();
}

uint64_t event_id(const PageKey& key) {
  uint64_t id = 0;
  for (int i = 0; i < 8; ++i) id |= static_cast<uint64_t>(key[i]) << (8 * i);
  return id == 0 ? 1 : id;
}

}  // namespace kvant::cache
