// `kvant bench attention`: time of one attention call over a filled cache, against the time of
// reading the same bytes.
#include <fmt/format.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvant/attention/reference.h"
#include "kvant/backend/backend.h"
#include "kvant/base/thread_pool.h"
#include "kvant/cache/kv_cache.h"
#include "tools/bench.h"

namespace kvant::tools {
namespace {

// Seconds on the wall, or of this thread's processor: what a call that runs on one thread costs
// however busy the machine is.
enum class Clock { kWall, kProcessor };

double now(Clock clock) {
  timespec time;
  clock_gettime(clock == Clock::kProcessor ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Options {
  std::string heads = "32/8";
  int head_dim = 128;
  int64_t tokens = 32768;
  int batch = 1;
  int64_t shared_prefix = 0;
  int new_tokens = 1;
  int page_tokens = 64;
  int threads = 0;
  double seconds = 1.0;
  int64_t rotate_mib = -1;  // 8x the last-level cache
  std::vector<std::string> kv;

  int num_query_heads = 0;
  int num_kv_heads = 0;

  Clock clock() const { return threads == 1 ? Clock::kProcessor : Clock::kWall; }
};

int64_t last_level_cache_bytes() {
  for (int name : {_SC_LEVEL4_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE, _SC_LEVEL2_CACHE_SIZE}) {
    const long bytes = sysconf(name);
    if (bytes > 0) return bytes;
  }
  return int64_t{32} << 20;
}

// About normal and fast; the same on every run.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}
  void fill(std::vector<float>& values) {
    for (float& value : values) {
      float sum = -2.0f;
      for (int i = 0; i < 4; ++i) {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
        sum += static_cast<float>(state_ >> 40) * 0x1p-24f;
      }
      value = 1.7f * sum;
    }
  }

 private:
  uint64_t state_;
};

// A cache whose layers are copies of one another, so that calls on layer after layer find their
// bytes in memory, not in a processor's cache.
class RotatingCache {
 public:
  RotatingCache(const Options& options, backend::Backend& backend)
      : options_(options), backend_(backend) {}

  Status create(const formats::CacheFormat& format, int64_t wanted_bytes, int64_t limit_bytes) {
    cache::CacheConfig config;
    config.format = format;
    config.page_tokens = options_.page_tokens;
    config.layout = backend_.info().page_layout;
    config.max_sequences = options_.batch;
    config.max_step_tokens = std::max(options_.batch * options_.new_tokens, 512);
    config.max_tokens = options_.batch * (options_.tokens + options_.page_tokens);
    const auto bytes_of = [&](int64_t copies) -> Result<int64_t> {
      config.layers.assign(static_cast<size_t>(copies),
                           {options_.num_kv_heads, options_.head_dim, 0});
      KVANT_ASSIGN(const cache::CacheBytes bytes, cache::plan_cache_bytes(config));
      return bytes.stored_pages_reserved + bytes.bf16_pages_reserved;
    };
    KVANT_ASSIGN(const int64_t one, bytes_of(1));
    int64_t copies = std::max<int64_t>(1, (wanted_bytes + one - 1) / one);
    if (copies * one > limit_bytes) copies = std::max<int64_t>(1, limit_bytes / one);
    copies = std::min<int64_t>(copies, 65536);
    KVANT_ASSIGN(total_bytes_, bytes_of(copies));
    KVANT_ASSIGN(cache_, cache::KvCache::create(config, backend_.memory()));
    KVANT_ASSIGN(const cache::SequenceId first, cache_->add_sequence());
    ids_.push_back(first);
    return {};
  }

  // All but the last `new_tokens` of every sequence, in layer 0; then one open step, copied to all
  // layers, that stays open for measuring.
  Status fill(Progress& progress) {
    const int64_t before = options_.tokens - options_.new_tokens;
    Noise noise(7);
    const int64_t shared = std::min(options_.shared_prefix, before);
    KVANT_TRY(extend(0, shared, noise, progress));
    for (int s = 1; s < options_.batch; ++s) {
      KVANT_ASSIGN(const cache::SequenceId id,
                   shared > 0 ? cache_->fork(ids_[0]) : cache_->add_sequence());
      ids_.push_back(id);
    }
    for (size_t s = 0; s < ids_.size(); ++s) KVANT_TRY(extend(s, before, noise, progress));
    std::vector<cache::StepSequence> steps;
    for (cache::SequenceId id : ids_) steps.push_back({id, options_.new_tokens});
    KVANT_TRY(cache_->begin_step(steps));
    KVANT_TRY(append(noise, int64_t{options_.batch} * options_.new_tokens));
    copy_layers();
    return {};
  }

  const cache::GroupView& view() const { return cache_->view(0); }
  int num_copies() const { return static_cast<int>(cache_->config().layers.size()); }
  int64_t total_bytes() const { return total_bytes_; }

  // The units that one call on `layer` reads, and how many bytes of each; those that sequences
  // share count once.
  struct Piece {
    const std::byte* data;
    int64_t bytes;
  };
  std::vector<Piece> pieces(int layer) const {
    std::vector<Piece> result;
    for_units([&](const cache::PageKind& kind, cache::PageEntry entry, int head, int64_t tokens) {
      const int64_t bytes = kind.units[layer].bytes;
      result.push_back(
          {kind.unit(entry, layer, head), bytes * tokens / options_.page_tokens / 64 * 64});
    });
    return result;
  }

 private:
  Status extend(size_t sequence, int64_t length, Noise& noise, Progress& progress) {
    const cache::SequenceId id = ids_[sequence];
    while (cache_->length(id) < length) {
      const int64_t n = std::min<int64_t>(512, length - cache_->length(id));
      const cache::StepSequence step{id, static_cast<int32_t>(n)};
      KVANT_TRY(cache_->begin_step({&step, 1}));
      const Status appended = append(noise, n);
      if (!appended) {
        cache_->abort_step();
        return appended;
      }
      cache_->commit_step();
      KVANT_TRY(Console::check_stop());
      progress.update(static_cast<int64_t>(sequence) * length + cache_->length(id));
    }
    return {};
  }

  Status append(Noise& noise, int64_t rows) {
    std::vector<float> k(static_cast<size_t>(rows * options_.num_kv_heads * options_.head_dim));
    std::vector<float> v(k.size());
    noise.fill(k);
    noise.fill(v);
    return backend_.append({&view(), 0, k.data(), v.data()});
  }

  template <typename F>
  void for_units(F&& f) const {
    const cache::GroupView& v = view();
    for (const cache::SequenceView& seq : v.sequences) {
      const int64_t last = seq.first_position + seq.num_new_tokens - 1;
      const int64_t own = seq.first_position / v.page_tokens;
      for (int64_t page = 0; page <= last / v.page_tokens; ++page) {
        const bool bf16 = own - page <= seq.recent_pages;
        const cache::PageEntry entry =
            bf16 ? seq.bf16[page - seq.bf16_first_page] : seq.stored[page];
        const cache::SequenceView& leader = v.sequences[0];
        if (&seq != &leader && !bf16 && leader.stored[page] == entry) continue;
        const int64_t tokens = std::min<int64_t>(v.page_tokens, last + 1 - page * v.page_tokens);
        for (int head = 0; head < v.num_kv_heads; ++head) {
          f(v.kinds[entry.kind], entry, head, tokens);
        }
      }
    }
  }

  void copy_layers() {
    for_units([&](const cache::PageKind& kind, cache::PageEntry entry, int head, int64_t) {
      if (entry.kind == cache::kKindStaging) return;  // one layer at a time: shared by all
      for (int layer = 1; layer < num_copies(); ++layer) {
        std::memcpy(kind.unit(entry, layer, head), kind.unit(entry, 0, head),
                    static_cast<size_t>(kind.units[0].bytes));
      }
    });
  }

  const Options& options_;
  backend::Backend& backend_;
  std::unique_ptr<cache::KvCache> cache_;
  std::vector<cache::SequenceId> ids_;
  int64_t total_bytes_ = 0;
};

// Bytes per second of plain loads of the pieces of layer after layer: the best of many rounds, some
// of which fetch ahead.
class ReadCeiling {
 public:
  ReadCeiling(int threads, Clock clock) : clock_(clock), pool_(threads) {}

  double measure(const RotatingCache& cache, double seconds) {
    double best = 0.0;
    const double start = now(clock_);
    for (int round = 0; round < 6 || now(clock_) < start + seconds; ++round) {
      constexpr int64_t kAhead[] = {0, 1024, 4096};
      const auto pieces = cache.pieces(round % cache.num_copies());
      int64_t bytes = 0;
      for (const RotatingCache::Piece& piece : pieces) bytes += piece.bytes;
      const double begin = now(clock_);
      read(pieces, kAhead[round % 3]);
      best = std::max(best, static_cast<double>(bytes) / (now(clock_) - begin));
    }
    return best;
  }

 private:
  using Words = uint64_t __attribute__((vector_size(16), aligned(16)));

  void read(const std::vector<RotatingCache::Piece>& pieces, int64_t ahead) {
    const auto num_tasks = static_cast<int64_t>(pool_.num_threads()) * 4;
    const auto n = static_cast<int64_t>(pieces.size());
    pool_.parallel_for(num_tasks, [&](int64_t task, int) {
      Words sums[4] = {};
      const int64_t end = n * (task + 1) / num_tasks;
      for (int64_t i = n * task / num_tasks; i < end; ++i) {
        const RotatingCache::Piece& piece = pieces[static_cast<size_t>(i)];
        const RotatingCache::Piece& next = pieces[static_cast<size_t>(i + 1 < end ? i + 1 : i)];
        for (int64_t at = 0; at < piece.bytes; at += 64) {
          if (ahead != 0) {
            const int64_t then = at + ahead;
            __builtin_prefetch(then < piece.bytes ? piece.data + then
                                                  : next.data + (then - piece.bytes));
          }
          const auto* words = reinterpret_cast<const Words*>(piece.data + at);
          for (int w = 0; w < 4; ++w) sums[w] ^= words[w];
        }
      }
      const Words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
      sink_.store(all[0] ^ all[1], std::memory_order_relaxed);
    });
  }

  const Clock clock_;
  ThreadPool pool_;
  std::atomic<uint64_t> sink_{0};  // so that the loads are not removed
};

struct Row {
  std::string kv;
  std::string resolved;
  Spread us;
  double bytes = 0;  // read by one call
  double ceiling = 0;
  double error = 0;
  int copies = 0;
  int64_t rotation_bytes = 0;

  double gb_per_s() const { return bytes / us.median * 1e-3; }
  double percent() const { return 100.0 * gb_per_s() / (ceiling * 1e-9); }
};

// Error of the first KV head's rows against float64 on the decoded cache.
Result<double> measure_error(const RotatingCache& cache, const backend::AttentionArgs& args) {
  const cache::GroupView& view = cache.view();
  const int group = args.params.num_query_heads / view.num_kv_heads;
  const auto* out = static_cast<const float*>(args.out);
  int64_t rows = 0;
  for (const cache::SequenceView& seq : view.sequences) rows += seq.num_new_tokens;
  const int64_t row_values = int64_t{args.params.num_query_heads} * view.head_dim;
  std::vector<double> exact(static_cast<size_t>(rows * row_values));
  attention::ReferenceArgs reference;
  reference.view = &view;
  reference.group_layer = args.group_layer;
  reference.params = args.params;
  reference.q = static_cast<const float*>(args.q);
  reference.out = exact.data();
  reference.kv_head = 0;
  KVANT_TRY(attention::reference_attention(reference));
  std::vector<float> found;
  std::vector<double> wanted;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * row_values;
    found.insert(found.end(), out + begin, out + begin + group * view.head_dim);
    wanted.insert(wanted.end(), exact.begin() + begin,
                  exact.begin() + begin + group * view.head_dim);
  }
  return attention::relative_l2(found, wanted);
}

Result<Row> measure(Console& console, const Options& options, const std::string& kv) {
  KVANT_ASSIGN(const formats::CacheFormat format, formats::parse_cache_format(kv));
  KVANT_ASSIGN(const std::unique_ptr<backend::Backend> backend,
               backend::create_backend({.name = "cpu", .num_threads = options.threads}));
  KVANT_TRY(
      backend->supports(format, options.head_dim, options.num_query_heads / options.num_kv_heads));
  backend::WorkspaceNeeds needs;
  needs.max_rows = std::max<int64_t>(512, int64_t{options.batch} * options.new_tokens);
  needs.max_context = options.tokens + options.page_tokens;
  needs.num_query_heads = options.num_query_heads;
  needs.num_kv_heads = options.num_kv_heads;
  needs.head_dim = options.head_dim;
  needs.page_tokens = options.page_tokens;
  needs.max_sequences = options.batch;
  KVANT_TRY(backend->reserve_workspace(needs));

  const int64_t wanted =
      options.rotate_mib < 0 ? 8 * last_level_cache_bytes() : options.rotate_mib << 20;
  const int64_t limit = backend->info().memory_total / 4;
  RotatingCache cache(options, *backend);
  KVANT_TRY(cache.create(format, wanted, limit));
  if (cache.total_bytes() < wanted) {
    console.note(
        fmt::format("{}: rotates over {} (a quarter of memory) instead of {}, 8x the last-level "
                    "cache",
                    kv, format_bytes(cache.total_bytes()), format_bytes(wanted)));
  }
  {
    Progress progress(console, "filling " + kv, options.batch * options.tokens, "tokens");
    KVANT_TRY(cache.fill(progress));
  }

  const int64_t rows = int64_t{options.batch} * options.new_tokens;
  std::vector<float> q(static_cast<size_t>(rows * options.num_query_heads * options.head_dim));
  std::vector<float> out(q.size());
  Noise(11).fill(q);
  backend::AttentionArgs args;
  args.view = &cache.view();
  args.params.num_query_heads = options.num_query_heads;
  args.params.scale = 1.0f / std::sqrt(static_cast<float>(options.head_dim));
  args.q = q.data();
  args.out = out.data();

  Row row;
  row.kv = kv;
  row.resolved = formats::canonical_name(format);
  row.copies = cache.num_copies();
  row.rotation_bytes = cache.total_bytes();
  for (const RotatingCache::Piece& piece : cache.pieces(0)) {
    row.bytes += static_cast<double>(piece.bytes);
  }
  ReadCeiling ceiling(options.threads, options.clock());
  row.ceiling = ceiling.measure(cache, 0.25 * options.seconds);
  std::vector<double> times;
  const double start = now(options.clock());
  for (int call = 0; call < 3 || now(options.clock()) < start + options.seconds; ++call) {
    KVANT_TRY(Console::check_stop());
    args.group_layer = call % cache.num_copies();
    const double begin = now(options.clock());
    KVANT_TRY(backend->attention(args));
    times.push_back((now(options.clock()) - begin) * 1e6);
  }
  row.us = spread_of(std::move(times));
  row.ceiling = std::max(row.ceiling, ceiling.measure(cache, 0.25 * options.seconds));
  KVANT_ASSIGN(row.error, measure_error(cache, args));
  return row;
}

Status parse_heads(Options& options) {
  const size_t slash = options.heads.find('/');
  const auto number = [](std::string_view text) {
    int value = 0;
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
    return code == std::errc() && end == text.data() + text.size() ? value : 0;
  };
  if (slash != std::string::npos) {
    options.num_query_heads = number(std::string_view(options.heads).substr(0, slash));
    options.num_kv_heads = number(std::string_view(options.heads).substr(slash + 1));
  }
  if (options.num_query_heads < 1 || options.num_kv_heads < 1 ||
      options.num_query_heads % options.num_kv_heads != 0) {
    return Error(ErrorCode::kInvalidArgument,
                 "--heads " + options.heads +
                     ": expected query heads / KV heads, a multiple of each other, such as 32/8");
  }
  if (options.tokens < options.new_tokens || options.new_tokens < 1 || options.batch < 1) {
    return Error(ErrorCode::kInvalidArgument,
                 "--tokens counts all tokens of a sequence, --new-tokens the last of them: need "
                 "1 <= new tokens <= tokens and a batch of at least 1");
  }
  if (options.shared_prefix < 0 || options.shared_prefix > options.tokens - options.new_tokens) {
    return Error(ErrorCode::kInvalidArgument,
                 "--shared-prefix " + std::to_string(options.shared_prefix) + ": expected 0 to " +
                     std::to_string(options.tokens - options.new_tokens) +
                     ", the tokens before the new ones");
  }
  return {};
}

Json row_json(const Options& options, const Row& row) {
  Json object = bench_json("attention");
  object["kv"] = row.kv;
  object["kv_resolved"] = row.resolved;
  object["us"] = row.us.median;
  object["us_min"] = row.us.min;
  object["us_max"] = row.us.max;
  object["gb_per_s"] = row.gb_per_s();
  object["ceiling_gb_per_s"] = row.ceiling * 1e-9;
  object["percent_of_ceiling"] = row.percent();
  object["error"] = row.error;
  object["clock"] = options.clock() == Clock::kProcessor ? "processor" : "wall";
  object["bytes"] = static_cast<int64_t>(row.bytes);
  object["heads"] = options.heads;
  object["head_dim"] = options.head_dim;
  object["tokens"] = options.tokens;
  object["batch"] = options.batch;
  object["shared_prefix"] = options.shared_prefix;
  object["new_tokens"] = options.new_tokens;
  object["page_tokens"] = options.page_tokens;
  object["rotation_bytes"] = row.rotation_bytes;
  object["rotation_copies"] = row.copies;
  object["last_level_cache_bytes"] = last_level_cache_bytes();
  return object;
}

Status run(Console& console, Options& options) {
  KVANT_TRY(parse_heads(options));
  std::vector<std::string> kv;
  for (const std::string& list : options.kv) {
    for (std::string& item : formats::split_format_list(list)) kv.push_back(std::move(item));
  }
  if (kv.empty()) kv = {"bf16", "8bit", "nvfp4", "4bit"};
  for (const std::string& spec : kv) KVANT_TRY(formats::parse_cache_format(spec));
  Table table({"kv", "us", "ns/token-head", "GB/s", "ceiling", "%", "error"});
  const double token_heads = static_cast<double>(options.batch) *
                             static_cast<double>(options.tokens) * options.num_kv_heads;
  for (const std::string& spec : kv) {
    KVANT_ASSIGN(const Row row, measure(console, options, spec));
    if (console.json()) {
      KVANT_TRY(print_json(console, row_json(options, row)));
      continue;
    }
    table.add_row({row.kv, fmt::format("{:.0f}", row.us.median),
                   fmt::format("{:.2f}", row.us.median * 1e3 / token_heads),
                   fmt::format("{:.1f}", row.gb_per_s()), fmt::format("{:.1f}", row.ceiling * 1e-9),
                   fmt::format("{:.0f}", row.percent()), fmt::format("{:.1e}", row.error)});
  }
  return console.json() ? Status() : console.print(table.str());
}

CommandBody define(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("--heads", options->heads, "Query heads / KV heads")->capture_default_str();
  app.add_option("--head-dim", options->head_dim, "Channels of a head")->capture_default_str();
  app.add_option("--tokens", options->tokens, "Length of each sequence")->capture_default_str();
  app.add_option("--batch", options->batch, "Sequences")->capture_default_str();
  app.add_option("--shared-prefix", options->shared_prefix,
                 "First tokens that all sequences of the batch have in common: their pages are "
                 "read once")
      ->capture_default_str();
  app.add_option("--new-tokens", options->new_tokens,
                 "Query tokens of each sequence: 1 is decode, more a chunk of a prompt")
      ->capture_default_str();
  app.add_option("--kv", options->kv, "Cache formats: a list, may repeat [bf16,8bit,nvfp4,4bit]");
  app.add_option("--page-tokens", options->page_tokens, "Tokens of a page")->capture_default_str();
  app.add_option("-t,--threads", options->threads,
                 "Threads [one per processor]; with 1, times are processor time");
  app.add_option("--rotate-mib", options->rotate_mib,
                 "Rotate over copies of the cache of this size together; 0: one copy, which may "
                 "stay in a processor's caches [8x the last-level cache]")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
  app.add_option("--seconds", options->seconds, "Time to measure each format for")
      ->capture_default_str();
  return [options](Console& console) { return run(console, *options); };
}

}  // namespace

const Bench attention_bench = {
    .name = "attention",
    .summary = "Time attention over a cache format, against reading the same bytes",
    .define = define,
};

}  // namespace kvant::tools
