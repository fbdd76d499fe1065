// What prefill attention does in one step, worked out on the host: which pages become tile images,
// how query tiles read them, and in which passes, so that images fit the workspace.
//
// An *image* is one side of one page of one KV head as the tensor cores read it. A page of a KV
// head has two, K then V. In FP16 an image is [64-channel part][page_tokens][128 bytes], 16-byte
// chunks swizzled by chunk ^ (token % 8). In E4M3 it is made of 8 x 16-byte core matrices, K
// [token / 8][channel / 16][8][16] and V [token / 16][channel / 8][8][16]; the 16 channels (K) or
// tokens (V) of a row are in the order 0 1 8 9 2 3 10 11 ... 6 7 14 15: that of the registers in
// which wgmma leaves scores and of fragments in `sm90` pages. A sequence may need a page twice: as
// stored (for queries of later pages) and in BF16 (for queries near it; closed pages, codecs.md
// section 1).
//
// A *query tile* is kTileRows rows (token-major, then query heads of one KV head) of one sequence.
// It reads a list of *slices* (page_tokens or the kernel's tile width, whichever is less) in three
// segments, each of consecutive positions: sink pages, stored pages, BF16 pages. It walks the list
// from its end.
//
// Plain host code without CUDA. Thread-safe (pure functions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/view.h"

namespace kvant::backend::cuda {

inline constexpr int kTileRows = 128;
inline constexpr int kImageChannels = 64;  // of one part in FP16

enum class ImageType { kF16, kE4m3 };

// Bytes of one image (one side).
constexpr int64_t image_bytes(int head_dim, int64_t page_tokens, ImageType type) {
  if (type == ImageType::kE4m3) return page_tokens * head_dim;
  return 128 * page_tokens * ((head_dim + kImageChannels - 1) / kImageChannels);
}

// Tokens of the kernel's key tile: what shared memory and registers allow.
constexpr int key_tile_tokens(int head_dim, ImageType type) {
  return head_dim > 128 && type == ImageType::kF16 ? 64 : 128;
}

// A page to write as images, of every KV head of the pass.
struct ImageJob {
  int32_t slot = 0;         // of the kind's slab: nothing in a plan depends on the layer
  int32_t image = 0;        // index among the images of a head
  int32_t page_number = 0;  // position of its first token / page_tokens
  int32_t sequence = 0;     // index in the view
  int16_t num_tokens = 0;   // tokens written so far; the rest of the image is zero
  uint16_t kind = 0;        // GroupView::kinds
};

struct QueryTile {
  int32_t row = 0;       // of its first token in the batch's activations
  int32_t position = 0;  // of its first token
  int32_t num_tokens = 0;
  int32_t sequence = 0;
  int32_t recent_pages = 0;
  // Slices [0, num_sink) are sinks, then num_stored stored ones, then BF16 ones.
  int32_t num_slices = 0;
  int32_t num_sink = 0;
  int32_t num_stored = 0;
  // First slice of each segment: place among a head's image slices, and position / slice tokens
  // (sinks start at position 0).
  int32_t sink_place = 0;
  int32_t stored_place = 0;
  int32_t stored_first = 0;
  int32_t bf16_place = 0;
  int32_t bf16_first = 0;
  // Key tiles count from the end of the list; those in [whole_begin, whole_end) have no masked key.
  int32_t num_key_tiles = 0;
  int32_t whole_begin = 0;
  int32_t whole_end = 0;
  int32_t resumes = 0;    // continues what an earlier batch left in the output
  int32_t continues = 0;  // a later batch goes on
};

// A tile for one KV head.
struct WorkItem {
  int32_t tile = 0;
  int32_t head = 0;  // of the pass
};

// Images in order of use: jobs [first_job, first_job + num_jobs) for some KV heads of the pass, K
// and V, heads side by side.
struct ImageChunk {
  int32_t first_unit = 0;  // units before it: sides of pages of KV heads
  int32_t first_job = 0;
  int32_t num_jobs = 0;
  int32_t first_head = 0;
  int32_t num_heads = 0;
};

// Images that are in the workspace at the same time, and the tiles that read them. Jobs of a
// sequence are in order of use; tiles of a sequence longest first. Both index from the batch's
// first.
struct PrefillBatch {
  int64_t images_per_head = 0;
  size_t first_job = 0, num_jobs = 0;
  size_t first_tile = 0, num_tiles = 0;
};

// A batch for some KV heads.
struct PrefillPass {
  size_t batch = 0;
  int first_head = 0;
  int num_heads = 0;
  size_t first_item = 0, num_items = 0;
  size_t first_chunk = 0, num_chunks = 0;
};

struct PrefillPlan {
  std::vector<ImageJob> jobs;
  std::vector<QueryTile> tiles;
  std::vector<PrefillBatch> batches;
  // Items and chunks go by sequence, then by KV head: blocks that run at the same time read the
  // same images, which are in L2 then.
  std::vector<WorkItem> items;
  std::vector<ImageChunk> chunks;
  std::vector<PrefillPass> passes;
  int heads_per_pass = 0;
  // [sequence]: the page that its reference key comes from (kind, place); see dequantise.h.
  std::vector<ImageJob> references;
};

struct PrefillPlanArgs {
  const cache::GroupView* view = nullptr;
  int num_query_heads = 0;
  int sink_tokens = 0;
  int64_t workspace_bytes = 0;  // for images
  ImageType images = ImageType::kF16;
  int num_processors = 132;
};

// Fills `plan`, whose memory is reused. kResourceExhausted if one sequence's BF16 pages alone do
// not fit: says how many bytes are needed.
Status make_prefill_plan(const PrefillPlanArgs& args, PrefillPlan& plan);

}  // namespace kvant::backend::cuda
