// The Python module `abq_llm.kernels.cpu._native`. Arrays are addresses: checking an array argument takes longer than
// a small product. `kernels/cpu/__init__.py` and `engine/cpu.py` are the only callers, and check.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "decoder.h"
#include "linear.h"
#include "prepare.h"

namespace nb = nanobind;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// attention norm, mlp norm, query norm, key norm, then (weight, bias) of query, key, value, output, gate, up, down
abq::Block block_of(const std::vector<Address>& a) {
    auto linear = [&](int i) { return abq::Linear{at<abq::Weight>(a.at(4 + 2 * i)), at<float>(a.at(5 + 2 * i)), nullptr}; };
    return {at<float>(a.at(0)), at<float>(a.at(1)), at<float>(a.at(2)), at<float>(a.at(3)), linear(0), linear(1),
            linear(2), linear(3), linear(4), linear(5), linear(6)};
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
            abq::linear(abq::level_named(level), at<float>(x), count, {bits, symmetric},
                        {{at<abq::Weight>(weight), at<float>(bias), at<float>(y)}}, threads);
        },
        release());

    using namespace nb::literals;
    nb::class_<abq::Decoder>(module, "Decoder")
        .def(
            "__init__",
            [](abq::Decoder* self, const char* level, int64_t hidden, int64_t intermediate, int64_t heads,
               int64_t key_heads, int64_t dimension, int64_t vocabulary, int64_t capacity, float epsilon,
               int activation_bits, int cache_bits, bool symmetric, const std::vector<std::vector<Address>>& blocks,
               Address cosine, Address sine, Address norm, Address head_rows, Address head_weight, int head_bits) {
                const abq::DecoderShape shape{hidden,   intermediate, heads,   key_heads,
                                              dimension, vocabulary,  capacity, epsilon,
                                              {activation_bits, symmetric}, {cache_bits, symmetric}};
                std::vector<abq::Block> all;
                for (const auto& addresses : blocks) all.push_back(block_of(addresses));
                const abq::OutputHead head{at<uint16_t>(head_rows), at<abq::Weight>(head_weight), {head_bits, false}};
                new (self) abq::Decoder(abq::level_named(level), shape, std::move(all), at<float>(cosine),
                                        at<float>(sine), at<float>(norm), head);
            },
            nb::kw_only(), "level"_a, "hidden"_a, "intermediate"_a, "heads"_a, "key_heads"_a, "dimension"_a,
            "vocabulary"_a, "capacity"_a, "epsilon"_a, "activation_bits"_a, "cache_bits"_a, "symmetric"_a, "blocks"_a,
            "cosine"_a, "sine"_a, "norm"_a, "head_rows"_a, "head_weight"_a, "head_bits"_a)
        .def(
            "step",
            [](abq::Decoder& self, Address embeddings, int64_t count, Address logits, bool all, int threads) {
                self.step(at<float>(embeddings), count, at<float>(logits), all, threads);
            },
            release())
        .def("truncate", &abq::Decoder::truncate)
        .def_prop_ro("length", &abq::Decoder::length);
}
