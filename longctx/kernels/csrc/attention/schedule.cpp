#include "attention/schedule.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

namespace longctx {

namespace {

constexpr int64_t PARTS = 4;        // items per thread: a late thread then costs a quarter at most
constexpr int64_t PART_PAGES = 4;   // the parts of a split tile have at least so many pages
constexpr double SERIAL_COST = 2e5; // about 10 us: below, waking threads costs more than it saves

// A number proportional to the time of reading a page of one key head and multiplying it with rows.
double page_cost(const Layer& layer, int rows) {
    return double(BLOCK) * layer.head_dim * (4 + rows * layer.group);
}

} // namespace

void Workspace::Free::operator()(uint8_t* p) const { std::free(p); }

uint8_t* Workspace::scratch(int thread, int64_t bytes) {
    if (scratch_bytes_[thread] < bytes) {
        scratch_[thread].reset();
        scratch_[thread].reset((uint8_t*)std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!scratch_[thread])
            throw std::bad_alloc();
        scratch_bytes_[thread] = bytes;
    }
    return scratch_[thread].get();
}

int64_t Workspace::part_floats(const Layer& layer, const Tile& tile) const {
    return int64_t(tile.rows) * (tile.kv_end - tile.kv_begin) * layer.group * (layer.head_dim + 1);
}

void Workspace::plan(const Layer& layer, const std::vector<Chunk>& chunks, int threads) {
    tiles_.clear();
    double total = 0;
    const int64_t most_rows = std::max(1, TILE_ROWS / layer.group);
    const auto cost_of = [&](const Tile& tile) {
        return page_cost(layer, tile.rows) * (tile.kv_end - tile.kv_begin) *
               double(tile.entry_end - std::min(tile.chunk->first_entry, tile.entry_end) + 1);
    };
    for (const Chunk& chunk : chunks) {
        for (int64_t row = 0; row < chunk.rows;) {
            int64_t rows = std::min(chunk.rows - row, most_rows), own_blocks = 0;
            if (chunk.own_pages) { // only rows of one own block see the same entries
                const int64_t own = chunk.own_row + row;
                rows = std::min(rows, BLOCK - own % BLOCK);
                own_blocks = own / BLOCK;
            }
            Tile tile = {&chunk, row, chunk.past_entries + own_blocks, int(rows), 0,
                         layer.kv_heads, 1, 1, 0};
            total += cost_of(tile);
            if (rows * layer.group <= DECODE_ROWS)
                tiles_.push_back(tile); // all heads by one thread: memory is read in its order
            else
                for (int head = 0; head < layer.kv_heads; ++head) {
                    tile.kv_begin = head, tile.kv_end = head + 1;
                    tiles_.push_back(tile);
                }
            row += rows;
        }
    }
    threads_ = total < SERIAL_COST ? 1 : threads;
    const double most = threads_ == 1 ? std::numeric_limits<double>::infinity()
                                      : total / double(threads_ * PARTS);
    items_.clear();
    int64_t floats = 0;
    for (Tile& tile : tiles_) {
        const int64_t first = std::min(tile.chunk->first_entry, tile.entry_end);
        const int64_t pages = tile.entry_end - first;
        const int64_t parts = int64_t(std::ceil(cost_of(tile) / most));
        tile.splits = int(std::max<int64_t>(1, std::min(parts, pages / PART_PAGES)));
        tile.unfinished = tile.splits;
        if (tile.splits > 1) {
            tile.partials = floats;
            floats += part_floats(layer, tile) * tile.splits;
        }
        for (int split = 0; split < tile.splits; ++split)
            items_.push_back({&tile, split, first + pages * split / tile.splits,
                              first + pages * (split + 1) / tile.splits});
    }
    if (int64_t(partials_.size()) < floats)
        partials_.resize(floats);
    if (threads_ > 1) // longest first, so that the last ones to finish are short
        std::stable_sort(items_.begin(), items_.end(), [&](const Item& a, const Item& b) {
            const auto cost = [&](const Item& item) {
                return page_cost(layer, item.tile->rows) *
                       double(item.tile->kv_end - item.tile->kv_begin) *
                       double(item.entry_end - item.entry_begin + 1);
            };
            return cost(a) > cost(b);
        });
}

Result Workspace::result_of(const Call& call, const Item& item) {
    const Layer& layer = *call.layer;
    const Tile& tile = *item.tile;
    const int64_t heads = int64_t(layer.kv_heads) * layer.group;
    if (tile.splits == 1) {
        const int64_t token = tile.chunk->row_begin + tile.row;
        return {call.out + token * heads * layer.head_dim, call.lse + token * heads,
                heads * layer.head_dim, heads};
    }
    // A part holds only its own heads: the pointers point to where head 0 would be.
    const int64_t own_heads = int64_t(tile.kv_end - tile.kv_begin) * layer.group;
    float* part = partials_.data() + tile.partials + part_floats(layer, tile) * item.split;
    const int64_t skipped = int64_t(tile.kv_begin) * layer.group;
    return {part - skipped * layer.head_dim,
            part + tile.rows * own_heads * layer.head_dim - skipped, own_heads * layer.head_dim,
            own_heads};
}

void Workspace::merge(const Call& call, const Tile& tile) const {
    const Layer& layer = *call.layer;
    const int head_dim = layer.head_dim;
    const int64_t heads = int64_t(layer.kv_heads) * layer.group;
    const int64_t own_heads = int64_t(tile.kv_end - tile.kv_begin) * layer.group;
    const int64_t floats = part_floats(layer, tile);
    for (int64_t i = 0; i < tile.rows * own_heads; ++i) {
        const float* outs = partials_.data() + tile.partials + i * head_dim;
        const float* lses = partials_.data() + tile.partials + tile.rows * own_heads * head_dim + i;
        const int64_t token = tile.chunk->row_begin + tile.row + i / own_heads;
        const int64_t at = token * heads + int64_t(tile.kv_begin) * layer.group + i % own_heads;
        float* out = call.out + at * head_dim;
        float peak = -std::numeric_limits<float>::infinity(), total = 0;
        for (int split = 0; split < tile.splits; ++split)
            peak = std::max(peak, lses[split * floats]);
        std::fill(out, out + head_dim, 0.f);
        for (int split = 0; split < tile.splits; ++split) {
            const float weight = std::exp(lses[split * floats] - peak);
            total += weight;
            for (int d = 0; d < head_dim; ++d)
                out[d] += weight * outs[split * floats + d];
        }
        for (int d = 0; d < head_dim; ++d)
            out[d] /= total;
        call.lse[at] = peak + std::log(total);
    }
}

void Workspace::attend(const Kernels& kernels, const Call& call, const std::vector<Chunk>& chunks,
                       int64_t tokens) {
    const Layer& layer = *call.layer;
    const int64_t heads = int64_t(layer.kv_heads) * layer.group;
    int64_t rows = 0;
    for (const Chunk& chunk : chunks)
        rows += chunk.rows;
    if (rows < tokens) {
        std::fill(call.out, call.out + tokens * heads * layer.head_dim, 0.f);
        std::fill(call.lse, call.lse + tokens * heads, -std::numeric_limits<float>::infinity());
    }
    plan(layer, chunks, omp_get_max_threads());
    const int64_t bytes = kernels.scratch_bytes(layer);
    if (int(scratch_.size()) < threads_) {
        scratch_.resize(threads_);
        scratch_bytes_.resize(threads_, 0);
    }
    for (int thread = 0; thread < threads_; ++thread)
        scratch(thread, bytes); // allocated here, since the threads must not throw
    const int64_t count = int64_t(items_.size());
    const auto work = [&](int64_t i) {
        const Item& item = items_[i];
        kernels.run(call, item, result_of(call, item), scratch_[omp_get_thread_num()].get());
        if (item.tile->splits > 1 &&
            __atomic_sub_fetch(&item.tile->unfinished, 1, __ATOMIC_ACQ_REL) == 0)
            merge(call, *item.tile); // whoever finishes last merges, in the order of the parts
    };
    if (threads_ == 1) {
        for (int64_t i = 0; i < count; ++i) {
            const Item& item = items_[i];
            kernels.run(call, item, result_of(call, item), scratch_[0].get());
        }
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (int64_t i = 0; i < count; ++i)
        work(i);
}

} // namespace longctx
