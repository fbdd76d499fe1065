#include "tools/run_session.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <vector>

#include "kvant/serve/tiers/session_file.h"

namespace kvant::tools {

namespace fs = std::filesystem;

void add_session_file_options(CLI::App& app, SessionFileOptions& options) {
  app.add_option("--save-session", options.save,
                 "Afterwards, keep the cache of prompt and answer in this file")
      ->type_name("FILE");
  app.add_option("--restore-session", options.restore,
                 "Take from such a file what the prompt begins with, instead of computing it")
      ->type_name("FILE");
}

Status check_session_files(const SessionFileOptions& options, const formats::CacheFormat& format) {
  if (options.any() && format.recent_tokens > 0) {
    return Error(ErrorCode::kUnsupported,
                 "with +recentN the last pages are BF16 and no session can go on from a file; use "
                 "a format without +recentN for --save-session and --restore-session");
  }
  if (options.save.empty()) return {};
  const fs::path folder = fs::absolute(options.save).parent_path();
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    return Error(ErrorCode::kNotFound, fmt::format("--save-session {}: there is no folder {}",
                                                   options.save, folder.string()));
  }
  if (fs::is_directory(options.save, error)) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("--save-session {}: that is a folder; name a file", options.save));
  }
  return {};
}

Status SessionFiles::restore(cache::KvCache& cache, model::Session& session) {
  if (options_.restore.empty()) return {};
  const auto start = std::chrono::steady_clock::now();
  KVANT_ASSIGN(const std::vector<int32_t> tokens,
               serve::restore_session(options_.restore, cache, session.sequence()));
  restored_tokens_ = static_cast<int64_t>(tokens.size());
  KVANT_TRY(session.adopt(tokens));
  restore_seconds_ =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {};
}

void SessionFiles::note_first_answer(Console& console, const model::GenerateStats& stats) {
  if (options_.restore.empty() || reused_tokens_ >= 0) return;
  reused_tokens_ = stats.reused_tokens;
  console.note(fmt::format(
      "session  {} of the prompt's {} tokens come from {}, which holds {} (read in {:.2f} s)",
      reused_tokens_, stats.prompt_tokens, options_.restore, restored_tokens_, restore_seconds_));
}

Status SessionFiles::save(Console& console, const cache::KvCache& cache,
                          const model::Session& session) {
  if (options_.save.empty()) return {};
  auto saved = serve::save_session(options_.save, cache, session.sequence(), session.tokens());
  if (!saved) return saved.error().with_context("--save-session " + options_.save);
  saved_tokens_ = *saved;
  std::error_code error;
  const auto bytes = fs::file_size(options_.save, error);
  console.note(
      fmt::format("session  {} of {} tokens are in {} now ({}); the others fill no "
                  "page",
                  saved_tokens_, session.tokens().size(), options_.save,
                  format_bytes(error ? 0 : static_cast<int64_t>(bytes))));
  return {};
}

Json SessionFiles::json() const {
  const auto or_null = [](bool named, int64_t tokens) { return named ? Json(tokens) : Json(); };
  const bool restores = !options_.restore.empty();
  return {{"restored_tokens", or_null(restores, restored_tokens_)},
          {"restore_seconds", restores ? Json(restore_seconds_) : Json()},
          {"reused_tokens", or_null(restores, std::max<int64_t>(0, reused_tokens_))},
          {"saved_tokens", or_null(!options_.save.empty(), saved_tokens_)}};
}

}  // namespace kvant::tools
