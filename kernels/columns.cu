// The median, the trimmed mean and the mean around the median of each column of the rows W [X; E]: mpiclip/columns.py.
//
// One thread a column: its ROWS numbers stay in registers, where a sorting network orders them. The launcher compiles
// this file for each RULE, ROWS (k) and TRIM (f), with NETWORK, its comparators, written out; of those the compiler
// leaves out what the result does not need.
#include "rows.cuh"

#ifndef RULE
#define RULE MEAN_AROUND_MEDIAN
#define ROWS 5
#define TRIM 1
#define NETWORK C(0, 4) C(0, 2) C(1, 3) C(2, 4) C(0, 1) C(2, 3) C(1, 4) C(1, 2) C(3, 4)
#endif

enum Rule { MEDIAN, TRIMMED_MEAN, MEAN_AROUND_MEDIAN };

__device__ inline void order(REAL& a, REAL& b)
{
    const REAL low = a < b ? a : b, high = a < b ? b : a;
    a = low;
    b = high;
}

// w (read, ROWS) are the factors of the rows `index` (read,) of [X; E]; without them the rows are taken as they are. A
// row of X begins `pitch` numbers behind the one before, a row of E `pitch_e` numbers; X has n rows.
KERNEL column_rule(const REAL* x, int64 pitch, int64 n, const REAL* e, int64 pitch_e, const REAL* w,
                   const int64* index, int64 read, REAL* out, int64 d)
{
    for (int64 c = int64(blockIdx.x) * THREADS + threadIdx.x; c < d; c += int64(gridDim.x) * THREADS) {
        REAL at[ROWS] = {};
        if (w) {
            for (int64 j = 0; j < read; j++) {
                const int64 row = index[j];
                const REAL y = row < n ? x[row * pitch + c] : e[(row - n) * pitch_e + c];
                #pragma unroll
                for (int i = 0; i < ROWS; i++) at[i] = fma(w[j * ROWS + i], y, at[i]);
            }
        } else {
            #pragma unroll
            for (int i = 0; i < ROWS; i++) at[i] = i < n ? x[i * pitch + c] : e[(i - n) * pitch_e + c];
        }
        #define C(a, b) order(at[a], at[b]);
        NETWORK
        #undef C
        const REAL median = ROWS % 2 ? at[ROWS / 2] : at[(ROWS - 1) / 2] / 2 + at[ROWS / 2] / 2;
        double sum = 0;
        if (RULE == MEAN_AROUND_MEDIAN) {       // each of the f lowest gives way to the one k − f above it, if nearer
            #pragma unroll
            for (int i = 0; i < TRIM; i++)
                sum += at[ROWS - TRIM + i] - median < median - at[i] ? at[ROWS - TRIM + i] : at[i];
        }
        #pragma unroll
        for (int i = TRIM; i < ROWS - TRIM; i++) sum += at[i];
        out[c] = RULE == MEDIAN ? median : REAL(sum / (RULE == TRIMMED_MEAN ? ROWS - 2 * TRIM : ROWS - TRIM));
    }
}
