#include "simd/avx512.h"
#include "attention/tile.h"

const longctx::Kernels longctx::avx512_vnni_kernels = {"avx512_vnni", scratch_bytes<Avx512<true>>,
                                                       run<Avx512<true>>};
