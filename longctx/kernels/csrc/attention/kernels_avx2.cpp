#include "simd/avx2.h"
#include "attention/tile.h"

const longctx::Kernels longctx::avx2_kernels = {"avx2", scratch_bytes<Avx2>, run<Avx2>};
