// How long the mask of one step of constrained decoding takes.
//
//   build/bench/kvant_grammar_bench MODEL.gguf
//
// For each demand on the output it makes a source (its time is that of the HTTP thread), and writes
// documents by taking allowed tokens at random, with closing ones preferred now and then. Prints
// microseconds of TokenConstraint::allowed over all steps, sources being made afresh for every few
// documents (processor time), so that first masks of places count as often as they do for requests
// with new schemas.
#include <time.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvant/model/source.h"
#include "kvant/serve/grammar/constraint.h"

namespace kvant::serve::grammar {
namespace {

constexpr int kSources = 8;
constexpr int kDocuments = 4;  // of each source
constexpr int kMaxSteps = 300;

// Of this thread on a processor: what others take away from it does not count.
double microseconds() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
}

struct Demand {
  const char* name;
  ConstraintSpec spec;
};

std::vector<Demand> demands() {
  constexpr auto kSchema = ConstraintSpec::Kind::kJsonSchema;
  return {
      {"any JSON object", {.kind = ConstraintSpec::Kind::kJsonObject}},
      {"a record",
       {.kind = kSchema, .text = R"({"type": "object", "properties": {"name": {"type": "string"},
          "age": {"type": "integer", "minimum": 0, "maximum": 150},
          "tags": {"type": "array", "items": {"type": "string"}},
          "kind": {"enum": ["person", "place", "thing"]},
          "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
          "required": ["name", "age", "tags", "kind", "note"]})"}},
      {"counted strings",
       {.kind = kSchema,
        .text = R"({"type": "object", "properties": {"title": {"type": "string", "maxLength": 40},
          "code": {"type": "string", "minLength": 3, "maxLength": 12},
          "lines": {"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 5},
          "day": {"type": "string", "format": "date"},
          "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,8}$"}},
          "required": ["title", "code", "lines", "day", "id"]})"}},
      {"a regex of words",
       {.kind = ConstraintSpec::Kind::kRegex, .text = R"(([A-Z][a-z]+ ){2,8}[^.]{10,200}\.)"}},
  };
}

// One of the allowed tokens: every fourth time one that closes something, if any of some is.
int32_t choose(const std::vector<uint32_t>& mask, const Vocabulary& vocabulary,
               std::mt19937& random) {
  std::vector<int32_t> ids;
  for (size_t word = 0; word < mask.size(); ++word) {
    for (uint32_t left = mask[word]; left != 0; left &= left - 1)
      ids.push_back(static_cast<int32_t>(word * 32) + std::countr_zero(left));
  }
  if (ids.empty()) return -1;
  if (random() % 4 == 0) {
    for (const int32_t id : ids) {
      const std::string_view text = vocabulary.token(id);
      if (text == "\"" || text == "}" || text == "]" || text == ".") return id;
    }
  }
  return ids[random() % ids.size()];
}

void measure(const Demand& demand, const std::shared_ptr<const Vocabulary>& vocabulary) {
  std::vector<double> steps, sources;
  std::mt19937 random(7);
  std::vector<uint32_t> mask((vocabulary->size() + 31) / 32);
  for (int i = 0; i < kSources; ++i) {
    ConstraintCompiler compiler(vocabulary);
    const auto start = microseconds();
    const auto source = compiler.compile(demand.spec);
    sources.push_back(microseconds() - start);
    if (!source) {
      std::fprintf(stderr, "%s: %s\n", demand.name, source.error().message().c_str());
      std::exit(1);
    }
    for (int document = 0; document < kDocuments; ++document) {
      const auto constraint = (*source)->create();
      for (int step = 0; step < kMaxSteps; ++step) {
        const auto begin = microseconds();
        constraint->allowed(mask);
        steps.push_back(microseconds() - begin);
        const int32_t id = choose(mask, *vocabulary, random);
        if (id < 0 || !constraint->accept(id)) break;
        if (std::ranges::find(vocabulary->end_tokens(), id) != vocabulary->end_tokens().end())
          break;
      }
    }
  }
  std::ranges::sort(steps);
  std::ranges::sort(sources);
  const auto at = [&](double share) {
    return steps[std::min(steps.size() - 1,
                          static_cast<size_t>(share * static_cast<double>(steps.size())))];
  };
  const auto slow = steps.end() - std::ranges::upper_bound(steps, 1000.0);
  std::printf("| %s | %.1f | %zu | %.0f | %.0f | %.0f | %.0f | %td |\n", demand.name,
              sources[sources.size() / 2] / 1000, steps.size(), at(0.5), at(0.99), at(0.999),
              steps.back(), slow);
}

}  // namespace
}  // namespace kvant::serve::grammar

int main(int argc, char** argv) {
  using namespace kvant;
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
    return 64;
  }
  const auto source = model::ModelSource::open(argv[1]);
  const auto tokenizer = source ? model::Tokenizer::create(*(*source)->gguf())
                                : Result<model::Tokenizer>(source.error());
  if (!tokenizer) {
    std::fprintf(stderr, "%s\n", tokenizer.error().message().c_str());
    return 65;
  }
  const auto start = serve::grammar::microseconds();
  const auto vocabulary = serve::grammar::Vocabulary::create(*tokenizer);
  std::printf("%zu tokens, %zu bytes in the trie, made in %.0f ms\n\n", vocabulary->size(),
              vocabulary->trie().num_nodes(), (serve::grammar::microseconds() - start) / 1000);
  std::printf(
      "| demand | source, ms | masks | median, us | 99 %% | 99.9 %% | longest | over 1 ms |\n");
  std::printf("|---|---|---|---|---|---|---|---|\n");
  for (const auto& demand : serve::grammar::demands()) serve::grammar::measure(demand, vocabulary);
  return 0;
}
