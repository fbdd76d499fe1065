#include "kvant/serve/tiers/page_tiers.h"

#include <algorithm>
#include <utility>

#include "kvant/cache/page_object.h"

namespace kvant::serve {

using cache::Layout;
using cache::Medium;
using cache::PageKey;

namespace {

// A ticket names a prefetch and one object of it.
constexpr int kIndexBits = 24;
uint64_t ticket_of(uint64_t id, int64_t index) {
  return id << kIndexBits | static_cast<uint64_t>(index);
}

std::span<const uint32_t> as_u32(std::span<const int32_t> tokens) {
  return {reinterpret_cast<const uint32_t*>(tokens.data()), tokens.size()};
}

}  // namespace

PageTiers::PageTiers(cache::KvCache& cache, std::vector<TierSetup> tiers) : cache_(cache) {
  for (TierSetup& setup : tiers) {
    for (cache::PageObjectHeader& header : setup.store->headers()) {
      // Another model's pages stay until they are evicted.
      if (std::ranges::equal(header.fingerprint, cache.fingerprint()))
        kept_.emplace_back(tiers_.size(), std::move(header));
    }
    Tier::Convert to_planar, to_own;
    if (setup.store->medium() != Medium::kHost && cache.config().layout != Layout::kPlanar) {
      to_planar = [&cache](const std::vector<std::byte>& object) {
        return cache.convert_object(object, Layout::kPlanar);
      };
      to_own = [&cache](const std::vector<std::byte>& object) {
        return cache.convert_object(object, cache.config().layout);
      };
    }
    tiers_.push_back(
        std::make_unique<Tier>(std::move(setup.store), setup.options, to_planar, to_own));
  }
  held_.resize(tiers_.size());
  // Parents first.
  std::ranges::stable_sort(kept_, {}, [](const auto& page) { return page.second.first_position; });
}

PageTiers::~PageTiers() = default;

void PageTiers::set_observer(cache::PageObserver* observer) {
  observer_ = observer;
  for (const auto& [tier, header] : std::exchange(kept_, {})) tell_stored(tier, header, {});
}

void PageTiers::set_wakeup(const std::function<void()>& wakeup) {
  for (const auto& tier : tiers_) tier->set_wakeup(wakeup);
}

std::optional<std::string> PageTiers::parent_salt(const PageKey& parent_key, uint32_t group) const {
  if (const auto found = in_tree_.find(parent_key); found != in_tree_.end()) return found->second;
  const bool windowed = cache_.group(static_cast<int>(group)).geometry.window > 0;
  for (const auto& names : held_) {
    if (const auto found = names.find({parent_key, group}); found != names.end())
      return found->second;
    for (int g = 0; windowed && g < num_groups(); ++g) {
      const auto found = names.find({parent_key, static_cast<uint32_t>(g)});
      if (found != names.end()) return found->second;
    }
  }
  return std::nullopt;
}

// The key of a page that begins a sequence says with which salt it was made.
std::optional<std::string> PageTiers::known_salt(const cache::PageObjectHeader& header) const {
  const auto fits = [&](std::string_view salt) {
    return header.key == cache::page_key({}, cache_.fingerprint(), salt, header.token_ids);
  };
  if (fits({})) return std::string();
  const auto found = std::ranges::find_if(known_salts_, fits);
  if (found == known_salts_.end()) return std::nullopt;
  return *found;
}

void PageTiers::tell_stored(size_t tier, const cache::PageObjectHeader& header,
                            std::optional<std::string_view> root_salt) {
  const PageName name{header.key, header.layer_group};
  if (held_[tier].contains(name)) return;
  std::optional<std::string> salt;
  if (header.first_position > 0) {
    salt = parent_salt(header.parent_key, header.layer_group);
  } else if (root_salt) {
    salt = *root_salt;
  } else {
    salt = known_salt(header);
  }
  if (!salt) return;
  const std::string& told = held_[tier].emplace(name, std::move(*salt)).first->second;
  if (observer_ == nullptr) return;
  const int group = static_cast<int>(header.layer_group);
  observer_->pages_stored({.medium = tiers_[tier]->medium(),
                           .group = group,
                           .window = cache_.group(group).geometry.window,
                           .parent_key = header.parent_key,
                           .keys = std::span(&header.key, 1),
                           .token_ids = header.token_ids,
                           .salt = told});
}

// What a request finds in a tier without its having been told is from earlier, under a salt that
// only the request knows.
void PageTiers::tell_found(size_t tier, const Prefetch& prefetch, const std::vector<bool>& found) {
  if (tiers_[tier]->medium() == Medium::kRemote) return;
  const int64_t t = cache_.config().page_tokens;
  const std::span<const uint32_t> tokens = as_u32(prefetch.request.tokens);
  for (size_t i = 0; i < found.size(); ++i) {
    const PageName page = name(prefetch, static_cast<int64_t>(i));
    if (!found[i] || held_[tier].contains(page)) continue;
    const int64_t index = static_cast<int64_t>(i) / num_groups();
    const auto ids = tokens.subspan(index * t, t);
    cache::PageObjectHeader header;
    header.key = page.key;
    header.parent_key = index == 0 ? prefetch.request.parent_key : prefetch.keys[index - 1];
    header.layer_group = page.group;
    header.first_position = static_cast<uint64_t>((prefetch.request.first_page + index) * t);
    header.token_ids.assign(ids.begin(), ids.end());
    tell_stored(tier, header, prefetch.request.salt);
  }
}

void PageTiers::forget(size_t tier, const PageName& name) {
  if (held_[tier].erase(name) == 0 || observer_ == nullptr) return;
  const int group = static_cast<int>(name.group);
  observer_->pages_removed({.medium = tiers_[tier]->medium(),
                            .group = group,
                            .window = cache_.group(group).geometry.window,
                            .keys = std::span(&name.key, 1)});
}

// ---- writing ----

void PageTiers::give(size_t tier, const PageName& name, const ObjectBytes& object,
                     std::optional<std::string_view> salt) {
  if (held_[tier].contains(name) || !tiers_[tier]->put(name, object)) return;
  if (tiers_[tier]->medium() == Medium::kRemote) return;
  const auto info = cache::parse_page_object_header(*object);
  if (info) tell_stored(tier, info->header, salt);
}

void PageTiers::offer(const cache::TreePage& page, std::span<const size_t> tiers, int group) {
  cache::KvCache::PageIdentity identity{};
  std::ranges::copy(page.key, identity.key);
  std::ranges::copy(page.parent_key, identity.parent_key);
  identity.token_ids = page.token_ids;
  for (int g = 0; g < num_groups(); ++g) {
    if ((group >= 0 && g != group) || !page.held.has(g)) continue;
    const PageName name{page.key, static_cast<uint32_t>(g)};
    const bool wanted =
        std::ranges::any_of(tiers, [&](size_t tier) { return !held_[tier].contains(name); });
    if (!wanted) continue;
    auto object = cache_.export_held(page.held, g, identity, cache_.config().layout);
    if (!object) continue;
    const auto bytes = std::make_shared<const std::vector<std::byte>>(std::move(*object));
    for (const size_t tier : tiers) give(tier, name, bytes, page.salt);
  }
}

void PageTiers::page_inserted(const cache::TreePage& page) {
  in_tree_.emplace(page.key, page.salt);
  std::vector<size_t> wanting;
  for (size_t tier = 0; tier < tiers_.size(); ++tier) {
    if (tiers_[tier]->options().policy == WritePolicy::kWriteThrough) wanting.push_back(tier);
  }
  offer(page, wanting, -1);
}

void PageTiers::page_hit(const cache::TreePage& page) {
  std::vector<size_t> wanting;
  for (size_t tier = 0; tier < tiers_.size(); ++tier) {
    const TierOptions& options = tiers_[tier]->options();
    if (options.policy != WritePolicy::kSelective) continue;
    const int64_t wanted = std::max(1, options.min_hits);
    // Now and then again, as a tier may have dropped or evicted it.
    if (page.hits == wanted || (page.hits > wanted && (page.hits - wanted) % 16 == 0))
      wanting.push_back(tier);
  }
  offer(page, wanting, -1);
}

void PageTiers::page_evicted(const cache::TreePage& page, cache::EvictionCause cause, int group) {
  const size_t nearest = 0;
  if (cause != cache::EvictionCause::kCleared && !tiers_.empty() &&
      tiers_[nearest]->options().policy == WritePolicy::kWriteBack)
    offer(page, std::span(&nearest, 1), group);
  if (group < 0) in_tree_.erase(page.key);
}

void PageTiers::store_all(const cache::PrefixTree& tree) {
  const auto lasting = std::ranges::find_if(
      tiers_, [](const auto& tier) { return tier->medium() != Medium::kHost; });
  if (lasting == tiers_.end()) return;
  const size_t tier = static_cast<size_t>(lasting - tiers_.begin());
  tree.for_each_page([&](const cache::TreePage& page) {
    // There is time, and nothing should be dropped.
    if (2 * tiers_[tier]->queued_bytes() >= tiers_[tier]->options().max_queued_bytes)
      tiers_[tier]->wait_idle();
    offer(page, std::span(&tier, 1), -1);
  });
}

// ---- loading ----

int64_t PageTiers::object_bytes(int64_t page, int group) const {
  return cache::kPageObjectHeaderBytes +
         cache_.page_class(cache_.closed_page_class(group, page)).page_bytes;
}

bool PageTiers::is_read(const Prefetch& prefetch, int64_t page, int group,
                        int64_t num_pages) const {
  const int64_t first = prefetch.request.first_page;
  return first + page >= cache_.first_needed_page(group, first + num_pages);
}

template <typename Has>
int64_t PageTiers::usable_pages(const Prefetch& prefetch, int64_t limit, Has has) const {
  for (int64_t n = limit; n > 0; --n) {
    bool usable = true;
    for (int g = 0; usable && g < num_groups(); ++g) {
      for (int64_t page = n; usable && page-- > 0 && is_read(prefetch, page, g, n);)
        usable = has(page, g);
    }
    if (usable) return n;
  }
  return 0;
}

PageTiers::PrefetchId PageTiers::prefetch(PrefetchRequest request) {
  const int64_t t = cache_.config().page_tokens;
  const PrefetchId id = next_id_++;
  Prefetch& prefetch = prefetches_[id];
  ++stats_.prefetches;
  PageKey key = request.parent_key;
  const std::span<const uint32_t> tokens = as_u32(request.tokens);
  const int64_t most = (int64_t{1} << kIndexBits) / num_groups();
  const int64_t pages = std::min(static_cast<int64_t>(tokens.size()) / t, most);
  for (int64_t page = 0; page < pages; ++page) {
    key = cache::page_key(key, cache_.fingerprint(), request.salt, tokens.subspan(page * t, t));
    prefetch.keys.push_back(key);
  }
  prefetch.request = std::move(request);
  const int64_t names = pages * num_groups();
  prefetch.source.assign(names, -1);
  prefetch.objects.resize(names);
  if (names == 0) return id;
  std::vector<PageName> asked;
  for (int64_t i = 0; i < names; ++i) asked.push_back(name(prefetch, i));
  prefetch.probes_left = num_tiers();
  prefetch.answers_left.assign(tiers_.size(), 1);
  for (const auto& tier : tiers_) tier->probe(ticket_of(id, 0), asked);
  return id;
}

// All tiers have said what they hold.
void PageTiers::choose(uint64_t id, Prefetch& prefetch) {
  const int groups = num_groups();
  const int64_t t = cache_.config().page_tokens;
  const auto has = [&](int64_t page, int g) { return prefetch.source[page * groups + g] >= 0; };
  // No further than full-attention pages go, to begin with.
  int64_t limit = 0;
  const auto complete = [&](int64_t page) {
    for (int g = 0; g < groups; ++g) {
      if (cache_.group(g).geometry.window == 0 && !has(page, g)) return false;
    }
    return true;
  };
  while (limit < static_cast<int64_t>(prefetch.keys.size()) && complete(limit)) ++limit;
  const int64_t pages = usable_pages(prefetch, limit, has);
  std::vector<int64_t> tier_bytes(tiers_.size(), 0);
  std::vector<int64_t> wanted;
  double compute_seconds = 0;
  for (int64_t page = 0; page < pages; ++page) {
    const int64_t number = prefetch.request.first_page + page;
    compute_seconds +=
        static_cast<double>(t) *
        (costs_.token_seconds + costs_.token_context_seconds * static_cast<double>(number * t));
    for (int g = 0; g < groups; ++g) {
      if (!is_read(prefetch, page, g, pages)) continue;
      const int64_t index = page * groups + g;
      wanted.push_back(index);
      tier_bytes[prefetch.source[index]] += object_bytes(number, g);
    }
  }
  // Tiers work beside each other.
  double load_seconds = 0;
  for (size_t i = 0; i < tiers_.size(); ++i) {
    if (tier_bytes[i] > 0)
      load_seconds = std::max(load_seconds, tiers_[i]->load_seconds(tier_bytes[i]));
  }
  if (costs_.token_seconds > 0 && load_seconds >= compute_seconds) {
    if (pages > 0) ++stats_.skipped_by_cost;
    return;
  }
  prefetch.num_pages = pages;
  prefetch.gets_left = static_cast<int64_t>(wanted.size());
  for (const int64_t index : wanted) {
    ++prefetch.answers_left[prefetch.source[index]];
    tiers_[prefetch.source[index]]->get(ticket_of(id, index), name(prefetch, index));
  }
}

bool PageTiers::ready(PrefetchId id) const {
  const auto found = prefetches_.find(id);
  return found == prefetches_.end() || found->second.ready();
}

int64_t PageTiers::expected_pages(PrefetchId id) const {
  const auto found = prefetches_.find(id);
  return found == prefetches_.end() ? 0 : found->second.num_pages;
}

void PageTiers::cancel(PrefetchId id) {
  prefetches_.erase(id);
}

void PageTiers::give_up(PrefetchId id) {
  const auto found = prefetches_.find(id);
  if (found == prefetches_.end()) return;
  const std::vector<int64_t>& left = found->second.answers_left;
  for (size_t tier = 0; tier < left.size(); ++tier)
    stats_.late_answers[static_cast<size_t>(tiers_[tier]->medium())] += left[tier];
  prefetches_.erase(found);
}

bool PageTiers::make_room(cache::PrefixTree& tree,
                          std::span<const std::span<const std::byte>> objects, int64_t page) const {
  std::vector<int64_t> needed(cache_.num_page_classes(), 0);
  for (int g = 0; g < num_groups(); ++g) {
    if (!objects[g].empty()) ++needed[cache_.closed_page_class(g, page)];
  }
  return tree.make_room(needed);
}

int64_t PageTiers::install(PrefetchId id, cache::PrefixTree& tree, cache::PrefixLease& lease) {
  const auto found = prefetches_.find(id);
  if (found == prefetches_.end()) return 0;
  const Prefetch prefetch = std::move(found->second);
  prefetches_.erase(found);
  const int groups = num_groups();
  const int64_t t = cache_.config().page_tokens;
  const int64_t pages = usable_pages(prefetch, prefetch.num_pages, [&](int64_t page, int g) {
    return prefetch.objects[page * groups + g] != nullptr;
  });
  stats_.failed_pages += prefetch.ready() ? prefetch.num_pages - pages : 0;
  // The lease may have grown since, or be another's.
  int64_t page = lease.num_pages() - prefetch.request.first_page;
  if (page < 0 || page >= pages) return 0;
  const PageKey& expected = page == 0 ? prefetch.request.parent_key : prefetch.keys[page - 1];
  if (tree.key(lease) != expected) return 0;
  int64_t installed = 0;
  for (; page < pages; ++page, ++installed) {
    std::vector<std::span<const std::byte>> objects(groups);
    for (int g = 0; g < groups; ++g) {
      const ObjectBytes& object = prefetch.objects[page * groups + g];
      if (object != nullptr && is_read(prefetch, page, g, pages)) objects[g] = *object;
    }
    if (!make_room(tree, objects, prefetch.request.first_page + page)) break;
    auto held = cache_.import_held(objects);
    if (!held) break;
    const auto tokens = std::span(prefetch.request.tokens).subspan(page * t, t);
    if (!tree.insert_held(lease, std::move(*held), tokens, prefetch.request.salt)) break;
    for (int g = 0; g < groups; ++g) {
      if (objects[g].empty()) continue;
      const size_t medium =
          static_cast<size_t>(tiers_[prefetch.source[page * groups + g]]->medium());
      ++stats_.loaded_pages[medium];
      // Tokens are counted once, where the first full-attention group came from.
      const bool full = cache_.group(g).geometry.window == 0;
      if (full && (g == 0 || cache_.group(0).geometry.window > 0))
        stats_.loaded_tokens[medium] += t;
    }
  }
  return installed;
}

// ---- completions ----

void PageTiers::take_in(size_t tier, Tier::Completion completion) {
  for (const EvictedPage& evicted : completion.evicted) {
    const bool write_back =
        tier + 1 < tiers_.size() && tiers_[tier + 1]->options().policy == WritePolicy::kWriteBack;
    if (write_back && evicted.object != nullptr) {
      const auto told = held_[tier].find(evicted.name);
      std::optional<std::string_view> salt;
      if (told != held_[tier].end()) salt = told->second;
      give(tier + 1, evicted.name, evicted.object, salt);
    }
    forget(tier, evicted.name);
  }
  if (completion.kind == Tier::Kind::kPut) {
    if (completion.failed) forget(tier, completion.name);
    return;
  }
  const uint64_t id = completion.ticket >> kIndexBits;
  const auto found = prefetches_.find(id);
  if (found == prefetches_.end()) return;  // cancelled
  Prefetch& prefetch = found->second;
  --prefetch.answers_left[tier];
  if (completion.kind == Tier::Kind::kGet) {
    prefetch.objects[completion.ticket & ((uint64_t{1} << kIndexBits) - 1)] =
        std::move(completion.object);
    --prefetch.gets_left;
    return;
  }
  tell_found(tier, prefetch, completion.found);
  for (size_t i = 0; i < completion.found.size(); ++i) {
    int& source = prefetch.source[i];
    const int from = static_cast<int>(tier);
    if (completion.found[i] && (source < 0 || from < source)) source = from;
  }
  if (--prefetch.probes_left == 0) choose(id, prefetch);
}

void PageTiers::poll() {
  for (size_t tier = 0; tier < tiers_.size(); ++tier) {
    for (Tier::Completion& completion : tiers_[tier]->poll()) take_in(tier, std::move(completion));
  }
}

void PageTiers::wait_idle() {
  // What one tier evicts may be written to the next, and a probe may be followed by gets.
  for (int round = 0; round < num_tiers() + 2; ++round) {
    for (const auto& tier : tiers_) tier->wait_idle();
    poll();
  }
}

Status PageTiers::clear() {
  wait_idle();
  Status result;
  for (size_t tier = 0; tier < tiers_.size(); ++tier) {
    Status status = tiers_[tier]->clear();
    if (!status && result) result = status;
    held_[tier].clear();
    if (observer_ != nullptr && tiers_[tier]->medium() != Medium::kRemote)
      observer_->all_cleared(tiers_[tier]->medium());
  }
  return result;
}

}  // namespace kvant::serve
