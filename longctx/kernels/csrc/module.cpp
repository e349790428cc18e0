// The Python module `longctx.kernels._kernels`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "layers/around_attention.h"
#include "attention/encode.h"
#include "linear/linear.h"
#include "attention/schedule.h"

namespace nb = nanobind;
using namespace longctx;

void bind_linear(nb::module_& m); // linear/module.cpp

namespace {

using Entries = nb::ndarray<const int64_t, nb::shape<-1, ENTRY_COLUMNS>, nb::c_contig, nb::device::cpu>;
using Pages = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The chunks of a step; it keeps the arrays alive that they point into.
class Plan {
public:
    explicit Plan(int64_t window) : window_(window) {}

    void add(int64_t row_begin, int64_t rows, int64_t first_position, int64_t own_row,
             int64_t past_entries, const Pages& own_pages, const Entries& entries) {
        const bool owns = own_pages.shape(0) > 0;
        const int64_t own_blocks = (own_row + rows - 1) / BLOCK; // before that of the last row
        const int64_t entry_end = past_entries + (owns ? own_blocks : 0);
        if (rows < 1 || entry_end > int64_t(entries.shape(0)) ||
            (owns && own_blocks >= int64_t(own_pages.shape(0))))
            throw std::invalid_argument("the chunk's rows lie beyond its pages or entries");
        int64_t first = 0;
        if (window_) { // an entry that the first row no longer sees, no later row sees
            const int64_t* entry = entries.data();
            while (first < entry_end &&
                   entry[FIRST_POSITION] + entry[ROWS] - 1 <= first_position - window_)
                ++first, entry += ENTRY_COLUMNS;
        }
        chunks_.push_back({row_begin, rows, first_position, own_row, past_entries,
                           owns ? own_pages.data() : nullptr, entries.data(), first});
        pages_.push_back(own_pages);
        entries_.push_back(entries);
    }

    const std::vector<Chunk>& chunks() const { return chunks_; }

private:
    int64_t window_;
    std::vector<Chunk> chunks_;
    std::vector<Pages> pages_;
    std::vector<Entries> entries_;
};

bool runs_here(const std::string& name) {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
#ifdef LONGCTX_SIMDE // the other instruction sets are software
    return avx2;
#endif
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (name == "avx512_vnni")
        return avx2 && avx512 && __builtin_cpu_supports("avx512vnni");
    return name == "avx512" ? avx2 && avx512 : avx2;
}

std::vector<const Kernels*> kernels_here() {
    std::vector<const Kernels*> found;
    for (const Kernels* kernels : {&avx2_kernels, &avx512_kernels, &avx512_vnni_kernels})
        if (runs_here(kernels->name))
            found.push_back(kernels);
    return found;
}

std::vector<const Kernels*> attention_kernels() {
    std::vector<const Kernels*> found = kernels_here();
#ifdef LONGCTX_BF16
    if (!runs_here(avx512_vnni_kernels.name)) return found;
    for (const std::string& name : bfloat16_sets())
        found.push_back(name == "amx" ? &amx_kernels : &avx512_bf16_kernels);
#endif
    return found;
}

std::vector<std::string> names_of(const std::vector<const Kernels*>& all) {
    std::vector<std::string> names;
    for (const Kernels* kernels : all)
        names.emplace_back(kernels->name);
    return names;
}

std::vector<std::string> instruction_sets() { return names_of(kernels_here()); }

class Attention {
public:
    explicit Attention(const std::string& instruction_set) {
        for (const Kernels* kernels : attention_kernels())
            if (instruction_set == kernels->name)
                kernels_ = kernels;
        if (!kernels_)
            throw std::invalid_argument("this CPU does not have " + instruction_set);
    }

    void attend(const Layer& layer, const Plan& plan, uintptr_t query, int query_dtype,
                int64_t token_stride, int64_t head_stride, float scaling, float softcap,
                int64_t tokens, uintptr_t out, uintptr_t lse) {
        const Call call = {&layer, (const void*)query, Dtype(query_dtype), token_stride,
                           head_stride, scaling, softcap, (float*)out, (float*)lse};
        workspace_.attend(*kernels_, call, plan.chunks(), tokens);
    }

    const Kernels& kernels() const { return *kernels_; }
    Workspace& workspace() { return workspace_; }

private:
    const Kernels* kernels_ = nullptr;
    Workspace workspace_;
};

// All layers of a model, for a few rows: their attention too, by pages that the step has planned. What
// is not here is their activation, which is called.
class LayerStack {
public:
    // What is around a layer's attention, its pages, the address of its raw pool, whether it turns
    // heads to their positions, and the scaling and softcap of its scores.
    using One = std::tuple<const AroundAttention*, const Layer*, uintptr_t, bool, float, float>;

    // The caller keeps all that `layers` have. Rows are of `dtype`.
    LayerStack(Attention& attention, std::vector<One> layers, int dtype)
        : attention_(attention), layers_(std::move(layers)), dtype_(Dtype(dtype)) {}

    // Takes `x` [rows, width] through all layers to `y`. `plans` has one for each layer; sums [rows,
    // width] and gates are as `AroundAttention::to_gates` makes them, one layer after another in the
    // same memory, `up` where among the gates those are that are multiplied. `activate`, told the
    // number of the layer, returns the address of the activated gates. Returns the seconds of attention.
    double run(const std::vector<const Plan*>& plans, uintptr_t x, int64_t rows, uintptr_t cosines,
               uintptr_t sines, int64_t turned, uintptr_t slots, int64_t first_slot, uintptr_t sums,
               uintptr_t gates, uintptr_t up, int64_t up_stride, uintptr_t y,
               const nb::callable& activate) {
        if (plans.size() != layers_.size())
            throw std::invalid_argument("a plan is needed for each layer");
        double seconds = 0;
        nb::gil_scoped_release released;
        for (size_t number = 0; number < layers_.size(); ++number) {
            const auto& [around, layer, pool, turns, scaling, softcap] = layers_[number];
            lse_.resize(rows * layer->kv_heads * layer->group);
            const auto attend = [&, layer = layer, scaling = scaling, softcap = softcap](
                                    const void* query, int64_t stride, float* out) {
                const Call call = {layer,   query,   dtype_, stride,     layer->head_dim,
                                   scaling, softcap, out,    lse_.data()};
                attention_.workspace().attend(attention_.kernels(), call,
                                              plans[number]->chunks(), rows);
            };
            const AroundAttention::Position position = {
                (const void*)(turns ? cosines : 0), (const void*)(turns ? sines : 0),
                turns ? turned : 0, (void*)pool, (const int64_t*)slots, first_slot};
            const void* const from = (const void*)(number == 0 ? x : y);
            seconds += around->through_attention(from, rows, position, attend, (void*)sums,
                                                 (void*)gates);
            uintptr_t activated;
            {
                nb::gil_scoped_acquire acquired;
                activated = nb::cast<uintptr_t>(activate(number));
            }
            around->from_gates((const void*)activated, (const void*)up, up_stride, (const void*)sums,
                               rows, (void*)y);
        }
        return seconds;
    }

private:
    Attention& attention_;
    std::vector<One> layers_;
    Dtype dtype_;
    std::vector<float> lse_; // that nobody asks for
};

Layer make_layer(int codec, int dtype, int kv_heads, int group, int head_dim, int64_t window,
                 uintptr_t packed, int64_t packed_page_bytes, uintptr_t raw,
                 int64_t raw_page_bytes) {
    return {Codec(codec), Dtype(dtype), kv_heads, group, head_dim, window,
            (const uint8_t*)packed, packed_page_bytes, (const uint8_t*)raw, raw_page_bytes};
}

void seal(const Layer& layer, const Pages& raw_pages, const Pages& packed_pages) {
    if (raw_pages.shape(0) != packed_pages.shape(0))
        throw std::invalid_argument("as many packed pages as raw ones are needed");
    nb::gil_scoped_release released;
    encode(layer, raw_pages.data(), packed_pages.data(), int64_t(raw_pages.shape(0)));
}

} // namespace

NB_MODULE(_kernels, m) {
    bind_linear(m);
    m.def("instruction_sets", &instruction_sets,
          "List the instruction sets that this CPU has, the fastest last.");
    m.def("attention_sets", [] { return names_of(attention_kernels()); },
          "List the instruction sets that attention may use here, the fastest last.");
    nb::class_<Plan>(m, "Plan")
        .def(nb::init<int64_t>(), nb::arg("window"))
        .def("add", &Plan::add, nb::arg("row_begin"), nb::arg("rows"), nb::arg("first_position"),
             nb::arg("own_row"), nb::arg("past_entries"), nb::arg("own_pages"), nb::arg("entries"));
    nb::class_<Layer>(m, "Layer");
    m.def("layer", &make_layer, nb::arg("codec"), nb::arg("dtype"), nb::arg("kv_heads"),
          nb::arg("group"), nb::arg("head_dim"), nb::arg("window"), nb::arg("packed"),
          nb::arg("packed_page_bytes"), nb::arg("raw"), nb::arg("raw_page_bytes"));
    m.def("seal", &seal, nb::arg("layer"), nb::arg("raw_pages"), nb::arg("packed_pages"));
    nb::class_<Attention>(m, "Attention")
        .def(nb::init<const std::string&>(), nb::arg("instruction_set"))
        .def("attend", &Attention::attend, nb::arg("layer"), nb::arg("plan"), nb::arg("query"),
             nb::arg("query_dtype"), nb::arg("token_stride"), nb::arg("head_stride"),
             nb::arg("scaling"), nb::arg("softcap"), nb::arg("tokens"), nb::arg("out"),
             nb::arg("lse"), nb::call_guard<nb::gil_scoped_release>());
    nb::class_<LayerStack>(m, "LayerStack")
        .def(nb::init<Attention&, std::vector<LayerStack::One>, int>(), nb::arg("attention"),
             nb::arg("layers"), nb::arg("dtype"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("run", &LayerStack::run, nb::arg("plans"), nb::arg("x"), nb::arg("rows"),
             nb::arg("cosines"), nb::arg("sines"), nb::arg("turned"), nb::arg("slots"),
             nb::arg("first_slot"), nb::arg("sums"), nb::arg("gates"), nb::arg("up"),
             nb::arg("up_stride"), nb::arg("y"), nb::arg("activate"));
}
