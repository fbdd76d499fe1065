#include "kvant/model/identity.h"

#include <fmt/format.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "kvant/base/check.h"

namespace kvant::model {
namespace {

class Hasher {
 public:
  Hasher() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    KVANT_CHECK(
        context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1,
        "SHA-256 is available");
  }
  void add(const void* data, size_t size) {
    KVANT_CHECK(EVP_DigestUpdate(context_.get(), data, size) == 1, "hashing does not fail");
  }
  void add_u64(uint64_t value) {  // little-endian
    uint8_t bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
    add(bytes, sizeof(bytes));
  }
  Sha256 finish() {
    Sha256 digest;
    unsigned size = 0;
    KVANT_CHECK(EVP_DigestFinal_ex(context_.get(), digest.data(), &size) == 1 && size == 32,
                "SHA-256 has 32 bytes");
    return digest;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

Sha256 hash_tensors(const Gguf& gguf) {
  std::vector<const GgufTensor*> tensors;
  for (const GgufTensor& tensor : gguf.tensors()) tensors.push_back(&tensor);
  std::ranges::sort(tensors, {}, [](const GgufTensor* tensor) { return tensor->name; });
  Hasher hasher;
  for (const GgufTensor* tensor : tensors) {
    hasher.add_u64(tensor->name.size());
    hasher.add(tensor->name.data(), tensor->name.size());
    hasher.add_u64(static_cast<uint64_t>(tensor->type));
    for (const int64_t dim : tensor->dims) hasher.add_u64(static_cast<uint64_t>(dim));
    hasher.add_u64(tensor->bytes.size());
    hasher.add(tensor->bytes.data(), tensor->bytes.size());
  }
  return hasher.finish();
}

// Where the hash of a file is remembered; empty if it cannot be.
std::string cache_entry(const std::string& path, const std::string& cache_dir) {
  struct stat info;
  if (cache_dir.empty() || stat(path.c_str(), &info) != 0) return "";
  return fmt::format("{}/weights-{}-{}.{:09}-{}-{}", cache_dir, info.st_size, info.st_mtim.tv_sec,
                     info.st_mtim.tv_nsec, info.st_dev, info.st_ino);
}

std::optional<Sha256> read_entry(const std::string& entry) {
  std::ifstream file(entry);
  std::string hex;
  if (entry.empty() || !(file >> hex) || hex.size() != 64) return std::nullopt;
  Sha256 digest;
  for (size_t i = 0; i < digest.size(); ++i) {
    const std::string byte = hex.substr(2 * i, 2);
    char* end = nullptr;
    digest[i] = static_cast<uint8_t>(std::strtoul(byte.c_str(), &end, 16));
    if (end != byte.c_str() + 2) return std::nullopt;
  }
  return digest;
}

// Best effort: whoever reads the entry sees all of it or none.
void write_entry(const std::string& entry, const Sha256& digest) {
  if (entry.empty()) return;
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(entry).parent_path(), error);
  const std::string temporary = fmt::format("{}.{}", entry, getpid());
  {
    std::ofstream file(temporary);
    file << to_hex(digest) << '\n';
    if (!file.flush()) error = std::make_error_code(std::errc::io_error);
  }
  if (!error) std::filesystem::rename(temporary, entry, error);
  if (error) std::filesystem::remove(temporary, error);
}

Sha256 file_id(const ModelSource& source, const std::string& cache_dir) {
  const std::string entry = cache_entry(source.name(), cache_dir);
  if (const std::optional<Sha256> known = read_entry(entry)) return *known;
  const Sha256 digest = hash_tensors(*source.gguf());
  write_entry(entry, digest);
  return digest;
}

}  // namespace

Sha256 sha256(std::string_view bytes) {
  Hasher hasher;
  hasher.add(bytes.data(), bytes.size());
  return hasher.finish();
}

std::string to_hex(const Sha256& digest) {
  std::string hex;
  for (const uint8_t byte : digest) hex += fmt::format("{:02x}", byte);
  return hex;
}

Result<Sha256> weights_id(const ModelSource& source, const std::string& cache_dir) {
  if (source.gguf() == nullptr) {
    return sha256(source.name() + std::string(formats::weight_type_name(source.dummy_type())) +
                  identity_json(source.config()));
  }
  const Sha256 in_file = file_id(source, cache_dir);
  switch (source.storage()) {
    case WeightStorage::kAsInFile: break;
    case WeightStorage::kF8E4m3: return sha256(to_hex(in_file) + " as F8_E4M3, a scale a row");
  }
  return in_file;
}

std::string default_cache_dir() {
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  if (xdg != nullptr && xdg[0] == '/') return std::string(xdg) + "/kvant";
  const char* home = std::getenv("HOME");
  if (home != nullptr && home[0] == '/') return std::string(home) + "/.cache/kvant";
  return "";
}

std::string identity_json(const ModelConfig& config) {
  const auto rope_json = [&](bool windowed) {
    const RopeTable table = rope_table(config, windowed);
    return nlohmann::json{{"rotary_dim", table.params.rotary_dim},
                          {"base", table.params.base},
                          {"position_scale", table.params.position_scale},
                          {"attention_factor", table.params.attention_factor},
                          {"factors", table.factors}};
  };
  // nlohmann::json sorts keys, and prints the shortest decimal that gives the same float.
  const nlohmann::json json{{"geometry_id", config.geometry_id()}, {"layers", config.num_layers},
                            {"kv_heads", config.num_kv_heads},     {"head_dim", config.head_dim},
                            {"windows", config.layer_window},      {"rope", rope_json(false)},
                            {"local_rope", rope_json(true)}};
  return json.dump();
}

}  // namespace kvant::model
