// Which thread attends to what: tiles, their division over keys, and the merge of the parts.
#pragma once

#include <memory>
#include <vector>

#include "attend.h"

namespace longctx {

// Memory that calls need; kept from one to the next. One call at a time.
class Workspace {
public:
    Workspace() = default;
    Workspace(Workspace&&) = default;

    // Attention of all rows of `chunks`, out and lse written in place; others of the `tokens` rows
    // are left empty if `chunks` do not fill them.
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
