// Sealing: full blocks of the raw pool become packed pages, as the codecs in compress/ write them.
#pragma once

#include "attend.h"

namespace longctx {

// Page raw_pages[i] becomes page packed_pages[i]. Needs AVX2 and F16C; uses OpenMP's threads.
void encode(const Layer&, const int64_t* raw_pages, const int64_t* packed_pages, int64_t blocks);

} // namespace longctx
