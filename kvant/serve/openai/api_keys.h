// Who may use the server. A key file has one key a line, and optionally a name and a salt behind
// it, in blanks; lines that start with '#' are comments:
//
//   sk-8f3ac1...  alice  4711
//   sk-77b02e...  bob
//
// The name is the tenant in logs and in the fair sharing of the machine; the salt keeps the cached
// prefixes of one key apart from those of keys with other salts.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvant/base/result.h"

namespace kvant::serve::openai {

struct Tenant {
  std::string name;
  std::string salt;
};

// Immutable and thread-safe.
class ApiKeys {
 public:
  // No keys: everybody may.
  ApiKeys() = default;
  // kInvalidArgument naming the line: an empty file, a doubled key, more than three words.
  static Result<ApiKeys> parse(std::string_view text);

  bool empty() const { return entries_.empty(); }
  // The tenant of "Authorization: Bearer KEY", in a time that does not depend on how much of a key
  // is right; nullopt: no such key. Without keys a nameless tenant.
  std::optional<Tenant> check(std::string_view authorization) const;
  // What combine_salts makes of each tenant's salt alone: of their requests without a cache_salt.
  std::vector<std::string> salts() const;

  using Digest = std::array<unsigned char, 32>;
  static Digest digest(std::string_view text);  // SHA-256

 private:
  struct Entry {
    Digest digest;  // the key itself is not kept
    Tenant tenant;
  };
  std::vector<Entry> entries_;
};

// What tells the pages of one tenant and one client's cache_salt from those of others: different
// for different pairs, empty if both are. KV events show it (`extra_keys`): without a tenant's salt
// it is the client's own, as routers expect; a tenant's salt, a secret, is in it as its SHA-256.
std::string combine_salts(std::string_view tenant_salt, std::string_view cache_salt);

}  // namespace kvant::serve::openai
