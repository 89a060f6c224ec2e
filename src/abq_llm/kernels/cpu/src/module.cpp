// The Python module `abq_llm.kernels.cpu._native`. Arrays are addresses: checking an array argument takes longer than
// a small product. `abq_llm/kernels/cpu/native.py` is the only caller, and checks.
#include <nanobind/nanobind.h>

#include "linear.h"
#include "prepare.h"

namespace nb = nanobind;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

NB_MODULE(_native, module) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    module.def("levels", [] {
        nb::list names;
        for (int i = 0; i < abq::level_count; ++i)
            if (abq::levels[i]->supported()) names.append(abq::levels[i]->name);
        return names;
    });
    module.def("weight_bytes", [](int64_t rows, int64_t columns, int64_t group, int planes, int max_code, bool narrow) {
        return abq::describe(rows, columns, group, planes, max_code, narrow).bytes;
    });
    module.def(
        "prepare",
        [](int64_t rows, int64_t columns, int64_t group, int planes, int max_code, bool narrow, Address packed,
           Address scale, Address zero, int fixed_zero, Address out, int threads) {
            abq::prepare(abq::describe(rows, columns, group, planes, max_code, narrow),
                         {at<uint32_t>(packed), at<void>(scale), at<uint8_t>(zero), fixed_zero}, at<void>(out), threads);
        },
        release());
    module.def(
        "linear",
        [](const char* level, Address x, int64_t count, Address weight, Address bias, int bits, bool symmetric,
           Address y, int threads) {
            abq::linear(abq::level_named(level), at<float>(x), count, *at<abq::Weight>(weight), at<float>(bias),
                        {bits, symmetric}, at<float>(y), threads);
        },
        release());
}
