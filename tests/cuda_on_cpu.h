// Runs a .cu file on the CPU, for tests: every thread of a block is a fiber, and blocks run one after another.
//
//     #include "cuda_on_cpu.h"
//     #include "ops.cu"
//     RUNNABLE(clip)          // -> extern "C" const char* run_clip(grid, block, arguments, kinds, backwards)
//
// A fiber runs until its kernel ends or until it comes to a barrier: __syncthreads for the block; __syncwarp, a shuffle
// or a vote for the warp. It goes on when all have come to the same one, the same line of the source. If they cannot,
// because one went another way or has returned, the launch ends and says so; a GPU would hang or return nonsense.
// A forgotten barrier shows in the results: shared memory holds NaNs when a block begins, and no fiber sees what
// another will write later. `backwards` runs the fibers from last to first, and so shows what the other order hides.
//
// Grids and blocks have one dimension, warps 32 threads, and masks must name the whole warp. Shared arrays cannot stand
// in templates or inline functions (their common linker section does not allow it).
#pragma once

#include <algorithm>
#include <math.h>              // not <cmath>: kernels call isnan, sqrt … without std::
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("on_cpu_shared"))) static

using std::max;
using std::min;

struct Index { unsigned x; };
static Index gridDim, blockDim, blockIdx, threadIdx;
constexpr unsigned warpSize = 32;

// The linker names the ends of the section in which all shared arrays are.
extern "C" char __start_on_cpu_shared[] __attribute__((weak)), __stop_on_cpu_shared[] __attribute__((weak));

namespace on_cpu {

enum Scope { none, warp, block };                   // whom a fiber waits for
constexpr size_t STACK = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = true;
    Scope scope = none;                             // the barrier it waits at …
    int line = 0;                                   // … and where that stands
    int turn = 0;                                   // which of the two slots its next exchange uses
    uint64_t slot[2];
};

static std::vector<std::unique_ptr<Fiber>> fibers;  // one for each thread of a block; blocks and launches reuse them
static std::function<void()> kernel;
static ucontext_t scheduler;
static char message[200];

inline void wait(Scope scope, int line)
{
    Fiber& self = *fibers[threadIdx.x];
    self.scope = scope;
    self.line = line;
    swapcontext(&self.context, &scheduler);
}

inline void wait_warp(unsigned mask, int line)
{
    wait(warp, mask == 0xffffffff ? line : -line);  // nobody waits at a negative line: see `meet`
}

// The value that the thread at `lane` of this warp brings. Two slots in turn: a thread can be one exchange ahead.
template <class T> T exchange(unsigned mask, T value, unsigned lane, int line)
{
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned thread = threadIdx.x, from = thread - thread % warpSize + lane;
    Fiber& self = *fibers[thread];
    const int turn = self.turn;
    self.turn = 1 - turn;
    std::memcpy(&self.slot[turn], &value, sizeof value);
    wait_warp(mask, line);
    if (lane < warpSize && from < blockDim.x) std::memcpy(&value, &fibers[from]->slot[turn], sizeof value);
    return value;
}

inline unsigned vote(unsigned mask, bool value, int line)
{
    unsigned votes = 0;
    const int turn = fibers[threadIdx.x]->turn;
    exchange(mask, value, threadIdx.x % warpSize, line);
    const unsigned first = threadIdx.x - threadIdx.x % warpSize;
    for (unsigned lane = 0; lane < warpSize && first + lane < blockDim.x; lane++)
        votes |= unsigned(fibers[first + lane]->slot[turn] & 1) << lane;
    return votes;
}

inline void fiber_main()
{
    for (;;) {
        kernel();
        Fiber& self = *fibers[threadIdx.x];
        self.done = true;
        swapcontext(&self.context, &scheduler);
    }
}

inline void prepare(unsigned threads)
{
    while (fibers.size() < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, fiber_main, 0);
    }
}

// Lets the threads first … last − 1 go on if all of them wait at one barrier of this scope.
inline bool meet(Scope scope, unsigned first, unsigned last)
{
    for (unsigned i = first; i < last; i++) {
        const Fiber& fiber = *fibers[i];
        if (fiber.done || fiber.scope != scope || fiber.line != fibers[first]->line || fiber.line < 0) return false;
    }
    for (unsigned i = first; i < last; i++) fibers[i]->scope = none;
    return true;
}

// Why nobody can go on: the first thread that waits, and the first one that is elsewhere.
inline const char* stuck(unsigned threads)
{
    unsigned a = 0, b = 0;
    while (fibers[a]->done) a++;
    const Fiber& waits = *fibers[a];
    while (b < threads && !fibers[b]->done && fibers[b]->scope == waits.scope && fibers[b]->line == waits.line) b++;
    if (b == threads)
        std::snprintf(message, sizeof message, "line %d: a mask does not name the whole warp", -waits.line);
    else if (fibers[b]->done)
        std::snprintf(message, sizeof message, "block %u: thread %u waits at line %d, thread %u has returned",
                      blockIdx.x, a, std::abs(waits.line), b);
    else std::snprintf(message, sizeof message, "block %u: thread %u waits at line %d, thread %u at line %d",
                       blockIdx.x, a, std::abs(waits.line), b, std::abs(fibers[b]->line));
    fibers.clear();                                 // they are amid a kernel: the next launch makes new ones
    return message;
}

inline const char* run_block(unsigned threads, bool backwards)
{
    std::memset(__start_on_cpu_shared, 0xff, __stop_on_cpu_shared - __start_on_cpu_shared);
    for (unsigned i = 0; i < threads; i++) fibers[i]->done = false, fibers[i]->scope = none;
    for (;;) {
        bool all_done = true, moved = false;
        for (unsigned k = 0; k < threads; k++) {
            const unsigned i = backwards ? threads - 1 - k : k;
            Fiber& fiber = *fibers[i];
            threadIdx.x = i;
            if (!fiber.done && fiber.scope == none) swapcontext(&scheduler, &fiber.context);
            all_done &= fiber.done;
        }
        if (all_done) return nullptr;
        for (unsigned i = 0; i < threads; i += warpSize) moved |= meet(warp, i, min(i + warpSize, threads));
        if (!moved && !meet(block, 0, threads)) return stuck(threads);
    }
}

// As cuLaunchKernel: arguments holds a pointer to each argument. kinds says what the caller put there: 'p' a
// pointer, 'i' 64 bits, 'd' a double; a null pointer may come as 64 bits. Returns null, or what went wrong.
template <class... P, size_t... K>
const char* launch(void (*function)(P...), std::index_sequence<K...>, unsigned grid, unsigned threads,
                   void* const* arguments, const char* kinds, bool backwards)
{
    const char wanted[] = {(std::is_pointer_v<P> ? 'p' : std::is_floating_point_v<P> ? 'd' : 'i')..., 0};
    bool fit = std::strlen(kinds) == sizeof...(P) && ((sizeof(P) == 8) && ...) && grid > 0;
    for (size_t k = 0; fit && k < sizeof...(P); k++)
        fit = kinds[k] == wanted[k] || (kinds[k] == 'i' && wanted[k] == 'p');
    if (!fit) {
        std::snprintf(message, sizeof message, "the kernel takes (%s), got (%s), %u blocks", wanted, kinds, grid);
        return message;
    }
    kernel = [=] { function(*static_cast<P*>(arguments[K])...); };
    gridDim.x = grid;
    blockDim.x = threads;
    prepare(threads);
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        if (const char* error = run_block(threads, backwards)) return error;
    return nullptr;
}

template <class... P>
const char* launch(void (*function)(P...), unsigned grid, unsigned threads, void* const* arguments, const char* kinds,
                   bool backwards)
{
    return launch(function, std::index_sequence_for<P...>{}, grid, threads, arguments, kinds, backwards);
}

}  // namespace on_cpu

// Macros, because they carry the line on which they stand.
#define __syncthreads() on_cpu::wait(on_cpu::block, __LINE__)
#define __syncwarp() on_cpu::wait_warp(0xffffffff, __LINE__)
#define __shfl_sync(mask, value, lane) on_cpu::exchange(mask, value, lane, __LINE__)
#define __shfl_xor_sync(mask, value, by) on_cpu::exchange(mask, value, threadIdx.x % warpSize ^ (by), __LINE__)
#define __shfl_down_sync(mask, value, by) on_cpu::exchange(mask, value, threadIdx.x % warpSize + (by), __LINE__)
#define __shfl_up_sync(mask, value, by) on_cpu::exchange(mask, value, threadIdx.x % warpSize - (by), __LINE__)
#define __ballot_sync(mask, value) on_cpu::vote(mask, value, __LINE__)

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Fibers take turns, but at barriers only: nobody comes between.
template <class T> T atomicAdd(T* sum, T value)
{
    const T before = *sum;
    *sum += value;
    return before;
}

#define RUNNABLE(name)                                                                                                \
    extern "C" const char* run_##name(unsigned grid, unsigned threads, void* const* arguments, const char* kinds,     \
                                      bool backwards)                                                                 \
    {                                                                                                                 \
        return on_cpu::launch(name, grid, threads, arguments, kinds, backwards);                                      \
    }
