// Appends K and V rows to the cache and encodes the pages that fill: scalar, any layout, any
// format.
//
// The oracle for every backend's append operator, and the reference backend's own. Host memory
// only; thread-compatible.
#pragma once

#include <cstdint>
#include <vector>

#include "kvant/base/result.h"
#include "kvant/cache/view.h"
#include "kvant/formats/codec.h"

namespace kvant::cache {

// One layer of one step: k and v are fp32 [num_rows][num_kv_heads][head_dim] in the step's row
// order (SequenceView::first_row); rows are rounded to BF16 (through the codec first with +strict),
// then view.closes are encoded. Returns what the encoders counted.
Result<formats::EncodeStats> scalar_append(const GroupView& view, int group_layer, const float* k,
                                           const float* v);

// What +strict does to a row [head_dim] before it enters the open page: a page of one token,
// encoded and decoded in place. Only formats whose blocks lie within one token. `scratch` is reused
// between calls.
formats::EncodeStats round_strict_row(const formats::Codec& codec,
                                      const formats::SideParams& params,
                                      std::vector<uint8_t>& scratch, float* row);

// One side of a unit of this page kind as attention reads it: fp32 [page_tokens][head_dim].
Status decode_unit_side(const GroupView& view, PageEntry entry, int group_layer, int kv_head,
                        bool keys, formats::Codec::Frame frame, float* rows);

}  // namespace kvant::cache
