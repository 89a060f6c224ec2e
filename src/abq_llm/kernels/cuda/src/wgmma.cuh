// Hopper's warpgroup matrix products, and registers dealt among warpgroups.
#pragma once
#include "bulk.cuh"


// ---------------------------------------------------------------------------------------------------------- registers

template <int registers> __device__ inline void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ inline void registers_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ----------------------------------------------------------------------------------------------------------- products
// D[64, n] += A[64, k] B[k, n]: A in registers, warp w of the warpgroup holding rows 16w .. 16w+15 like the A of an mma
// m16n8; D likewise, lane 4g + t holding D[g][8j+2t], D[g][8j+2t+1], D[g+8][8j+2t], D[g+8][8j+2t+1] in d[4j .. 4j+3].
//
// B lies in shared memory as core matrices of 8 columns x 16 bytes of k, 128 bytes each, not swizzled. Its descriptor:
//   bits 0-13   address / 16
//   bits 16-29  bytes / 16 from a core matrix to the next along k      ("leading dimension byte offset")
//   bits 32-45  bytes / 16 from a core matrix to the next along n      ("stride dimension byte offset")
//   bits 62-63  0: no swizzle
__device__ inline unsigned long long core_matrices(unsigned address, int bytes_along_k, int bytes_along_n) {
    return (unsigned long long)(bytes_along_n >> 4) << 32 | unsigned(bytes_along_k >> 4) << 16 | address >> 4;
}

// Before a product, after other instructions wrote its registers
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` of the latest groups still run. A product in flight still reads its A. ptxas keeps those registers until
// the wait in straight code, if they hold values made there. It gave them away (seen in the SASS) across the back edge of a loop
// (13.0 and 13.5), and where A had come round that edge as it was (13.0). So loops end with nothing in flight, and make their A.
template <int pending> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving accesses of `d` across this place.
template <class Word, int n> __device__ inline void wgmma_fence_registers(Word (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// An asm statement must spell its operands, and each n has its own number of them: hence macros, here only.
// `accumulate` 0 overwrites D.
template <int n> struct Wgmma;

#define ABQ_OUT8(i)                                                                                             \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
        "+r"(d[i + 7])
#define ABQ_OUT4 "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
#define ABQ_OUT16 ABQ_OUT8(0), ABQ_OUT8(8)
#define ABQ_OUT24 ABQ_OUT16, ABQ_OUT8(16)
#define ABQ_OUT32 ABQ_OUT24, ABQ_OUT8(24)
#define ABQ_OUT40 ABQ_OUT32, ABQ_OUT8(32)
#define ABQ_OUT48 ABQ_OUT40, ABQ_OUT8(40)
#define ABQ_OUT56 ABQ_OUT48, ABQ_OUT8(48)
#define ABQ_OUT64 ABQ_OUT56, ABQ_OUT8(56)
#define ABQ_OUT72 ABQ_OUT64, ABQ_OUT8(64)
#define ABQ_OUT80 ABQ_OUT72, ABQ_OUT8(72)
#define ABQ_OUT88 ABQ_OUT80, ABQ_OUT8(80)
#define ABQ_OUT96 ABQ_OUT88, ABQ_OUT8(88)
#define ABQ_OUT104 ABQ_OUT96, ABQ_OUT8(96)
#define ABQ_OUT112 ABQ_OUT104, ABQ_OUT8(104)
#define ABQ_OUT120 ABQ_OUT112, ABQ_OUT8(112)
#define ABQ_OUT128 ABQ_OUT120, ABQ_OUT8(120)

#define ABQ_D4 "%0,%1,%2,%3"
#define ABQ_D8 ABQ_D4 ",%4,%5,%6,%7"
#define ABQ_D16 ABQ_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define ABQ_D24 ABQ_D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define ABQ_D32 ABQ_D24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define ABQ_D40 ABQ_D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define ABQ_D48 ABQ_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define ABQ_D56 ABQ_D48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define ABQ_D64 ABQ_D56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define ABQ_D72 ABQ_D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define ABQ_D80 ABQ_D72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define ABQ_D88 ABQ_D80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define ABQ_D96 ABQ_D88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define ABQ_D104 ABQ_D96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define ABQ_D112 ABQ_D104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define ABQ_D120 ABQ_D112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define ABQ_D128 ABQ_D120 ",%120,%121,%122,%123,%124,%125,%126,%127"

// u8, s8: k = 32 bytes, of A unsigned or signed, of B unsigned; b1: k = 256 bits, D += popcount(A & B);
// f16, bf16: k = 16, D the bits of fp32
#define ABQ_PRODUCT(name, shape, more, registers, a0, a1, a2, a3, b, use, ...)                                       \
    static __device__ inline void name(int (&d)[size], const unsigned (&a)[4], unsigned long long b_descriptor,     \
                                       int accumulate) {                                                            \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " use ", 0;"                                                    \
                     " wgmma.mma_async.sync.aligned." shape                                                         \
                     " {" registers "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", p" more ";}"                          \
                     : __VA_ARGS__                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(accumulate));             \
    }
#define ABQ_WGMMA(n, ...)                                                             \
    template <> struct Wgmma<n> {                                                     \
        static constexpr int size = n / 2;                                            \
        ABQ_PRODUCT(u8, "m64n" #n "k32.s32.u8.u8", "", __VA_ARGS__)                   \
        ABQ_PRODUCT(s8, "m64n" #n "k32.s32.s8.u8", "", __VA_ARGS__)                   \
        ABQ_PRODUCT(b1, "m64n" #n "k256.s32.b1.b1.and.popc", "", __VA_ARGS__)         \
        ABQ_PRODUCT(f16, "m64n" #n "k16.f32.f16.f16", ", 1, 1, 0", __VA_ARGS__)       \
        ABQ_PRODUCT(bf16, "m64n" #n "k16.f32.bf16.bf16", ", 1, 1, 0", __VA_ARGS__)    \
    };
ABQ_WGMMA(8, ABQ_D4, "%4", "%5", "%6", "%7", "%8", "%9", ABQ_OUT4)
ABQ_WGMMA(16, ABQ_D8, "%8", "%9", "%10", "%11", "%12", "%13", ABQ_OUT8(0))
ABQ_WGMMA(32, ABQ_D16, "%16", "%17", "%18", "%19", "%20", "%21", ABQ_OUT16)
ABQ_WGMMA(48, ABQ_D24, "%24", "%25", "%26", "%27", "%28", "%29", ABQ_OUT24)
ABQ_WGMMA(64, ABQ_D32, "%32", "%33", "%34", "%35", "%36", "%37", ABQ_OUT32)
ABQ_WGMMA(80, ABQ_D40, "%40", "%41", "%42", "%43", "%44", "%45", ABQ_OUT40)
ABQ_WGMMA(96, ABQ_D48, "%48", "%49", "%50", "%51", "%52", "%53", ABQ_OUT48)
ABQ_WGMMA(112, ABQ_D56, "%56", "%57", "%58", "%59", "%60", "%61", ABQ_OUT56)
ABQ_WGMMA(128, ABQ_D64, "%64", "%65", "%66", "%67", "%68", "%69", ABQ_OUT64)
ABQ_WGMMA(144, ABQ_D72, "%72", "%73", "%74", "%75", "%76", "%77", ABQ_OUT72)
ABQ_WGMMA(160, ABQ_D80, "%80", "%81", "%82", "%83", "%84", "%85", ABQ_OUT80)
ABQ_WGMMA(176, ABQ_D88, "%88", "%89", "%90", "%91", "%92", "%93", ABQ_OUT88)
ABQ_WGMMA(192, ABQ_D96, "%96", "%97", "%98", "%99", "%100", "%101", ABQ_OUT96)
ABQ_WGMMA(208, ABQ_D104, "%104", "%105", "%106", "%107", "%108", "%109", ABQ_OUT104)
ABQ_WGMMA(224, ABQ_D112, "%112", "%113", "%114", "%115", "%116", "%117", ABQ_OUT112)
ABQ_WGMMA(240, ABQ_D120, "%120", "%121", "%122", "%123", "%124", "%125", ABQ_OUT120)
ABQ_WGMMA(256, ABQ_D128, "%128", "%129", "%130", "%131", "%132", "%133", ABQ_OUT128)
