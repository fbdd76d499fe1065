#include "kvant/model/identity.h"

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "kvant/model/testing/engine.h"
#include "kvant/model/testing/tiny_models.h"

namespace kvant::model {
namespace {

namespace fs = std::filesystem;
using testing::must;

class Identity : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(::testing::TempDir()) /
              ("kvant_identity_" +
               std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::vector<std::byte>& bytes) const {
    const std::string path = folder_ / name;
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    return path;
  }
  std::string id(const std::string& path, const std::string& cache_dir = "",
                 WeightStorage storage = WeightStorage::kAsInFile) const {
    return to_hex(must(weights_id(*must(ModelSource::open(path, storage)), cache_dir)));
  }

  fs::path folder_;
};

TEST_F(Identity, Sha256IsThatOfTheStandard) {
  EXPECT_EQ(to_hex(sha256("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_F(Identity, DependsOnEveryWeightAndNotOnTheFileName) {
  std::vector<std::byte> bytes = testing::tiny_model("llama");
  const std::string first = id(write("a.gguf", bytes));
  EXPECT_EQ(id(write("b.gguf", bytes)), first);
  bytes.back() ^= std::byte{1};
  EXPECT_NE(id(write("c.gguf", bytes)), first);
  EXPECT_NE(id(write("d.gguf", testing::tiny_model("llama", {.seed = 2}))), first);
}

// Pages of one are of no use to the other.
TEST_F(Identity, IsAnotherOfRequantisedWeights) {
  const std::string cache = folder_ / "cache";
  const std::string path = write("a.gguf", testing::tiny_model("llama"));
  const std::string other = write("b.gguf", testing::tiny_model("llama", {.seed = 2}));
  const std::string in_file = id(path, cache);
  const std::string e4m3 = id(path, cache, WeightStorage::kF8E4m3);
  EXPECT_NE(e4m3, in_file);
  EXPECT_EQ(id(path, cache), in_file);  // what is remembered is that of the file
  EXPECT_EQ(id(path, "", WeightStorage::kF8E4m3), e4m3);
  EXPECT_NE(id(other, cache, WeightStorage::kF8E4m3), e4m3);
}

TEST_F(Identity, OfRandomWeightsDependsOnTheirType) {
  const auto of = [](formats::WeightType type) {
    const ModelConfig config = must(load_config("gemma-3-270m"));
    return to_hex(must(weights_id(*must(ModelSource::dummy(config, type)), "")));
  };
  EXPECT_EQ(of(formats::WeightType::kQ8_0), of(formats::WeightType::kQ8_0));
  EXPECT_NE(of(formats::WeightType::kQ8_0), of(formats::WeightType::kF8_E4M3));
}

TEST_F(Identity, IsRememberedUntilTheFileChanges) {
  const std::string cache = folder_ / "cache";
  const std::string path = write("a.gguf", testing::tiny_model("llama"));
  const std::string first = id(path, cache);
  ASSERT_EQ(std::distance(fs::directory_iterator(cache), fs::directory_iterator()), 1);
  const fs::path entry = fs::directory_iterator(cache)->path();
  std::ofstream(entry) << std::string(64, '7');
  EXPECT_EQ(id(path, cache), std::string(64, '7'));  // read, not computed
  std::ofstream(entry) << "damaged";
  EXPECT_EQ(id(path, cache), first);
  const std::string changed = write("a.gguf", testing::tiny_model("llama", {.seed = 3}));
  fs::last_write_time(changed, fs::file_time_type::clock::now() + std::chrono::seconds(5));
  EXPECT_NE(id(changed, cache), first);
}

TEST_F(Identity, AnUnusableCacheDirectoryOnlyCostsTime) {
  const std::string path = write("a.gguf", testing::tiny_model("llama"));
  EXPECT_EQ(id(path, path + "/not-a-directory"), id(path));
}

TEST_F(Identity, GeometryAndRopeAreInItsJson) {
  ModelConfig config = must(load_config("gemma-3-270m"));
  const std::string json = identity_json(config);
  config.rope.local_base = 20000;
  EXPECT_NE(identity_json(config), json);
}

}  // namespace
}  // namespace kvant::model
