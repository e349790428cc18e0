// The pages that an item of work sees, one after another, and the kinds of pages that there are.
#pragma once

#include "attention/pages_integer.h"

namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int IN_PLACE = 4; // query rows that are multiplied with a page at once

struct PageKind {
    void (*scores[IN_PLACE])(const Head&, const float* query, float* out);
    void (*add[IN_PLACE])(const Head&, const float* weights, const float* factor, float* out);
    void (*widen)(const Head&, float* keys, float* values);
};

template <class P> constexpr PageKind kind_of() {
    return {{P::template scores<1>, P::template scores<2>, P::template scores<3>,
             P::template scores<4>},
            {P::template add<1>, P::template add<2>, P::template add<3>, P::template add<4>},
            P::widen};
}

template <class V> constexpr PageKind raw_kinds[3] = {kind_of<RawPage<V, Dtype::float32>>(),
                                                      kind_of<RawPage<V, Dtype::bfloat16>>(),
                                                      kind_of<RawPage<V, Dtype::float16>>()};
template <class V> constexpr PageKind record_kinds[4] = {
    {}, kind_of<Bf16Page<V>>(), kind_of<Int8Page<V>>(), kind_of<Int4Page<V>>()};

// A page as the rows of a tile see it. Its columns are tokens; column 0 is at `position`.
//
// Worked example: a chunk at positions 100 to 109 lies in rows 36 to 45 of its own block, so the
// view of that block has position 64, begin 0 and end 46, and the row at 100 sees columns 0 to 36.
struct View {
    const uint8_t* page;
    const uint8_t* next; // the page that will be read after it
    int64_t position;
    int begin, end; // columns that any row may see
    bool own, masked;
};

struct Columns {
    int begin, end;
};

class Job {
public:
    const Call& call;
    const Layer& layer;
    const Item& item;
    const Tile& tile;
    const PageKind &raw_kind, &packed_kind;

    int64_t first_position() const { return tile.chunk->first_position + tile.row; }
    int64_t oldest(int row) const { // the last position that this row of the tile no longer sees
        return layer.window ? first_position() + row - layer.window : INT64_MIN;
    }
    Columns columns(const View& view, int row) const {
        const int64_t skipped = layer.window ? oldest(row) + 1 - view.position : 0;
        const int begin = skipped > view.begin ? (int)(skipped < BLOCK ? skipped : BLOCK) : view.begin;
        const int64_t seen = first_position() + row + 1 - view.position;
        return {begin, view.own && seen < view.end ? (int)seen : view.end};
    }
    const PageKind& kind(const View& view) const { return view.own ? raw_kind : packed_kind; }

    // Visits all pages of the item that any of its rows sees.
    template <class Visit> void pages(const Visit& visit) const {
        const int64_t* entry = tile.chunk->entries + item.entry_begin * ENTRY_COLUMNS;
        const int64_t* end = tile.chunk->entries + item.entry_end * ENTRY_COLUMNS;
        for (; entry != end; entry += ENTRY_COLUMNS) {
            const int64_t begin = entry[ROW_BEGIN], rows = entry[ROWS], first = entry[FIRST_POSITION];
            if (first + rows - 1 <= oldest(0))
                continue;
            const uint8_t* page = layer.packed + entry[PAGE] * layer.packed_page_bytes;
            const bool last = entry + ENTRY_COLUMNS == end;
            visit(View{page,
                       last ? page
                            : layer.packed + entry[ENTRY_COLUMNS + PAGE] * layer.packed_page_bytes,
                       first - begin, (int)begin, (int)(begin + rows), false,
                       rows != BLOCK || first <= oldest(tile.rows - 1)});
        }
        if (item.split + 1 == tile.splits && tile.chunk->own_pages) {
            const int64_t own = tile.chunk->own_row + tile.row; // a row of the own blocks, end to end
            const uint8_t* page =
                layer.raw + tile.chunk->own_pages[own / BLOCK] * layer.raw_page_bytes;
            const int at = (int)(own % BLOCK);
            View view = {page, page, first_position() - at, 0, at + tile.rows, true, true};
            view.begin = columns(view, 0).begin;
            visit(view);
        }
    }

    Head head(const View& view, int kv_head) const {
        const int64_t head_dim = layer.head_dim;
        Head head = {nullptr, nullptr, 0, 0, layer.head_dim, view.begin, view.end, 0};
        if (view.own || layer.codec == Codec::raw) {
            const int64_t head_bytes = head_dim * (layer.dtype == Dtype::float32 ? 4 : 2);
            head.row_bytes = 2 * layer.kv_heads * head_bytes;
            head.keys = view.page + kv_head * head_bytes;
            head.values = head.keys + layer.kv_heads * head_bytes;
            // Heads lie side by side in each row, so each one fetches its share of the next page.
            const uint8_t* next = view.next + 2 * kv_head * BLOCK * head_bytes;
            head.keys_ahead = next - head.keys;
            head.values_ahead = next + BLOCK * head_bytes - head.values;
        } else {
            const int64_t record_bytes = layer.packed_page_bytes / layer.kv_heads;
            const int bits = layer.codec == Codec::bf16 ? 16 : layer.codec == Codec::int8 ? 8 : 4;
            head.keys = view.page + kv_head * record_bytes;
            head.keys_ahead = BLOCK * head_dim * bits / 8;
            head.values = head.keys + head.keys_ahead;
            const uint8_t* next = kv_head + 1 < tile.kv_end ? head.keys + record_bytes
                                                            : view.next + tile.kv_begin * record_bytes;
            head.values_ahead = next - head.values;
        }
        return head;
    }

    // Loads query row `n` of a key head, where rows are ordered [rows, group]; the scale includes
    // log2(e), since weights are powers of 2.
    template <class V> void load_query(int kv_head, int n, float* to) const {
        const int64_t token = tile.chunk->row_begin + tile.row + n / layer.group;
        const int64_t at = token * call.query_token_stride +
                           (kv_head * layer.group + n % layer.group) * call.query_head_stride;
        const float scale = call.softcap > 0 ? call.scaling / call.softcap : call.scaling * LOG2E;
        const int head_dim = layer.head_dim, stride = row_floats(head_dim);
        for (int d = 0; d < stride; d += V::W) {
            const int count = head_dim - d;
            typename V::F x = V::zero();
            if (count > 0)
                x = call.query_dtype == Dtype::float32
                        ? load_some<V, Dtype::float32>((const float*)call.query + at + d, count)
                    : call.query_dtype == Dtype::bfloat16
                        ? load_some<V, Dtype::bfloat16>((const uint16_t*)call.query + at + d, count)
                        : load_some<V, Dtype::float16>((const uint16_t*)call.query + at + d, count);
            V::store(to + d, V::mul(x, V::set1(scale)));
        }
    }
};

} // namespace
