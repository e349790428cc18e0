// What is between a layer's products and its attention: heads are turned to their positions, and
// keys and values are put where they are kept.
#pragma once

#include <cstdint>

namespace longctx {

// Queries [tokens, heads, dims], keys and values [tokens, kv_heads, dims]; tokens lie `*_stride`
// numbers apart. `cosines`, `sines` [tokens, turned] are those of RoPE over the first `turned` dims
// of a head, of which the n-th and the (n + turned / 2)-th are a pair. Without a `pool` [slots, 2,
// kv_heads, dims] only queries and keys are turned, in place. Else keys and values are copied to the
// tokens' `slots` [tokens], or to those from `first_slot` on where there is no list.
template <class T>
struct HeadsJob {
    T *query, *key;
    const T* value;
    int64_t query_stride, key_stride, value_stride;
    int64_t tokens, heads, kv_heads, dims;
    const T *cosines, *sines;
    int64_t turned;
    T* pool;
    const int64_t* slots;
    int64_t first_slot;
};

// T is float, or uint16_t for bfloat16. Every operation is rounded as torch rounds it when it turns
// by `x * cosines + rotated x * sines`: the bits are the same.
template <class T>
void turn_heads(const HeadsJob<T>& job);

} // namespace longctx
