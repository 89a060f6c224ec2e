// A pool of threads that outlives the calls: as many as a call asks for, the caller among them.
//
// Each thread has a share of the tasks, and takes what is left of the others' when it is done. A worker that wakes up
// late finds the job closed: nobody waits for it. A second
// thread that calls while the pool is busy, and a task that calls itself, does the work alone, so that there are never
// more threads than asked for. After a fork the child starts with an empty pool.
#pragma once

#include <cstdint>

namespace abq {

using Task = void (*)(const void* context, int64_t index);

// Calls task(context, i) once for each i in 0 .. tasks - 1, and returns when all have returned. Tasks must not throw.
void run(int64_t tasks, int threads, Task task, const void* context);

template <class F>
void parallel(int64_t tasks, int threads, const F& f) {
    run(tasks, threads, [](const void* context, int64_t index) { (*static_cast<const F*>(context))(index); }, &f);
}

}  // namespace abq
