// How one call is shared between threads: tiles, their division over keys, and the merge of parts.
#pragma once

#include <memory>
#include <vector>

#include "attention/attend.h"

namespace longctx {

// Divides calls over threads and keeps the memory that they need from one call to the next. One
// call runs at a time.
//
// Worked example: one decode row over 1,000 pages is a single tile of 8 key heads. For 2 threads it
// is split into 8 parts of 125 pages (PARTS per thread), and the thread that finishes last merges
// them.
class Workspace {
public:
    Workspace() = default;
    Workspace(Workspace&&) = default;

    // Writes out and lse of all rows of `chunks`. Those of the `tokens` rows that no chunk covers
    // get an out of 0 and an lse of -inf.
    void attend(const Kernels& kernels, const Call& call, const std::vector<Chunk>& chunks,
                int64_t tokens);

private:
    void plan(const Layer& layer, const std::vector<Chunk>& chunks, int threads);
    void merge(const Call& call, const Tile& tile) const;
    Result result_of(const Call& call, const Item& item);
    int64_t part_floats(const Layer& layer, const Tile& tile) const;
    uint8_t* scratch(int thread, int64_t bytes);

    struct Free {
        void operator()(uint8_t* p) const;
    };
    std::vector<Tile> tiles_;
    std::vector<Item> items_;
    std::vector<float> partials_;
    std::vector<std::unique_ptr<uint8_t, Free>> scratch_;
    std::vector<int64_t> scratch_bytes_;
    int threads_ = 1;
};

} // namespace longctx
