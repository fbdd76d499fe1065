// KVANT_HD marks a function that device code may call too; empty unless a CUDA compiler reads it.
//
// Code marked so must be self-contained: no standard containers, no allocation, no exceptions.
#pragma once

#if defined(__CUDACC__)
#define KVANT_HD __host__ __device__
#else
#define KVANT_HD
#endif
