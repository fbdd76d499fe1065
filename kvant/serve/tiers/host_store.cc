#include "kvant/serve/tiers/host_store.h"

#include <string>
#include <utility>

namespace kvant::serve {

Result<ObjectBytes> HostStore::get(const PageName& name) {
  const auto found = pages_.find(name);
  if (found == pages_.end()) return not_stored();
  uses_.splice(uses_.end(), uses_, found->second.use);
  return found->second.object;
}

Result<PageStore::Put> HostStore::put(const PageName& name, const ObjectBytes& object) {
  const auto found = pages_.find(name);
  if (found != pages_.end()) {
    uses_.splice(uses_.end(), uses_, found->second.use);
    return Put::kAlreadyThere;
  }
  const int64_t bytes = static_cast<int64_t>(object->size());
  if (bytes > limit_bytes_) {
    return Error(ErrorCode::kResourceExhausted, "a page of " + std::to_string(bytes) +
                                                    " bytes does not fit the host tier of " +
                                                    std::to_string(limit_bytes_));
  }
  while (bytes_ + bytes > limit_bytes_) {
    const PageName oldest = uses_.front();
    evicted_.push_back({oldest, pages_.at(oldest).object});
    remove(oldest);
  }
  pages_.emplace(name, Page{object, uses_.insert(uses_.end(), name)});
  bytes_ += bytes;
  return Put::kStored;
}

void HostStore::remove(const PageName& name) {
  const auto found = pages_.find(name);
  if (found == pages_.end()) return;
  bytes_ -= static_cast<int64_t>(found->second.object->size());
  uses_.erase(found->second.use);
  pages_.erase(found);
}

Status HostStore::clear() {
  pages_.clear();
  uses_.clear();
  bytes_ = 0;
  return {};
}

}  // namespace kvant::serve
