// How the kernels of this folder read, write and add up rows.
//
// A row of d numbers is shared by `parts` blocks of THREADS threads. The launchers (cuda.py) define REAL (float or
// double), THREADS, and PACKS: how many 16-byte loads of one array a thread has in flight. No kernel uses atomics: what
// is added is added in an order that shapes and alignment alone decide. Same input, same bytes, on every GPU.
#pragma once

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

using int64 = long long;

constexpr int N = 16 / sizeof(REAL);
struct alignas(16) Pack { REAL at[N]; };

// What this block does: the part `part` of `parts` of the row `row`.
struct Share { int64 row, part, parts; };

__device__ inline Share share(int64 parts)
{
    return {blockIdx.x / parts, blockIdx.x % parts, parts};
}

// How many numbers lie before the next 16-byte boundary.
__device__ inline int64 to_boundary(const REAL* p)
{
    return (16 - reinterpret_cast<unsigned long long>(p) % 16) % 16 / sizeof(REAL);
}

// f(x, y) for every place of this block's share of a row: x[r] is the number in the array in[r], y[w] goes into out[w].
// An array may be in both lists: a number is read and written by the same thread, in this order.
template <int R, int W, class F>
__device__ inline void sweep(const REAL* const (&in)[R], REAL* const* out, int64 d, Share s, F f)
{
    const REAL* x[R];
    REAL* y[W + 1];                                     // + 1, here and below: W may be 0, an array's length may not
    for (int r = 0; r < R; r++) x[r] = in[r] + s.row * d;
    for (int w = 0; w < W; w++) y[w] = out[w] + s.row * d;

    // A row starts anywhere (d may be odd). Up to its first 16-byte boundary and after the last one the numbers are
    // taken singly; all of them are, if the arrays do not reach a boundary at the same place.
    int64 head = min(to_boundary(x[0]), d);
    for (int r = 1; r < R; r++) if (to_boundary(x[r]) != to_boundary(x[0])) head = d;
    for (int w = 0; w < W; w++) if (to_boundary(y[w]) != to_boundary(x[0])) head = d;
    const int64 packs = (d - head) / N, singles = d - packs * N;

    for (int64 k = s.part * THREADS + threadIdx.x; k < singles; k += s.parts * THREADS) {
        const int64 j = k < head ? k : k + packs * N;
        REAL a[R], b[W + 1];
        for (int r = 0; r < R; r++) a[r] = x[r][j];
        f(a, b);
        for (int w = 0; w < W; w++) y[w][j] = b[w];
    }

    for (int r = 0; r < R; r++) x[r] += head;
    for (int w = 0; w < W; w++) y[w] += head;
    const int64 tile = THREADS * PACKS, tiles = (packs + tile - 1) / tile;
    #pragma unroll 1                                    // PACKS is the unrolling
    for (int64 t = s.part; t < tiles; t += s.parts) {
        // Who writes has read the row before, forwards: going backwards finds its end still in the L2 cache.
        const int64 first = (W ? tiles - 1 - t : t) * tile + threadIdx.x;
        Pack a[PACKS][R];
        #pragma unroll
        for (int k = 0; k < PACKS; k++)
            if (first + k * THREADS < packs)
                #pragma unroll
                for (int r = 0; r < R; r++) a[k][r] = reinterpret_cast<const Pack*>(x[r])[first + k * THREADS];
        #pragma unroll
        for (int k = 0; k < PACKS; k++)
            if (first + k * THREADS < packs) {
                Pack b[W + 1];
                #pragma unroll
                for (int n = 0; n < N; n++) {
                    REAL p[R], q[W + 1];
                    for (int r = 0; r < R; r++) p[r] = a[k][r].at[n];
                    f(p, q);
                    for (int w = 0; w < W; w++) b[w].at[n] = q[w];
                }
                for (int w = 0; w < W; w++) reinterpret_cast<Pack*>(y[w])[first + k * THREADS] = b[w];
            }
    }
}

// Σ x over the block's threads, the same bytes in each. Once in a kernel: `warps` is not guarded for a second use.
__device__ double block_sum(double x)
{
    __shared__ double warps[THREADS / 32];
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    for (int k = 0; k < THREADS / 32; k++) sum += warps[k];
    return sum;
}

// ‖·‖ of the row, from its blocks' sums: every block adds them itself, in the same order; no third kernel in between.
__device__ double row_norm(const double* sums, Share s)
{
    double sum = 0;
    for (int64 k = threadIdx.x; k < s.parts; k += THREADS) sum += sums[s.row * s.parts + k];
    return sqrt(block_sum(sum));
}

// mpiclip.ops.clip_factor: min(1, τ_i/‖·‖), or with α > 0 that of ops.normalize_step, τ/(α + ‖·‖), rounded towards zero.
// NaN for a row that is not finite, and for a τ that is no threshold: nobody can look at a τ_i in device memory before
// the launch without waiting for the device.
__device__ REAL row_factor(const double* sums, const double* taus, double tau, double alpha, double* norms, Share s)
{
    const double norm = row_norm(sums, s);
    if (norms && s.part == 0 && threadIdx.x == 0) norms[s.row] = norm;
    if (taus) tau = taus[s.row];
    if (!(isfinite(norm) && tau >= 0)) return nan("");
    const double exact = alpha > 0 || norm > tau ? tau / (alpha + norm) : 1;
    const REAL factor = exact;
    return factor > exact ? nextafter(factor, REAL(0)) : factor;
}
