#include "kvant/serve/openai/api_keys.h"

#include <fmt/format.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <set>

namespace kvant::serve::openai {
namespace {

std::vector<std::string_view> split_words(std::string_view line) {
  constexpr std::string_view kBlanks = " \t\r";
  std::vector<std::string_view> words;
  size_t at = line.find_first_not_of(kBlanks);
  while (at != std::string_view::npos) {
    const size_t end = std::min(line.find_first_of(kBlanks, at), line.size());
    words.push_back(line.substr(at, end - at));
    at = line.find_first_not_of(kBlanks, end);
  }
  return words;
}

}  // namespace

ApiKeys::Digest ApiKeys::digest(std::string_view text) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

Result<ApiKeys> ApiKeys::parse(std::string_view text) {
  ApiKeys keys;
  int line_number = 0;
  while (!text.empty()) {
    ++line_number;
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    const std::vector<std::string_view> words = split_words(line);
    if (words.empty() || words[0].starts_with('#')) continue;
    if (words.size() > 3) {
      return Error(ErrorCode::kInvalidArgument,
                   fmt::format("line {}: expected KEY [NAME [SALT]], found {} words", line_number,
                               words.size()));
    }
    Entry entry{.digest = digest(words[0]), .tenant = {}};
    entry.tenant.name =
        words.size() > 1 ? std::string(words[1]) : fmt::format("key{}", keys.entries_.size() + 1);
    if (words.size() > 2) entry.tenant.salt = std::string(words[2]);
    for (const Entry& other : keys.entries_) {
      if (other.digest == entry.digest) {
        return Error(ErrorCode::kInvalidArgument,
                     fmt::format("line {}: the key of '{}' is there already, as that of '{}'",
                                 line_number, entry.tenant.name, other.tenant.name));
      }
    }
    keys.entries_.push_back(std::move(entry));
  }
  if (keys.entries_.empty()) {
    return Error(ErrorCode::kInvalidArgument,
                 "there is no key in it; expected one a line, as KEY [NAME [SALT]]");
  }
  return keys;
}

std::optional<Tenant> ApiKeys::check(std::string_view authorization) const {
  if (entries_.empty()) return Tenant{};
  constexpr std::string_view kBearer = "Bearer ";
  if (!authorization.starts_with(kBearer)) return std::nullopt;
  authorization.remove_prefix(kBearer.size());
  const std::vector<std::string_view> words = split_words(authorization);
  const Digest given = digest(words.empty() ? std::string_view() : words[0]);
  const Entry* found = nullptr;
  for (const Entry& entry : entries_) {  // all of them, found or not
    if (CRYPTO_memcmp(entry.digest.data(), given.data(), given.size()) == 0) found = &entry;
  }
  if (found == nullptr || words.size() != 1) return std::nullopt;
  return found->tenant;
}

std::vector<std::string> ApiKeys::salts() const {
  std::set<std::string> salts;
  for (const Entry& entry : entries_) {
    if (!entry.tenant.salt.empty()) salts.insert(combine_salts(entry.tenant.salt, {}));
  }
  return {salts.begin(), salts.end()};
}

std::string combine_salts(std::string_view tenant_salt, std::string_view cache_salt) {
  constexpr std::string_view kTenant = "tenant:";
  if (!tenant_salt.empty()) {
    return fmt::format("{}{:02x}:{}", kTenant, fmt::join(ApiKeys::digest(tenant_salt), ""),
                       cache_salt);
  }
  // What looks like a tenant's is made something that no tenant's is: 't' is no hexadecimal digit.
  return fmt::format("{}{}", cache_salt.starts_with(kTenant) ? kTenant : "", cache_salt);
}

}  // namespace kvant::serve::openai
