#include "avx2.h"
#include "tile.h"

const longctx::Kernels longctx::avx2_kernels = {"avx2", scratch_bytes<Avx2>, run<Avx2>};
