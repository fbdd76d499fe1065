#include "kvant/serve/tiers/disk_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

namespace kvant::serve {

namespace {

constexpr std::string_view kPrefix = "pages-";
constexpr std::string_view kSuffix = ".slab";

}  // namespace

std::string DiskStore::slab_path(int64_t slot_bytes) const {
  return folder_ + "/" + std::string(kPrefix) + std::to_string(slot_bytes) + std::string(kSuffix);
}

Result<std::unique_ptr<DiskStore>> DiskStore::open(const std::string& folder, int64_t limit_bytes) {
  std::unique_ptr<DiskStore> store(new DiskStore());
  store->folder_ = folder;
  store->limit_bytes_ = limit_bytes;
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  const std::string lock = folder + "/lock";
  store->lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (store->lock_ < 0) {
    return Error(ErrorCode::kIoError, folder + ": cannot write: " + std::strerror(errno) +
                                          "; name a folder on a disk with free space");
  }
  if (::flock(store->lock_, LOCK_EX | LOCK_NB) != 0) {
    return Error(ErrorCode::kInvalidArgument,
                 folder + ": another process uses this folder; give each server its own");
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix)) continue;
    const auto slot_bytes = SlabFile::read_slot_bytes(entry.path().string());
    if (!slot_bytes || entry.path().string() != store->slab_path(*slot_bytes)) {
      ++store->recovery_.bad_files;
      continue;
    }
    auto file = SlabFile::open(entry.path().string(), *slot_bytes);
    if (!file || !store->recover_slab(*slot_bytes, std::move(*file))) ++store->recovery_.bad_files;
  }
  if (error) {
    return Error(ErrorCode::kIoError, folder + ": cannot list: " + error.message());
  }
  // The limit may be lower than last time.
  while (store->bytes_ > limit_bytes && !store->uses_.empty()) store->evict_oldest();
  store->evicted_.clear();
  store->recovery_.pages = static_cast<int64_t>(store->pages_.size());
  return store;
}

DiskStore::~DiskStore() {
  if (lock_ >= 0) ::close(lock_);
}

Status DiskStore::recover_slab(int64_t slot_bytes, SlabFile file) {
  Slab slab{std::move(file), {}};
  for (int64_t slot = slab.file.num_slots() - 1; slot >= 0; --slot) {
    const auto info = slab.file.read_header(slot);
    const PageName name = info ? PageName{info->header.key, info->header.layer_group} : PageName{};
    if (!info || pages_.contains(name)) {
      if (info || info.error().code() != ErrorCode::kNotFound) {
        ++recovery_.bad_slots;
        KVANT_TRY(slab.file.erase(slot));
      }
      slab.free_slots.push_back(slot);
      continue;
    }
    pages_.emplace(name, Page{slot_bytes, slot, uses_.insert(uses_.begin(), name)});
    bytes_ += slot_bytes;
  }
  slabs_.emplace(slot_bytes, std::move(slab));
  return {};
}

std::vector<cache::PageObjectHeader> DiskStore::headers() const {
  std::vector<cache::PageObjectHeader> headers;
  for (const PageName& name : uses_) {
    const Page& page = pages_.at(name);
    auto info = slabs_.at(page.slot_bytes).file.read_header(page.slot);
    if (info) headers.push_back(std::move(info->header));
  }
  return headers;
}

Result<DiskStore::Slab*> DiskStore::slab_for(int64_t slot_bytes) {
  const auto found = slabs_.find(slot_bytes);
  if (found != slabs_.end()) return &found->second;
  KVANT_ASSIGN(SlabFile file, SlabFile::open(slab_path(slot_bytes), slot_bytes));
  return &slabs_.emplace(slot_bytes, Slab{std::move(file), {}}).first->second;
}

Result<ObjectBytes> DiskStore::get(const PageName& name) {
  const auto found = pages_.find(name);
  if (found == pages_.end()) return not_stored();
  uses_.splice(uses_.end(), uses_, found->second.use);
  auto object = slabs_.at(found->second.slot_bytes).file.read(found->second.slot);
  if (!object) {
    // Somebody emptied the slot. Called damage, the page is dropped and may be written again.
    if (object.error().code() == ErrorCode::kNotFound)
      return Error(ErrorCode::kCorruptData, "a page has gone from its slot");
    return object.error();
  }
  return std::make_shared<const std::vector<std::byte>>(std::move(*object));
}

Result<PageStore::Put> DiskStore::put(const PageName& name, const ObjectBytes& object) {
  const auto found = pages_.find(name);
  if (found != pages_.end()) {
    uses_.splice(uses_.end(), uses_, found->second.use);
    return Put::kAlreadyThere;
  }
  const int64_t slot_bytes = slot_bytes_of(static_cast<int64_t>(object->size()));
  if (slot_bytes > limit_bytes_ || slot_bytes > kMaxSlotBytes) {
    return Error(ErrorCode::kResourceExhausted, "a page of " + std::to_string(slot_bytes) +
                                                    " bytes does not fit the disk tier of " +
                                                    std::to_string(limit_bytes_));
  }
  while (bytes_ + slot_bytes > limit_bytes_) evict_oldest();
  KVANT_ASSIGN(Slab * slab, slab_for(slot_bytes));
  Status written;
  int64_t slot = 0;
  // A disk that is fuller than the limit foresaw: give up as much as the page needs, once.
  for (int attempt = 0; attempt < 2; ++attempt) {
    slot = slab->free_slots.empty() ? slab->file.num_slots() : slab->free_slots.back();
    written = slab->file.write(slot, *object);
    if (written || written.error().code() != ErrorCode::kResourceExhausted) break;
    const int64_t enough = bytes_ - slot_bytes;
    while (bytes_ > enough && !uses_.empty()) evict_oldest();
  }
  if (!written) return written.error();
  if (!slab->free_slots.empty() && slab->free_slots.back() == slot) slab->free_slots.pop_back();
  pages_.emplace(name, Page{slot_bytes, slot, uses_.insert(uses_.end(), name)});
  bytes_ += slot_bytes;
  return Put::kStored;
}

void DiskStore::evict_oldest() {
  const PageName oldest = uses_.front();
  evicted_.push_back({oldest, nullptr});
  remove(oldest);
}

void DiskStore::remove(const PageName& name) {
  const auto found = pages_.find(name);
  if (found == pages_.end()) return;
  const Page page = found->second;
  Slab& slab = slabs_.at(page.slot_bytes);
  // Without its zeroed header a slot is not used again before a restart.
  if (slab.file.erase(page.slot)) slab.free_slots.push_back(page.slot);
  bytes_ -= page.slot_bytes;
  uses_.erase(page.use);
  pages_.erase(found);
}

Status DiskStore::clear() {
  while (!uses_.empty()) remove(uses_.front());
  return {};
}

}  // namespace kvant::serve
