// One step of decode attention on a problem of its own, for tests.
#pragma once

#include "kvant/backend/cuda/testing/paged_problem.h"

namespace kvant::backend::cuda::testing {

// Relative L2 error of the output. A second launch must give the same bits; failures of launches
// are test failures, and the error is NaN.
double decode_error(const ProblemOptions& options, bool deterministic = false);

}  // namespace kvant::backend::cuda::testing
