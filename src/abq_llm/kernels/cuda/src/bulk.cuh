// Bulk copies to shared memory by the copy engine, and the barriers that count them: from sm_90 on.
#pragma once
#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------- barriers
// A phase of a barrier ends when its arrivals and the bytes announced for it are all in. Who waits for phase number f
// (0, 1, ...) waits for parity f & 1; waiting for parity 1 on a fresh barrier returns at once.

__device__ inline void barrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive_expecting(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// When this thread's `copy_async_16`s so far are done
__device__ inline void copy_async_arrive(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline unsigned long long nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// With `bounded`, traps instead of hanging when what it waits for does not come within two seconds.
template <bool bounded> __device__ inline void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned long long start = 0;
    while (true) {
        unsigned done;
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
        if (done) return;
        if constexpr (bounded) {
            if (start == 0) start = nanoseconds();
            if (nanoseconds() - start > 2000000000ull) __trap();
        }
    }
}

// One of the sixteen named barriers of a block, for `threads` of its threads
__device__ inline void named_barrier(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int name, int threads) {  // without waiting
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// A place in a ring of `size` buffers, each with a barrier "full" and one "empty", and the parity of its present round
template <int size> struct Place {
    int index = 0;
    unsigned parity = 0;
    __device__ void advance() {
        if (++index == size) index = 0, parity ^= 1;
    }
    __device__ int previous() const { return index == 0 ? size - 1 : index - 1; }
};

// --------------------------------------------------------------------------------------------------------------- copies
// `bytes` and both addresses are multiples of 16; the barrier counts the bytes.

__device__ inline void bulk_copy(unsigned shared, const void* global, unsigned bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}
