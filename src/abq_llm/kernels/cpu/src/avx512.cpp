// AVX-512 with VNNI.
#if defined(__AVX512VNNI__)
#include "avx512.h"

namespace abq {
namespace {

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Level avx512{"avx512", supported,  width_of<Avx512>, quantize,       product_of<Avx512>,
                   norm,     swiglu, dense<Avx512>, append<Avx512>, attend<Avx512>};

}  // namespace abq
#endif
