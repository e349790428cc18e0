// What one call of attention is made of: plain data, shared by all instruction sets.
//
// Every translation unit that is compiled for more than the base instruction set includes this file
// and may not define anything here that the linker could merge with another unit's copy.
#pragma once

#include <cstdint>

namespace longctx {

constexpr int BLOCK = 64;        // tokens of a page
constexpr int TILE_ROWS = 256;   // query rows (tokens times heads of a group) that share a tile
constexpr int DECODE_ROWS = 8;   // up to so many, keys are read in place, not widened into a tile
constexpr int ENTRY_COLUMNS = 5; // PAGE, ROW_BEGIN, ROWS, FIRST_POSITION, ROTATION; see backend.py

enum class Codec : int { raw, bf16, int8, int4 };
enum class Dtype : int { float32, bfloat16, float16 };

// Consecutive rows of one sequence and what they see: `ChunkRows` in backend.py.
struct Chunk {
    int64_t row_begin, rows, first_position, own_row, past_entries;
    const int64_t* own_pages; // null: all rows see `past_entries` entries and nothing else
    const int64_t* entries;
    int64_t first_entry; // the first one that any row still sees through its window
};

struct Layer {
    Codec codec;
    Dtype dtype; // of the raw pool
    int kv_heads, group, head_dim;
    int64_t window; // 0: none
    const uint8_t* packed;
    int64_t packed_page_bytes;
    const uint8_t* raw;
    int64_t raw_page_bytes;
};

struct Call {
    const Layer* layer;
    const void* query;
    Dtype query_dtype;
    int64_t query_token_stride, query_head_stride; // in values; a head's values are consecutive
    float scaling, softcap;                        // softcap 0: none
    float* out;                                    // [tokens, heads, head_dim]
    float* lse;                                    // [tokens, heads]
};

// Rows of one chunk that lie in one own block, with the query heads of some key heads.
struct Tile {
    const Chunk* chunk;
    int64_t row, entry_end; // first row, within the chunk; rows see entries up to here
    int rows, kv_begin, kv_end;
    int splits, unfinished;
    int64_t partials; // offset of its first float among the partial results, if it is split
};

// A tile against a part of its keys: entries, and the own block if this is the last part.
struct Item {
    Tile* tile;
    int split;
    int64_t entry_begin, entry_end;
};

// Where an item leaves its rows: row, then head; out normalized, lse natural.
struct Result {
    float* out;
    float* lse;
    int64_t out_row, lse_row; // floats from row to row
};

struct Kernels {
    const char* name;
    int64_t (*scratch_bytes)(const Layer&); // what `run` needs, aligned to 64
    void (*run)(const Call&, const Item&, const Result&, uint8_t* scratch);
};

extern const Kernels avx2_kernels, avx512_kernels, avx512_vnni_kernels;

} // namespace longctx
