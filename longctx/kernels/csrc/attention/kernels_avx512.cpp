#include "simd/avx512.h"
#include "attention/tile.h"

const longctx::Kernels longctx::avx512_kernels = {"avx512", scratch_bytes<Avx512<false>>,
                                                  run<Avx512<false>>};
