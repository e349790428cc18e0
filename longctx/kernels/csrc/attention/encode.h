// Sealing: full blocks of the raw pool become packed pages, as the codecs in compress/ write them.
#pragma once

#include "attention/attend.h"

namespace longctx {

// Encodes page raw_pages[i] into page packed_pages[i]. It needs AVX2 and F16C, and uses OpenMP's
// threads.
void encode(const Layer&, const int64_t* raw_pages, const int64_t* packed_pages, int64_t blocks);

} // namespace longctx
