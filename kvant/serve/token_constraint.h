// Which tokens may come next: what the engine asks of constrained decoding (JSON schema, regex,
// choice, tool calls).
//
// A ConstraintSource is made once per request (or shared by requests with the same schema) by the
// HTTP layer; the engine creates one TokenConstraint per choice from it. grammar/constraint.h
// makes them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

namespace kvant::serve {

// The state of one choice. One thread of the engine at a time.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;

  // Overwrites `bitmask` [(vocab_size + 31) / 32]: bit id % 32 of word id / 32 is set if the token
  // may come next. Where the vocabulary cannot spell what must come, only the end-of-generation
  // tokens are set.
  virtual void allowed(std::span<uint32_t> bitmask) = 0;

  // Takes the token that was chosen. False, and nothing changes, if it was not allowed.
  virtual bool accept(int32_t token) = 0;

  // The text so far is a whole sentence: end-of-generation tokens are allowed. They are the only
  // ones when nothing can follow.
  virtual bool is_complete() const = 0;

  // A second one in the same state, for drafts that may be rejected.
  virtual std::unique_ptr<TokenConstraint> clone() const = 0;
};

// Immutable and thread-safe.
class ConstraintSource {
 public:
  virtual ~ConstraintSource() = default;

  // At the start of the text. What is created keeps alive what it needs.
  virtual std::unique_ptr<TokenConstraint> create() const = 0;
};

}  // namespace kvant::serve
