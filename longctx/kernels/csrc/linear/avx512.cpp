// Linear layers with AVX-512.
#include "linear/avx512.h"
#include "linear/tile.h"

const longctx::LinearKernels longctx::linear_avx512 = linear_kernels<Avx512>();
