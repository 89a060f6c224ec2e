// AMX: tiles of 16 x 64 codes, where there are many tokens. One instruction multiplies 16 tokens by 16 rows of the
// weight, 64 columns of each. Few tokens are left to AVX-512.
#if defined(__AMX_INT8__)
#include "avx512.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace abq {
namespace {

constexpr int HEIGHT = 16;  // tokens of a tile
constexpr int64_t ROW_STEPS = ROW / STEP;

// Tiles 0 .. 5 are sums, 6 is tokens, 7 is the weight: all of 16 rows of 64 bytes.
struct Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not the intrinsics: those of GCC 12 do not say what memory they read and write.
//
// A thread's tiles have our shape while this lives, and then again that of the library that was there before: those
// shape them once for all calls.
class Shaped {
   public:
    Shaped() {
        alignas(64) static constexpr Shape shape;
        asm volatile("sttilecfg %0" : "=m"(before_));
        asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~Shaped() { asm volatile("ldtilecfg %0" : : "m"(before_)); }

   private:
    Shape before_;
};

template <int T>
inline void load_tile(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(int64_t(ROW)), "i"(T) : "memory");
}

template <int T>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int... T>
inline void clear(std::integer_sequence<int, T...>) {
    (clear_tile<T>(), ...);
}

template <int T>
inline void multiply_tile(const int8_t* x) {
    load_tile<6>(x + HEIGHT * ROW * T);
    asm volatile("tdpbsud %%tmm7, %%tmm6, %%tmm%c0" : : "i"(T));
}

template <int... T>
inline void multiply(const int8_t* x, const uint8_t* codes, std::integer_sequence<int, T...>) {
    load_tile<7>(codes);
    (multiply_tile<T>(x), ...);
}

template <int T>
inline void store_tile(int32_t* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(int64_t(TILE * sizeof(int32_t))), "i"(T) : "memory");
}

template <int... T>
inline void store(int32_t* sums, std::integer_sequence<int, T...>) {
    (store_tile<T>(sums + HEIGHT * TILE * T), ...);
}

// A block's codes, a byte each: [step][row][4], which is how a tile wants the second factor.
template <int P, int... S>
inline void expand(const uint8_t* block, uint8_t* codes, std::integer_sequence<int, S...>) {
    (_mm512_store_si512(codes + VECTOR * S, (__m512i)step_codes<P, S>(block)), ...);
}

template <int P, int D>
void product(const Weight& weight, const Tokens& tokens, int64_t tile, int64_t strip, float* out) {
    constexpr int COUNT = D == 1 ? 4 : 6, M = COUNT / D * HEIGHT, N = D * M;
    constexpr std::make_integer_sequence<int, COUNT> TILES;
    const Columns& columns = weight.columns;
    const Groups<Avx512> groups(weight, tile);
    const uint8_t* block = codes_of(weight, tile);
    const int8_t* x = tokens.codes + strip * tokens.codes_per_strip;
    const float* x_scale = tokens.scale + strip * M * (D == 1 ? 1 : tokens.segments);
    const int32_t *x_zero = tokens.zero + strip * M, *x_sums = tokens.sums + strip * tokens.segments * N;
    const int count = int(smaller(M, tokens.count - strip * M));
    alignas(64) uint8_t codes[ROW_STEPS * VECTOR] = {};
    alignas(64) int32_t stored[N * TILE];
    std::memset(out, 0, sizeof(float) * TILE * count);

    const Shaped shaped;
    for (int64_t g = 0; g < columns.groups; ++g) {
        const Group group = groups.at(g, 0, 0);
        int64_t left = g + 1 < columns.groups ? columns.group_blocks : columns.last_blocks;
        for (int64_t blocks; left > 0; left -= blocks, x_sums += N) {
            blocks = D > 1 && SEGMENT_BLOCKS < left ? SEGMENT_BLOCKS : left;
            clear(TILES);
            for (int64_t b = 0; b < blocks; b += 2, x += ROW * N) {
                // Where there is no second block, x holds zeros.
                for (int64_t half = 0; half < smaller(2, blocks - b); ++half, block += VECTOR * P)
                    expand<P>(block, codes + STEPS * VECTOR * half, std::make_integer_sequence<int, STEPS>());
                multiply(x, codes, TILES);
            }
            store(stored, TILES);
            auto add = [&](int m, Floats y) {
                y += load<Floats>(out + TILE * m);
                std::memcpy(out + TILE * m, &y, sizeof y);
            };
            if constexpr (D == 1) {
                for (int m = 0; m < count; ++m)
                    add(m, term(load<Ints>(stored + TILE * m) - group.zero * x_sums[m], group, x_zero[m]));
            } else {  // digits stay below 2^24, so that fp32 is as exact, and faster
                const Floats zero = to_floats(group.zero);
                float float_sums[N];
                for (int i = 0; i < N; ++i) float_sums[i] = float(x_sums[i]);
                for (int m = 0; m < count; ++m) {
                    Floats digits[D];
                    UNROLL for (int d = 0; d < D; ++d)
                        digits[d] = to_floats(load<Ints>(stored + TILE * (d * M + m))) - zero * float_sums[d * M + m];
                    add(m, term<D, 1>(digits, group, x_scale[m]));
                }
            }
            if constexpr (D > 1) x_scale += M;
        }
    }
    if constexpr (D == 1)
        for (int m = 0; m < count; ++m) {
            const Floats y = load<Floats>(out + TILE * m) * x_scale[m];
            std::memcpy(out + TILE * m, &y, sizeof y);
        }
}

template <int P = 1>
Product product_of_tiles(int planes, int digits) {
    if constexpr (P <= 8) {
        if (planes != P) return product_of_tiles<P + 1>(planes, digits);
        return digits == 1 ? product<P, 1> : product<P, 3>;
    } else {
        return nullptr;
    }
}

int width(int64_t tokens, int digits) {
    const int few = avx512.width(tokens, digits);
    return tokens > few ? (digits == 1 ? 64 : 32) : few;
}

Product product_for(int planes, int digits, int width) {
    return width > MOST_TOKENS_BY_STEPS ? product_of_tiles(planes, digits) : avx512.product(planes, digits, width);
}

// Linux hands a process the registers on request.
bool supported() {
    constexpr unsigned TILES_AND_INT8 = 3u << 24;
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    return avx512.supported() && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (d & TILES_AND_INT8) == TILES_AND_INT8 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

}  // namespace

const Level amx{"amx", supported, width, quantize, product_for, norm,
                swiglu, dense<Avx512>, append<Avx512>, attend<Avx512>};

}  // namespace abq
#endif
