#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace abq {
namespace {

constexpr int MAX_THREADS = 1024;  // of a job
constexpr int SPINS = 4000;  // some 50 us: a decode step calls again within that

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
   public:
    void run(int64_t tasks, int threads, Task task, const void* context) {
        const int helpers = int(std::min<int64_t>({tasks, threads, MAX_THREADS})) - 1;
        if (helpers < 1 || busy_.exchange(true)) {
            for (int64_t i = 0; i < tasks; ++i) task(context, i);
            return;
        }
        while (workers_ < helpers && start(workers_)) ++workers_;
        task_ = task, context_ = context, shares_ = 1 + std::min(workers_, helpers);
        for (int i = 0; i < shares_; ++i) {
            share_[i].next.store(tasks * i / shares_, std::memory_order_relaxed);
            share_[i].end = tasks * (i + 1) / shares_;
        }
        state_.store(opened(state_.load(std::memory_order_relaxed), helpers));
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        work(0);
        state_.fetch_and(~LIMIT);  // closed
        for (int spins = 0; (state_.load() & ACTIVE) != 0; ++spins) spins < SPINS ? pause() : std::this_thread::yield();
        busy_.store(false);
    }

   private:
    // job number (32 bits) | how many workers may join, 0: closed (16 bits) | how many are at work (16 bits)
    static constexpr uint64_t ACTIVE = 0xffff, LIMIT = 0xffff0000;
    static uint64_t opened(uint64_t state, int limit) { return ((state >> 32) + 1) << 32 | uint64_t(limit) << 16; }
    static uint64_t job(uint64_t state) { return state >> 32; }
    static int limit(uint64_t state) { return int((state & LIMIT) >> 16); }

    bool start(int index) {
        try {
            std::thread(&Pool::live, this, index).detach();
            return true;
        } catch (const std::system_error&) {  // no more threads to be had: fewer do
            return false;
        }
    }

    void live(int index) {
        for (uint64_t seen = 0;;) {
            uint64_t state = wait_for_another(seen);
            seen = job(state);
            while (job(state) == seen && index < limit(state)) {
                if (!state_.compare_exchange_weak(state, state + 1)) continue;
                work(1 + index);
                state_.fetch_sub(1);
                break;
            }
        }
    }

    uint64_t wait_for_another(uint64_t seen) {
        uint64_t state;
        for (int spins = 0; spins < SPINS; ++spins, pause())
            if (job(state = state_.load()) != seen) return state;
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleeping_;
        wake_.wait(lock, [&] { return job(state = state_.load()) != seen; });
        --sleeping_;
        return state;
    }

    // One's own share first, then what is left of the others'.
    void work(int own) {
        for (int i = 0; i < shares_; ++i) {
            Share& share = share_[(own + i) % shares_];
            for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                task_(context_, task);
        }
    }

    struct alignas(64) Share {  // a cache line of its own: another core's counter would cost more than a small task
        std::atomic<int64_t> next;
        int64_t end;
    };

    std::atomic<bool> busy_{false};
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> state_{0};
    std::atomic<int> sleeping_{0};
    Task task_ = nullptr;
    const void* context_ = nullptr;
    int shares_ = 0, workers_ = 0;
    Share share_[MAX_THREADS];
};

std::atomic<Pool*> pool{nullptr};  // never deleted: its threads may outlive the last call

Pool& current() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    });
    return *pool;
}

}  // namespace

void run(int64_t tasks, int threads, Task task, const void* context) { current().run(tasks, threads, task, context); }

}  // namespace abq
