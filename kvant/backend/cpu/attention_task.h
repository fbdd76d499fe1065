// The inside of a task of CPU attention: some query rows of one sequence and one KV head, page by
// page.
//
// Private to kvant/backend/cpu; attention.cc shares the tasks out.
#pragma once

#include <limits>
#include <span>

#include "kvant/backend/backend.h"
#include "kvant/backend/cpu/attention_kernels.h"
#include "kvant/backend/cpu/attention_workspace.h"
#include "kvant/backend/cpu/page_decoder.h"

namespace kvant::backend::cpu {

// Cuts a block of memory into arrays that start on cache lines; with no block it only counts.
class Cutter {
 public:
  explicit Cutter(std::byte* data) : data_(data) {}
  template <typename T>
  T* take(int64_t count) {
    T* result = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* data_;
  int64_t used_ = 0;
};

PartialRows take_partials(Cutter& cutter, int64_t rows, int64_t stride);

inline PartialRows rows_from(const PartialRows& p, int64_t row) {
  return {p.acc + row * p.stride, p.stride, p.max + row, p.sum + row, p.share + row};
}

// RoPE of keys stored before it: what all tasks of a call share.
struct PreRopeTables {
  double* angle = nullptr;      // [half] per position
  double* page_step = nullptr;  // [half][2]: cos and sin of page_tokens positions
  float* token_cos = nullptr;   // [half][page_tokens]
  float* token_sin = nullptr;
};

PreRopeTables take_pre_rope_tables(Cutter& cutter, int head_dim, int page_tokens);
void fill_pre_rope_tables(const attention::RopeParams& rope, int page_tokens,
                          const PreRopeTables& tables);

struct WorkerMemory {
  float* q_plain = nullptr;   // [kMaxQueryRows][head_dim]
  float* q_stored = nullptr;  // the same in the frame of stored keys
  float* page = nullptr;      // one decoded side of a page
  float* scratch = nullptr;
  float* s = nullptr;       // [kMaxQueryRows][page_tokens]: scores, then weights
  float* offset = nullptr;  // [kMaxQueryRows]
  float* bias_dot = nullptr;
  float* dot = nullptr;
  float* factor = nullptr;
  float* row = nullptr;        // [head_dim]
  IntegerRows q_integer;       // q_stored, or its products with the scales of a page's channels
  uint8_t* q_tiles = nullptr;  // rows of q_plain or q_stored
  uint8_t* integer_scratch = nullptr;
  float* page_cos = nullptr;  // [pages of a split][head_dim / 2]
  float* page_sin = nullptr;
  PartialRows split;
  PartialRows total;
};

inline IntegerRows rows_from(const IntegerRows& q, int64_t row, int head_dim) {
  const int64_t blocks = row * (head_dim / 16);
  return {q.hi + row * head_dim, q.lo + row * head_dim, q.words + row * head_dim,
          q.scale + row,         q.start + blocks,      q.rest + blocks,
          q.sum + blocks};
}

WorkerMemory take_worker(Cutter& cutter, int head_dim, int page_tokens);

// What all tasks of one call have in common.
struct Call {
  const AttentionArgs& args;
  const cache::GroupView& view;
  const AttentionKernels& kernels;
  const formats::SideParams* k_params = nullptr;  // [num_kv_heads]
  const formats::SideParams* v_params = nullptr;
  int group = 1;  // G
  int head_dim = 0;
  bool rotated_v = false;  // accumulators are [head_dim plain][head_dim rotated]
  bool pre_rope = false;
  PreRopeTables rope;

  int width() const { return rotated_v ? 2 * head_dim : head_dim; }
};

// Terms that move from stored keys to the query; equal for all pages of one kind.
struct QueryFrame {
  bool rotate = false;
  bool smooth = false;
  bool bias = false;

  bool operator==(const QueryFrame&) const = default;
};

// One at a time on a thread, whose matrix unit it sets up.
class Task {
 public:
  // Loads the item's queries.
  Task(const Call& call, const AttentionItem& item, const WorkerMemory& memory);
  // The rows of all new tokens of several sequences, one after the other, over pages that all of
  // them read whole and as stored: those of the item's sequence. `item` counts the tokens of all.
  Task(const Call& call, const AttentionItem& item, std::span<const int32_t> sequences,
       const WorkerMemory& memory);
  ~Task();
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  int rows() const { return item_.num_tokens * call_.group; }

  // Splits from `split` on are not this task's: nothing of them is fetched ahead.
  void read_until(int64_t split);
  // Partial results of all rows over the keys of one split; rows that read none of them keep
  // sum = 0 and max = -inf.
  void run_split(int64_t split, const PartialRows& out);
  void clear_total(const PartialRows& total) const;
  void copy_split(const PartialRows& to, const PartialRows& split) const;
  void merge_split(const PartialRows& total, const PartialRows& split) const;
  // Divides by the sum of weights, undoes V's terms and writes the output rows. Uses up `total`.
  void write_rows(const PartialRows& total) const;

 private:
  struct Pass;
  struct ScoreTerms;
  // How a side of a page is multiplied.
  enum class Way : uint8_t { kBf16, kIntegers, kFloats };
  struct Side {
    PageDecoder decoder;
    Way way = Way::kFloats;
  };
  struct Sides {
    Side k;
    Side v;
  };

  Task(const Call& call, const AttentionItem& item, int64_t first_position,
       const WorkerMemory& memory);
  void load_queries(int64_t first_row, int num_tokens, int token_begin);
  int64_t first_position() const { return first_position_; }
  // Positions before it read the page in BF16, the others as stored.
  int64_t boundary_of(int64_t page) const {
    return (page + sequence_.recent_pages + 1) * call_.view.page_tokens;
  }
  cache::PageEntry entry_of(int64_t page, bool bf16) const;
  Pass visible_part(int64_t page, int64_t first, int64_t end) const;
  bool sees_split(int64_t split) const;
  const std::byte* stored_unit(int64_t page) const;
  void look_ahead(int64_t page);
  void look_ahead_near(int64_t page);
  static void fetch_lines(const std::byte* unit, int64_t lines);
  void fetch_missing(int64_t page) const;
  Sides sides_of(const PageDecoder& k, const PageDecoder& v) const;
  const Sides& sides_of(const Pass& pass) const;
  DecodeArgs decode_args(const Pass& pass, const PageDecoder& decoder, const std::byte* codes,
                         const std::byte* scales) const;
  FetchPart part_of_next(int begin, int end) const { return {&next_, begin, end}; }
  void run_pass(const Pass& pass, const PartialRows& out);
  void add_values(const Pass& pass, const Side& side, const std::byte* unit,
                  const PartialRows& out);
  ScoreTerms score_page(const Pass& pass, const cache::PageKind& kind, const std::byte* unit);
  const float* score_codes(const Pass& pass, const PageDecoder& decoder, const std::byte* unit,
                           const formats::UnitSections& sections);
  const float* add_terms(const Pass& pass, const float* q, const uint16_t* mean, const float* dot);
  IntegerRows rounded_queries(const Pass& pass, const PageDecoder& decoder, const uint8_t* scales);
  bool all_in_tiles() const;
  bool integers_in_tiles(int rows) const;
  const uint8_t* pack_queries(const float* q, int rows, Code code);
  void prepare_frame(const formats::SideFormat& k_format, const formats::SideParams& params);
  void finish_pre_rope(const Pass& pass, const formats::SideFormat& format,
                       const formats::SideParams& params, const uint16_t* mean, float factor);
  void split_rope(int64_t split);

  const Call& call_;
  const AttentionItem& item_;
  const cache::SequenceView& sequence_;
  const int64_t first_position_;
  const WorkerMemory memory_;
  const Sides stored_;
  const Sides plain_;
  const bool all_in_tiles_;
  const int64_t unit_lines_;
  const int tile_rows_;  // of the whole task, though a pass may have fewer
  int64_t end_page_ = std::numeric_limits<int64_t>::max();
  // The units of the pages behind page `ahead_of_`; null where they are not fetched.
  int64_t ahead_of_ = -2;
  const std::byte* ahead_[kFetchStreams] = {};
  FetchAhead next_;  // parts of them
  bool tiles_begun_ = false;
  QueryFrame frame_;
  bool frame_ready_ = false;
  // What q_integer holds of all rows in this frame, if anything.
  Code rounded_code_{};
  int rounded_block_ = 0;
  // What q_tiles holds, if anything.
  const float* packed_q_ = nullptr;
  int packed_rows_ = 0;
  Code packed_code_{};
};

}  // namespace kvant::backend::cpu
