// The parts of one attention call, as plain data that all instruction sets share.
//
// Every translation unit that is compiled for more than the base instruction set includes this file
// and may not define anything here that the linker could merge with another unit's copy.
#pragma once

#include <cstdint>

namespace longctx {

constexpr int BLOCK = 64;      // tokens of a page
constexpr int TILE_ROWS = 256; // query rows (tokens times heads of a group) that share a tile
constexpr int DECODE_ROWS = 8; // up to so many rows read keys in place, without widening them

// The columns of a block table; longctx/kv/block_entry.py says what they hold.
enum EntryColumn { PAGE, ROW_BEGIN, ROWS, FIRST_POSITION, ROTATION, ENTRY_COLUMNS };

enum class Codec : int { raw, bf16, int8, int4 };
enum class Dtype : int { float32, bfloat16, float16 };

// Consecutive rows of one sequence, and the keys that they see: `ChunkRows` in backend.py.
struct Chunk {
    int64_t row_begin, rows, first_position, own_row, past_entries;
    const int64_t* own_pages; // null: all rows see `past_entries` entries and nothing else
    const int64_t* entries;
    int64_t first_entry; // the first entry that any row still sees through its window
};

struct Layer {
    Codec codec;
    Dtype dtype; // of the raw pool
    int kv_heads, group, head_dim;
    int64_t window; // 0 for none
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
    float scaling, softcap;                        // a softcap of 0 is none
    float* out;                                    // [tokens, heads, head_dim]
    float* lse;                                    // [tokens, heads]
};

// Rows of one chunk that lie in one own block, with the query heads of some of the key heads.
//
// Worked example: 100 new rows after 100 past tokens lie in own blocks 0 (rows 0 to 27) and 1 (rows
// 28 to 91) and 2 (rows 92 to 99). With a group of 4 query heads a tile holds at most 64 rows, so
// there are three tiles for each key head, which see 1, 2 and 3 entries.
struct Tile {
    const Chunk* chunk;
    int64_t row, entry_end; // the first row, within the chunk; its rows see entries before this
    int rows, kv_begin, kv_end;
    int splits, unfinished;
    int64_t partials; // where its partial results begin, in floats, if the tile is split
};

// A tile and a part of its keys: some entries, and the own block too if this is the last part.
struct Item {
    Tile* tile;
    int split;
    int64_t entry_begin, entry_end;
};

// Where an item leaves its results, in the order row, head: a normalized out, and a natural lse.
struct Result {
    float* out;
    float* lse;
    int64_t out_row, lse_row; // floats from row to row
};

struct Kernels {
    const char* name;
    int64_t (*scratch_bytes)(const Layer&); // the bytes that `run` needs, aligned to 64
    void (*run)(const Call&, const Item&, const Result&, uint8_t* scratch);
};

extern const Kernels avx2_kernels, avx512_kernels, avx512_vnni_kernels;
// For queries in bfloat16: only on a CPU of `bfloat16_sets()` (linear/linear.h).
extern const Kernels avx512_bf16_kernels, amx_kernels;

} // namespace longctx
