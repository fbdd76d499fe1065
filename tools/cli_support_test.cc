#include "tools/cli_support.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

namespace kvant::tools {
namespace {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kvant-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Signals, AFileThatMayNotGrowIsAnErrorAndNotTheEnd) {
  const TemporaryFolder folder;
  const std::string path = folder.file("limited");
  const pid_t child = ::fork();  // limits and handlers are the process's
  if (child == 0) {
    Console::install_signal_handlers();
    const rlimit limit{1, 1};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const int file = ::open(path.c_str(), O_WRONLY | O_CREAT, 0600);
    const bool refused = ::write(file, "a", 1) == 1 && ::write(file, "b", 1) < 0 && errno == EFBIG;
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(Bytes, FormatsInBinaryUnits) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.00 KiB");
  EXPECT_EQ(format_bytes(1536), "1.50 KiB");
  EXPECT_EQ(format_bytes((int64_t{1} << 20) - 1), "1.00 MiB");  // not "1024.00 KiB"
  EXPECT_EQ(format_bytes(int64_t{5} << 30), "5.00 GiB");
  EXPECT_EQ(format_bytes(-2048), "-2.00 KiB");
}

TEST(Bytes, ParsesUnits) {
  const auto parse = [](std::string_view text) { return parse_bytes(text).value(); };
  EXPECT_EQ(parse("0"), 0);
  EXPECT_EQ(parse("4096"), 4096);
  EXPECT_EQ(parse("4096B"), 4096);
  EXPECT_EQ(parse("8GiB"), int64_t{8} << 30);
  EXPECT_EQ(parse("8 GiB"), int64_t{8} << 30);
  EXPECT_EQ(parse("512M"), int64_t{512} << 20);
  EXPECT_EQ(parse("1.5g"), int64_t{3} << 29);
  EXPECT_EQ(parse("2KB"), 2000);
  EXPECT_EQ(parse("80GB"), int64_t{80'000'000'000});
}

TEST(Bytes, RefusesWhatIsNoSize) {
  for (const char* text :
       {"", " ", "-1", "GiB", "8X", "8GiBs", "8 G iB", "1e30", "nan", "inf", "99999999999T"}) {
    const Result<int64_t> bytes = parse_bytes(text);
    ASSERT_FALSE(bytes) << text;
    EXPECT_EQ(bytes.error().code(), ErrorCode::kInvalidArgument) << text;
    EXPECT_NE(bytes.error().message().find("8GiB"), std::string::npos)
        << "an example helps: " << text;
  }
}

TEST(Table, AlignsColumns) {
  Table table({"kv", "bytes"});
  table.add_row({"bf16", "23040"});
  table.add_row({"ünï", "7"});  // width counts characters, not bytes
  EXPECT_EQ(table.str(),
            "kv    bytes\n"
            "----  -----\n"
            "bf16  23040\n"
            "ünï       7\n");
}

TEST(Table, LeavesNoTrailingBlanks) {
  Table table({"name", "what"}, {0, 1});
  table.add_row({"a", "long text"});
  table.add_row({"b", ""});
  EXPECT_EQ(table.str(), "name  what\n----  ---------\na     long text\nb\n");
}

TEST(Files, ReadsWhatWasWritten) {
  const TemporaryFolder folder;
  const std::string bytes("text\0with\nzeros", 15);
  ASSERT_TRUE(write_file(folder.file("a"), bytes));
  EXPECT_EQ(read_file(folder.file("a")).value(), bytes);
}

TEST(Files, MissingFileIsNotFound) {
  const Result<std::string> text = read_file("/nonexistent/file");
  ASSERT_FALSE(text);
  EXPECT_EQ(text.error().code(), ErrorCode::kNotFound);
  EXPECT_NE(text.error().message().find("/nonexistent/file"), std::string::npos);
}

TEST(Files, FullDiskIsAnIoErrorAndKeepsTheDevice) {
  const Status written = write_file("/dev/full", "x");
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code(), ErrorCode::kIoError);
  EXPECT_NE(written.error().message().find("No space left"), std::string::npos);
  EXPECT_TRUE(std::filesystem::exists("/dev/full"));
}

TEST(Files, FailedWriteKeepsTheOldFile) {
  const TemporaryFolder folder;
  // The target is a folder, so that the rename at the end fails, after the bytes were written.
  std::filesystem::create_directory(folder.file("target"));
  std::ofstream(folder.file("target") + "/inside") << "old";
  ASSERT_FALSE(write_file(folder.file("target"), "new"));
  EXPECT_EQ(read_file(folder.file("target") + "/inside").value(), "old");
  size_t entries = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path()))
    entries += entry.exists() ? 1 : 0;
  EXPECT_EQ(entries, 1u) << "the temporary file must not stay behind";
}

TEST(ExitCodes, EachErrorHasItsOwnMeaning) {
  EXPECT_EQ(exit_code(ErrorCode::kInvalidArgument), 64);
  EXPECT_EQ(exit_code(ErrorCode::kCorruptData), 65);
  EXPECT_EQ(exit_code(ErrorCode::kNotFound), 66);
  EXPECT_EQ(exit_code(ErrorCode::kUnsupported), 69);
  EXPECT_EQ(exit_code(ErrorCode::kInternal), 70);
  EXPECT_EQ(exit_code(ErrorCode::kIoError), 74);
  EXPECT_EQ(exit_code(ErrorCode::kResourceExhausted), 75);
  EXPECT_EQ(exit_code(ErrorCode::kCancelled), 130);
}

}  // namespace
}  // namespace kvant::tools
