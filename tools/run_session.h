// `kvant run --save-session`, `--restore-session`: a conversation's cache in a file.
#pragma once

#include <cstdint>
#include <string>

#include "kvant/base/result.h"
#include "kvant/cache/kv_cache.h"
#include "kvant/formats/spec.h"
#include "kvant/model/generate.h"
#include "tools/cli_support.h"
#include "tools/json_output.h"

namespace CLI {
class App;
}

namespace kvant::tools {

struct SessionFileOptions {
  std::string save;     // path; empty: do not
  std::string restore;  // path; empty: do not

  bool any() const { return !save.empty() || !restore.empty(); }
};

void add_session_file_options(CLI::App& app, SessionFileOptions& options);

// What would fail after a long answer only: a folder that is not there, a format whose pages are
// not exchanged.
Status check_session_files(const SessionFileOptions& options, const formats::CacheFormat& format);

// The files of one run: restored before its first prompt, saved after its last answer.
class SessionFiles {
 public:
  explicit SessionFiles(const SessionFileOptions& options) : options_(options) {}

  // Fills the new session from the file, if one was named.
  Status restore(cache::KvCache& cache, model::Session& session);
  // Says how many tokens of the first prompt came from the file; later calls say nothing.
  void note_first_answer(Console& console, const model::GenerateStats& stats);
  // Writes the session, if a file was named; says how many of its tokens are in it.
  Status save(Console& console, const cache::KvCache& cache, const model::Session& session);
  // {"restored_tokens", "restore_seconds", "reused_tokens", "saved_tokens"}, null where no file was
  // named.
  Json json() const;

 private:
  SessionFileOptions options_;
  int64_t restored_tokens_ = 0;
  double restore_seconds_ = 0;
  int64_t reused_tokens_ = -1;  // below 0: nothing has been answered yet
  int64_t saved_tokens_ = 0;
};

}  // namespace kvant::tools
