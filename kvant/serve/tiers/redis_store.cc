#include "kvant/serve/tiers/redis_store.h"

#include <algorithm>
#include <utility>

namespace kvant::serve {

namespace {

Error refused(const std::string& text) {
  const bool full = text.starts_with("OOM");
  return Error(full ? ErrorCode::kResourceExhausted : ErrorCode::kIoError,
               "the remote cache refused: " + text);
}

}  // namespace

Result<std::unique_ptr<RedisStore>> RedisStore::create(std::string_view url,
                                                       int64_t lifetime_seconds,
                                                       const RedisOptions& options) {
  KVANT_ASSIGN(RedisUrl parsed, parse_redis_url(url));
  return std::unique_ptr<RedisStore>(new RedisStore(std::move(parsed), lifetime_seconds, options));
}

std::string RedisStore::redis_key(const PageName& name) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string key = "kvant:{";
  for (const uint8_t byte : name.key) {
    key += kDigits[byte >> 4];
    key += kDigits[byte & 15];
  }
  return key + "}:" + std::to_string(name.group);
}

std::vector<Result<RedisReply>> RedisStore::each(std::string_view command,
                                                 std::span<const PageName> names) {
  std::vector<RedisClient::Command> commands(names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    commands[i].key = redis_key(names[i]);
    commands[i].args = {command, commands[i].key};
  }
  return client_.run(commands);
}

std::vector<Result<ObjectBytes>> RedisStore::get_many(std::span<const PageName> names) {
  std::vector<Result<ObjectBytes>> objects;
  for (Result<RedisReply>& reply : each("GET", names)) {
    if (!reply) {
      objects.push_back(reply.error());
    } else if (reply->kind == RedisReply::Kind::kError) {
      objects.push_back(refused(reply->text));
    } else if (reply->kind != RedisReply::Kind::kText) {
      objects.push_back(not_stored());
    } else {
      const auto bytes = std::as_bytes(std::span(reply->text));
      objects.push_back(std::make_shared<const std::vector<std::byte>>(bytes.begin(), bytes.end()));
    }
  }
  return objects;
}

std::vector<PageStore::Held> RedisStore::contains_many(std::span<const PageName> names) {
  std::vector<Held> found;
  for (const Result<RedisReply>& reply : each("EXISTS", names)) {
    if (!reply || reply->kind != RedisReply::Kind::kInteger)
      found.push_back(Held::kUnknown);
    else
      found.push_back(reply->integer > 0 ? Held::kYes : Held::kNo);
  }
  return found;
}

Result<ObjectBytes> RedisStore::get(const PageName& name) {
  return get_many(std::span(&name, 1)).front();
}

bool RedisStore::contains(const PageName& name) {
  return contains_many(std::span(&name, 1)).front() == Held::kYes;
}

void RedisStore::remove(const PageName& name) {
  (void)each("DEL", std::span(&name, 1));
}

Result<PageStore::Put> RedisStore::put(const PageName& name, const ObjectBytes& object) {
  const std::string lifetime = std::to_string(lifetime_ms_);
  RedisClient::Command command;
  command.key = redis_key(name);
  const std::string_view value(reinterpret_cast<const char*>(object->data()), object->size());
  command.args = {"SET", command.key, value, "PX", lifetime, "NX"};
  const Result<RedisReply> reply = client_.run(std::span(&command, 1)).front();
  if (!reply) return reply.error();
  if (reply->kind == RedisReply::Kind::kError) return refused(reply->text);
  return reply->kind == RedisReply::Kind::kNil ? Put::kAlreadyThere : Put::kStored;
}

}  // namespace kvant::serve
