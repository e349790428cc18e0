// Linear layers with AVX-512.
#include "linear_avx512.h"
#include "linear_tile.h"

const longctx::LinearKernels longctx::linear_avx512 = linear_kernels<Avx512>();
