// Linear layers as part of the Python module `longctx.kernels._kernels`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "layers/around_attention.h"
#include "layers/heads.h"
#include "linear/linear.h"

namespace nb = nanobind;
using namespace longctx;

namespace {
struct LinearGroup {
    explicit LinearGroup(std::vector<const PackedLinear*> given) : layers(std::move(given)) {}
    std::vector<const PackedLinear*> layers;
};

using Norm = std::tuple<uintptr_t, float, bool>; // address of the weights, epsilon, twice
AroundAttention::Norm made(const Norm& norm) {
    return {(const float*)std::get<0>(norm), std::get<1>(norm), std::get<2>(norm)};
}
} // namespace

// Addresses are plain numbers: a step makes a hundred of these calls, and arrays would cost more
// to hand over than a small layer takes. longctx/model/packed_linear.py checks the shapes.
void bind_linear(nb::module_& m) {
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(
            "__init__",
            [](PackedLinear* self, uintptr_t weight, uintptr_t bias, int64_t outputs,
               int64_t inputs, int storage, const std::string& instruction_set) {
                new (self) PackedLinear((const void*)weight, (const float*)bias, outputs, inputs,
                                        Storage(storage), instruction_set);
            },
            nb::arg("weight"), nb::arg("bias"), nb::arg("outputs"), nb::arg("inputs"),
            nb::arg("storage"), nb::arg("instruction_set"),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "__init__",
            [](PackedLinear* self, uintptr_t bias, int64_t outputs, int64_t inputs, int storage,
               const std::string& instruction_set, bool integers) {
                new (self) PackedLinear((const float*)bias, outputs, inputs, Storage(storage),
                                        instruction_set, integers);
            },
            nb::arg("bias"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("storage"),
            nb::arg("instruction_set"), nb::arg("integers"), nb::call_guard<nb::gil_scoped_release>())
        .def(
            "fill",
            [](PackedLinear& self, int64_t first, int64_t rows, uintptr_t codes, uintptr_t scales,
               uintptr_t common_scales, uintptr_t minima, uintptr_t common_minima) {
                self.fill(first, rows, (const uint8_t*)codes,
                          {(const char*)scales, (const uint16_t*)common_scales},
                          {(const char*)minima, (const uint16_t*)common_minima});
            },
            nb::arg("first"), nb::arg("rows"), nb::arg("codes"), nb::arg("scales"),
            nb::arg("common_scales"), nb::arg("minima"), nb::arg("common_minima"),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "rows",
            [](const PackedLinear& self, uintptr_t ids, int64_t count, uintptr_t weight) {
                self.rows((const int64_t*)ids, count, (float*)weight);
            },
            nb::arg("ids"), nb::arg("count"), nb::arg("weight"),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "forward",
            [](const PackedLinear& self, uintptr_t x, int64_t rows, uintptr_t y) {
                self.forward((const void*)x, rows, (void*)y);
            },
            nb::arg("x"), nb::arg("rows"), nb::arg("y"), nb::call_guard<nb::gil_scoped_release>())
        .def(
            "unpack",
            [](const PackedLinear& self, uintptr_t weight) { self.unpack((float*)weight); },
            nb::arg("weight"), nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("bytes", &PackedLinear::bytes);
    m.def("bfloat16_sets", &bfloat16_sets,
          "List the instruction sets for layers in bfloat16 that this CPU has, the fastest last.");
    m.def("multiplies_integers", &multiplies_integers,
          "Whether this CPU has the instructions of layers that multiply integers.");
    nb::class_<LinearGroup>(m, "LinearGroup")
        .def(nb::init<std::vector<const PackedLinear*>>(), nb::arg("layers"),
             nb::keep_alive<1, 2>()) // the list, which keeps the layers
        .def(
            "forward",
            [](const LinearGroup& self, uintptr_t x, int64_t rows, uintptr_t y) {
                PackedLinear::forward_all(self.layers, (const void*)x, rows, (void*)y);
            },
            nb::arg("x"), nb::arg("rows"), nb::arg("y"), nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "rms_norm",
        [](uintptr_t x, uintptr_t added, uintptr_t sums, int64_t rows, int64_t width,
           uintptr_t weight, float epsilon, uintptr_t y) {
            rms_norm((const float*)x, (const float*)added, (float*)sums, rows, width,
                     (const float*)weight, epsilon, (float*)y);
        },
        nb::arg("x"), nb::arg("added"), nb::arg("sums"), nb::arg("rows"), nb::arg("width"),
        nb::arg("weight"), nb::arg("epsilon"), nb::arg("y"),
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "rms_norm_bfloat16",
        [](uintptr_t x, uintptr_t added, uintptr_t sums, int64_t rows, int64_t width,
           uintptr_t weight, float epsilon, bool twice, uintptr_t y) {
            rms_norm_bfloat16((const uint16_t*)x, (const uint16_t*)added, (uint16_t*)sums, rows,
                              width, (const float*)weight, epsilon, twice, (uint16_t*)y);
        },
        nb::arg("x"), nb::arg("added"), nb::arg("sums"), nb::arg("rows"), nb::arg("width"),
        nb::arg("weight"), nb::arg("epsilon"), nb::arg("twice"), nb::arg("y"),
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "turn_heads",
        [](uintptr_t query, int64_t query_stride, uintptr_t key, int64_t key_stride,
           uintptr_t value, int64_t value_stride, int64_t tokens, int64_t heads, int64_t kv_heads,
           int64_t dims, uintptr_t cosines, uintptr_t sines, int64_t turned, uintptr_t pool,
           uintptr_t slots, int64_t first_slot, bool bfloat16) {
            const auto turn = [&](auto* type) {
                using T = decltype(type);
                turn_heads<std::remove_pointer_t<T>>(
                    {(T)query, (T)key, (T)value, query_stride, key_stride, value_stride, tokens,
                     heads, kv_heads, dims, (T)cosines, (T)sines, turned, (T)pool,
                     (const int64_t*)slots, first_slot});
            };
            bfloat16 ? turn((uint16_t*)nullptr) : turn((float*)nullptr);
        },
        nb::arg("query"), nb::arg("query_stride"), nb::arg("key"), nb::arg("key_stride"),
        nb::arg("value"), nb::arg("value_stride"), nb::arg("tokens"), nb::arg("heads"),
        nb::arg("kv_heads"), nb::arg("dims"), nb::arg("cosines"), nb::arg("sines"),
        nb::arg("turned"), nb::arg("pool"), nb::arg("slots"), nb::arg("first_slot"),
        nb::arg("bfloat16"), nb::call_guard<nb::gil_scoped_release>());
    nb::class_<AroundAttention>(m, "AroundAttention")
        .def(
            "__init__",
            [](AroundAttention* self, const Norm& before_attention,
               std::vector<const PackedLinear*> inputs, const PackedLinear* output,
               const Norm& before_unit, std::vector<const PackedLinear*> gates,
               const PackedLinear* last, int64_t heads, int64_t kv_heads, int64_t dims,
               const Norm& query_norm, const Norm& key_norm, bool bfloat16) {
                new (self) AroundAttention(
                    made(before_attention), std::move(inputs), output, made(before_unit),
                    std::move(gates), last,
                    {heads, kv_heads, dims, made(query_norm), made(key_norm)}, bfloat16);
            },
            nb::arg("before_attention"), nb::arg("inputs"), nb::arg("output"),
            nb::arg("before_unit"), nb::arg("gates"), nb::arg("last"), nb::arg("heads"),
            nb::arg("kv_heads"), nb::arg("dims"), nb::arg("query_norm"), nb::arg("key_norm"),
            nb::arg("bfloat16"), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
            nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>())
        .def(
            "to_attention",
            [](const AroundAttention& self, uintptr_t x, int64_t rows, uintptr_t qkv,
               uintptr_t cosines, uintptr_t sines, int64_t turned, uintptr_t pool, uintptr_t slots,
               int64_t first_slot) {
                self.to_attention((const void*)x, rows, (void*)qkv,
                                  {(const void*)cosines, (const void*)sines, turned, (void*)pool,
                                   (const int64_t*)slots, first_slot});
            },
            nb::arg("x"), nb::arg("rows"), nb::arg("qkv"), nb::arg("cosines"), nb::arg("sines"),
            nb::arg("turned"), nb::arg("pool"), nb::arg("slots"), nb::arg("first_slot"),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "to_gates",
            [](const AroundAttention& self, uintptr_t attended, uintptr_t x, int64_t rows,
               uintptr_t sums, uintptr_t gates) {
                self.to_gates((const void*)attended, (const void*)x, rows, (void*)sums,
                              (void*)gates);
            },
            nb::arg("attended"), nb::arg("x"), nb::arg("rows"), nb::arg("sums"), nb::arg("gates"),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "from_gates",
            [](const AroundAttention& self, uintptr_t activated, uintptr_t up, int64_t up_stride,
               uintptr_t sums, int64_t rows, uintptr_t y) {
                self.from_gates((const void*)activated, (const void*)up, up_stride,
                                (const void*)sums, rows, (void*)y);
            },
            nb::arg("activated"), nb::arg("up"), nb::arg("up_stride"), nb::arg("sums"),
            nb::arg("rows"), nb::arg("y"), nb::call_guard<nb::gil_scoped_release>());
}
