// A program of somebody else: links an installed kvant, quantises a row, creates a backend.
#include <cmath>
#include <cstdio>
#include <vector>

#include "kvant/backend/backend.h"
#include "kvant/formats/codec.h"
#include "kvant/formats/spec.h"
#include "kvant/model/source.h"

namespace {

kvant::Status use_kvant() {
  using namespace kvant;
  KVANT_ASSIGN(const formats::CacheFormat format, formats::parse_cache_format("4bit"));
  KVANT_ASSIGN(const formats::Codec codec, formats::Codec::create(format.v, 64));
  std::vector<float> row(64), decoded(64);
  for (int i = 0; i < 64; ++i) row[i] = std::sin(0.1f * static_cast<float>(i));
  std::vector<uint8_t> codes(codec.row_code_bytes()), scales(codec.row_scale_bytes());
  codec.encode_rows(row.data(), 1, 1.0f, codes.data(), scales.data());
  codec.decode_rows(codes.data(), scales.data(), 1, 1.0f, decoded.data());
  for (int i = 0; i < 64; ++i) {
    if (std::abs(row[i] - decoded[i]) > 0.2f) {
      return Error(ErrorCode::kInternal, "a decoded value is far from the original");
    }
  }
  KVANT_ASSIGN(const auto backend, backend::create_backend({.num_threads = 1}));
  KVANT_TRY(backend->supports(format, 64, 3));
  if (model::ModelSource::open("/no/such/model.gguf")) {
    return Error(ErrorCode::kInternal, "opened a file that does not exist");
  }
  std::printf("%s on %s: %zu bytes for 64 values\n", formats::canonical_name(format).c_str(),
              backend->info().description.c_str(), codes.size() + scales.size());
  return {};
}

}  // namespace

int main() {
  const kvant::Status status = use_kvant();
  if (!status) std::fprintf(stderr, "%s\n", status.error().message().c_str());
  return status ? 0 : 1;
}
