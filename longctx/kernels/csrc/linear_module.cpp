// Linear layers as part of the Python module `longctx.kernels._kernels`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "linear.h"

namespace nb = nanobind;
using namespace longctx;

// Addresses are plain numbers: a step makes a hundred of these calls, and arrays would cost more
// to hand over than a small layer takes. longctx/model/packed_linear.py checks the shapes.
void bind_linear(nb::module_& m) {
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(
            "__init__",
            [](PackedLinear* self, uintptr_t weight, uintptr_t scales, uintptr_t bias,
               int64_t outputs, int64_t inputs, int storage, const std::string& instruction_set) {
                new (self) PackedLinear((const void*)weight, (const float*)scales,
                                        (const float*)bias, outputs, inputs, Storage(storage),
                                        instruction_set);
            },
            nb::arg("weight"), nb::arg("scales"), nb::arg("bias"), nb::arg("outputs"),
            nb::arg("inputs"), nb::arg("storage"), nb::arg("instruction_set"),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "__init__",
            [](PackedLinear* self, uintptr_t bias, int64_t outputs, int64_t inputs, int storage,
               const std::string& instruction_set) {
                new (self) PackedLinear((const float*)bias, outputs, inputs, Storage(storage),
                                        instruction_set);
            },
            nb::arg("bias"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("storage"),
            nb::arg("instruction_set"), nb::call_guard<nb::gil_scoped_release>())
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
    m.def(
        "rms_norm",
        [](uintptr_t x, int64_t rows, int64_t width, uintptr_t weight, float epsilon, uintptr_t y) {
            rms_norm((const float*)x, rows, width, (const float*)weight, epsilon, (float*)y);
        },
        nb::arg("x"), nb::arg("rows"), nb::arg("width"), nb::arg("weight"), nb::arg("epsilon"),
        nb::arg("y"), nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "rms_norm_bfloat16",
        [](uintptr_t x, int64_t rows, int64_t width, uintptr_t weight, float epsilon, bool twice,
           uintptr_t y) {
            rms_norm_bfloat16((const uint16_t*)x, rows, width, (const float*)weight, epsilon, twice,
                              (uint16_t*)y);
        },
        nb::arg("x"), nb::arg("rows"), nb::arg("width"), nb::arg("weight"), nb::arg("epsilon"),
        nb::arg("twice"), nb::arg("y"), nb::call_guard<nb::gil_scoped_release>());
}
