// What a language model with LSTM layers does besides products of matrices: mpiclip/cells.py.
//
//     (i, f, g, o) = (σ, σ, tanh, σ)(a_t),   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)
//
// one step forward and back; the cross entropy of scores and its slopes; sums of slopes by token.
#include "rows.cuh"

// Of w workers: z (w, steps, rows, 4 n), h and c (w, steps + 1, rows, n), slopes (w, steps, rows, n), later (w, rows, n).
struct Cell { int64 z, before, now, slope; };

__device__ inline Cell cell(int64 e, int64 t, int64 steps, int64 rows, int64 n)
{
    const int64 i = e / (rows * n), r = e / n % rows, j = e % n, before = ((i * (steps + 1) + t) * rows + r) * n + j;
    const int64 row = (i * steps + t) * rows + r;
    return {row * 4 * n + j, before, before + rows * n, row * n + j};
}

__device__ inline REAL sigma(REAL x) { return 1 / (1 + exp(-x)); }

KERNEL cell_forward(REAL* z, REAL* h, REAL* c, int64 t, int64 w, int64 steps, int64 rows, int64 n)
{
    for (int64 e = int64(blockIdx.x) * THREADS + threadIdx.x; e < w * rows * n; e += int64(gridDim.x) * THREADS) {
        const Cell at = cell(e, t, steps, rows, n);
        REAL* const a = z + at.z;
        const REAL i = sigma(a[0]), f = sigma(a[n]), g = tanh(a[2 * n]), o = sigma(a[3 * n]);
        a[0] = i;
        a[n] = f;
        a[2 * n] = g;
        a[3 * n] = o;
        c[at.now] = f * c[at.before] + i * g;
        h[at.now] = o * tanh(c[at.now]);
    }
}

// later: the slopes in c_t that come from the step after, and then in c_{t-1}
KERNEL cell_backward(REAL* z, const REAL* c, const REAL* slopes, REAL* later, int64 t, int64 w, int64 steps, int64 rows,
                     int64 n)
{
    for (int64 e = int64(blockIdx.x) * THREADS + threadIdx.x; e < w * rows * n; e += int64(gridDim.x) * THREADS) {
        const Cell at = cell(e, t, steps, rows, n);
        REAL* const a = z + at.z;
        const REAL i = a[0], f = a[n], g = a[2 * n], o = a[3 * n], tanh_c = tanh(c[at.now]), slope = slopes[at.slope];
        const REAL own = later[e] + slope * o * (1 - tanh_c * tanh_c);
        a[0] = own * g * i * (1 - i);
        a[n] = own * c[at.before] * f * (1 - f);
        a[2 * n] = own * i * (1 - g * g);
        a[3 * n] = slope * tanh_c * o * (1 - o);
        later[e] = own * f;
    }
}

// A block for each row of z (m, n)
KERNEL cross_entropies(REAL* z, const REAL* bias, const int64* y, double share, double* values, int64 n)
{
    __shared__ double tops[THREADS / 32];
    const int64 right = y[blockIdx.x];
    z += blockIdx.x * n;
    double top = REAL(z[0] + bias[0]), sum = 0;
    for (int64 k = threadIdx.x; k < n; k += THREADS) {
        const double score = REAL(z[k] + bias[k]);
        if (!(score <= top)) top = score;                           // NaN, too
    }
    for (int lane = 16; lane; lane /= 2) {
        const double other = __shfl_xor_sync(0xffffffff, top, lane);
        if (!(other <= top)) top = other;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int k = 0; k < THREADS / 32; k++) if (!(tops[k] <= top)) top = tops[k];
    const double score = REAL(z[right] + bias[right]);
    __syncthreads();                                                // all have read it
    for (int64 k = threadIdx.x; k < n; k += THREADS) {
        z[k] = exp(REAL(REAL(z[k] + bias[k]) - REAL(top)));
        sum += z[k];
    }
    sum = block_sum(sum);
    const REAL factor = share / sum;
    for (int64 k = threadIdx.x; k < n; k += THREADS) z[k] = z[k] * factor - (k == right ? REAL(share) : 0);
    if (threadIdx.x == 0) values[blockIdx.x] = log(sum) + (top - score);
}

// order (m,): the places of `rows` (m,), by row; a block for each, and the first of a row's does them all.
KERNEL add_rows(REAL* out, const int64* rows, const int64* order, const REAL* values, int64 m, int64 n)
{
    const int64 first = blockIdx.x, row = rows[order[first]];
    if (first && rows[order[first - 1]] == row) return;
    for (int64 j = threadIdx.x; j < n; j += THREADS) {
        REAL sum = out[row * n + j];
        for (int64 k = first; k < m && rows[order[k]] == row; k++) sum += values[order[k] * n + j];
        out[row * n + j] = sum;
    }
}
