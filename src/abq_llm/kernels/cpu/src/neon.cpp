// NEON with dot products of signed bytes: codes of 8 bits are shifted down by 128 to fit.
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define VECTOR_BYTES 16
#include "attention.h"
#include "product.h"
#include "quantize.h"

namespace abq {
namespace {

struct Neon {
    static constexpr int MOST_TOKENS = 4, MOST_TOKENS_A16 = 1;
    template <int P>
    static constexpr int CODE_OFFSET = P == 8 ? 128 : 0;

    template <int P>
    static void dot(Ints& sums, Bytes codes, const int8_t* x) {
        if constexpr (P == 8) codes ^= uint16_t(0x8080);
        sums = (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, (int8x16_t)vdupq_n_s32(load<int32_t>(x)));
    }

    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    }
    static Floats halves(const uint16_t* from) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
    static void to_halves(Floats floats, uint16_t* to) {
        vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)floats)));
    }
};

bool supported() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // every Apple M has them
#endif
}

}  // namespace

const Level neon{"neon", supported,  width_of<Neon>, quantize,       product_of<Neon>,
                   norm,     swiglu, dense<Neon>, append<Neon>, attend<Neon>};

}  // namespace abq
#endif
