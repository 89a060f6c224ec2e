// What every kernel shares: 16-bit floats, tensor-core instructions, asynchronous copies, programmatic launch.
//
// NVRTC compiles these files without any header of CUDA's, so that nothing but its own wheel is needed at run time.
#pragma once

struct half_t {
    unsigned short bits;
};
struct bf16_t {
    unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline float to_float(bf16_t x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <class T> __device__ T from_float(float x);  // to nearest, ties to even
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline half_t from_float<half_t>(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ inline bf16_t from_float<bf16_t>(float x) {
    bf16_t y;
    asm("{.reg .b32 pair; cvt.rn.bf16x2.f32 pair, %1, %1; mov.b32 {%0, _}, pair;}" : "=h"(y.bits) : "f"(x));
    return y;
}

template <bool condition, class A, class B> struct Either { using type = A; };
template <class A, class B> struct Either<false, A, B> { using type = B; };

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ constexpr int greatest_common_divisor(int a, int b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }
// Groups of `words` x 32 columns that meet a block of 8 words, at most: one may begin words - gcd before the block does
__device__ constexpr int groups_in_block(int words) { return 1 + (words - greatest_common_divisor(words, 8) + 7) / words; }

// D[16, 8] += popcount(A[16, 256] & B[256, 8]); lane 4g + t holds D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
__device__ inline void mma_b1(int (&d)[4], uint4 a, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// D[16, 8] += A[16, 32] B[32, 8], unsigned bytes; D is held as by `mma_b1`
__device__ inline void mma_u8(int (&d)[4], const unsigned (&a)[4], uint2 b) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Weights are read once: they pass the caches by, which are for the activations.
__device__ inline uint4 load_streaming(const uint4* address) { return __ldcs(address); }

__device__ inline unsigned shared_address(const void* pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }

__device__ inline void copy_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ inline void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Whether a copy engine fills shared memory (bulk.cuh)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool has_bulk_copies = true;
#else
constexpr bool has_bulk_copies = false;
#endif

// Programmatic dependent launch: a kernel may start while its predecessor drains, and waits before it reads its results.
__device__ inline void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
