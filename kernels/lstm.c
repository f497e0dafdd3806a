/* What a language model with LSTM layers does besides large products of matrices, float32 and float64.

       a_t = z_t + W h_{t-1},   (i, f, g, o) = (σ, σ, tanh, σ)(a_t),   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)

   forward and backward through a whole sequence; the cross entropy of scores and its slopes; sums of slopes by token.
   W is packed once for all steps, so that the product with it, the bottleneck, reads it in the order it is stored: a
   few rows of h and a few vectors of its columns stay in registers.

   NumPy definitions: mpiclip/cells.py.

   exp, σ and tanh: x = n ln 2 + r, |r| ≤ ½ ln 2, e^r − 1 by its Taylor polynomial, whose error is below a rounding;
   tanh x = E/(E + 2), E = e^{2x} − 1. Relative errors: at most 4 units in the last place (tests/test_lstm.py).

   Threads share out the sequences; each result is computed by one of them, in one order: the bytes do not depend on the
   threads. */

#ifndef REAL
/* Fused multiply-add where the CPU has it. */
#pragma GCC optimize("fp-contract=fast")

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#include "array.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#undef CPU_GENERATIONS
#define CPU_GENERATIONS __attribute__((noinline, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define MANY_REGISTERS __builtin_cpu_supports("avx512f")
#else
#define MANY_REGISTERS 0
#endif

#define INLINE static inline __attribute__((always_inline))     /* into its caller's CPU_GENERATIONS */

enum { INT64 = sizeof(long) == 8 ? 7 : 9 };                      /* NPY_LONG or NPY_LONGLONG */
enum {
    VECTOR = 64,                    /* bytes */
    APART = 16,                     /* numbers between two rows of a copy, lest they all want the same place in the cache */
    BLOCK = 1024,                   /* numbers that are added up before they go into a sum in double */
    DECLINED = 1,
};

typedef struct {
    size w, steps, rows, units;     /* workers or parts of one, T, sequences of each, numbers of h */
    ptrdiff_t pitch;                /* bytes from a worker's W to the next one's; 0: one W for all */
} sizes;

static inline size round_up(size n, size to) { return (n + to - 1) / to * to; }

#define REAL float
#define INT int32_t
#define SUFFIX f32
#define TERMS 7
#define DIGITS 23
#include "lstm.c"
#undef REAL
#undef INT
#undef SUFFIX
#undef TERMS
#undef DIGITS
#define REAL double
#define INT int64_t
#define SUFFIX f64
#define TERMS 13
#define DIGITS 52
#include "lstm.c"

static int is_4(const array *a, int number, size w, size steps, size rows, size units)
{
    return is_dense(a, WRITABLE) && a->dtype->number == number && a->ndim == 4 && a->shape[0] == w
        && a->shape[1] == steps && a->shape[2] == rows && a->shape[3] == units;
}

/* z (w, T, rows, 4 units), W (w or 1, 4 units, units), c (w, T + 1, rows, units), h (w, T + more, rows, units). 0 if
   something does not fit. */
static int sizes_of(sizes *s, const array *z, const array *W, const array *h, const array *c, int more)
{
    if (!is_float(z, WRITABLE) || z->ndim != 4 || W->type != ndarray || W->dtype->byteorder != '=' || W->ndim != 3
        || !(W->flags & ALIGNED) || W->dtype->number != z->dtype->number)
        return 0;
    int number = z->dtype->number;
    size bytes = number == FLOAT32 ? 4 : 8, n = W->shape[2];
    *s = (sizes){z->shape[0], z->shape[1], z->shape[2], n, W->shape[0] == 1 ? 0 : W->strides[0]};
    return z->shape[3] == 4 * n && W->shape[1] == 4 * n && n > 0 && (W->shape[0] == 1 || W->shape[0] == s->w)
        && (n == 1 || W->strides[2] == bytes) && W->strides[1] == bytes * n
        && is_4(h, number, s->w, s->steps + more, s->rows, n) && is_4(c, number, s->w, s->steps + 1, s->rows, n);
}

/* z becomes (i, f, g, o); h and c, whose first step is given, are filled: cells.lstm_forward */
int lstm_forward(const array *z, const array *W, const array *h, const array *c)
{
    sizes s;
    return sizes_of(&s, z, W, h, c, 1) ? BY_DTYPE(z, lstm_forward, &s, z->data, W->data, h->data, c->data) : DECLINED;
}

/* z, which holds (i, f, g, o), becomes the slopes in a; slopes in h are completed: cells.lstm_backward */
int lstm_backward(const array *z, const array *W, const array *c, const array *slopes)
{
    sizes s;
    return sizes_of(&s, z, W, slopes, c, 0) ? BY_DTYPE(z, lstm_backward, &s, z->data, W->data, c->data, slopes->data)
                                            : DECLINED;
}

/* z (m, V) becomes the slopes, values (m,): cells.cross_entropies */
int cross_entropies(const array *z, const array *bias, const array *y, double share, const array *values)
{
    if (!is_float(z, WRITABLE) || z->ndim != 2 || z->shape[1] < 1 || !fits(values, WRITABLE, FLOAT64, z, 1)
        || !fits(y, READABLE, INT64, z, 1) || !is_dense(bias, READABLE) || bias->dtype->number != z->dtype->number
        || bias->ndim != 1 || bias->shape[0] != z->shape[1])
        return DECLINED;
    size m = z->shape[0], n = z->shape[1];
    for (size r = 0; r < m; r++)
        if (((const int64_t *)y->data)[r] < 0 || ((const int64_t *)y->data)[r] >= n)
            return DECLINED;
    BY_DTYPE(z, cross_entropies, z->data, bias->data, y->data, share, values->data, m, n);
    return 0;
}

/* out[rows_r] += values_r: cells.add_rows. out (V, n), rows (m,), values (m, n) */
int add_rows(const array *out, const array *rows, const array *values)
{
    if (!is_float(out, WRITABLE) || out->ndim != 2 || !is_float(values, READABLE) || values->ndim != 2
        || values->dtype->number != out->dtype->number || values->shape[1] != out->shape[1]
        || !fits(rows, READABLE, INT64, values, 1))
        return DECLINED;
    const int64_t *row = rows->data;
    for (size r = 0; r < rows->shape[0]; r++)
        if (row[r] < 0 || row[r] >= out->shape[0])
            return DECLINED;
    BY_DTYPE(out, add_rows, out->data, row, values->data, rows->shape[0], out->shape[1]);
    return 0;
}

#else                               /* once for each REAL */

#define LANES_HERE ((size)(VECTOR / sizeof(REAL)))
#define VEC NAME(vec)

typedef REAL VEC __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)), may_alias));

/* e^x = scale · (rest + 1), |x| < 88 (708) */
INLINE void NAME(power)(REAL x, REAL *scale, REAL *rest)
{
    const REAL shift = (REAL)1.5 * ((INT)1 << DIGITS);          /* whole numbers lie in the last digits of what is near it */
    REAL t = x * (REAL)1.4426950408889634 + shift, n = t - shift;
    /* ln 2 in two parts: the products of n with the first one are exact */
    REAL r = DIGITS == 23 ? x - n * (REAL)0x1.62ep-1 - n * (REAL)0x1.0bfbe8e7bcd5ep-15
                          : x - n * (REAL)0x1.62e42feep-1 - n * (REAL)0x1.a39ef35793c76p-33;
    REAL p = 1, factorial = 1;
    for (int k = 2; k <= TERMS; k++)
        factorial *= k;
    p = 1 / factorial;
    for (int k = TERMS; k > 1; k--) {
        factorial /= k;
        p = p * r + 1 / factorial;
    }
    *rest = p * r;
    INT bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (INT)((DIGITS == 23 ? (uint64_t)(uint32_t)bits : (uint64_t)bits) << DIGITS) + ((INT)(DIGITS == 23 ? 127 : 1023) << DIGITS);
    memcpy(scale, &bits, sizeof bits);
}

/* NaN stays NaN, here and below. */
INLINE REAL NAME(within)(REAL x, REAL most)
{
    x = x > most ? most : x;
    return x < -most ? -most : x;
}

/* 1/(1 + e^{−x}) */
INLINE REAL NAME(sigma)(REAL x)
{
    REAL scale, rest;
    NAME(power)(NAME(within)(-x, DIGITS == 23 ? 87 : 708), &scale, &rest);
    return 1 / (1 + (scale * rest + scale));
}

INLINE REAL NAME(hyperbolic)(REAL x)
{
    REAL scale, rest;
    NAME(power)(NAME(within)(2 * x, DIGITS == 23 ? 20 : 40), &scale, &rest);
    REAL e = scale * rest + (scale - 1);
    return e / (e + 2);
}

/* W (4 n, n) as panels of `width` columns, each (k, width), with zeros in the last: of Wᵀ forward, of W backward. */
static void NAME(pack)(const REAL *W, size n, size width, int backward, REAL *panels)
{
    size K = backward ? 4 * n : n, columns = backward ? n : 4 * n;
    for (size first = 0; first < columns; first += width)
        for (size k = 0; k < K; k++, panels += width)
            for (size c = 0; c < width; c++)
                panels[c] = first + c >= columns ? 0 : backward ? W[k * n + first + c] : W[(first + c) * n + k];
}

/* `rows` rows of a product with one panel, added to C, whose columns from `columns` on do not exist */
INLINE void NAME(tile)(const REAL *A, size pitch, const REAL *panel, size K, REAL *C, size line, size columns,
                       const int rows, const int vectors)
{
    VEC sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = (VEC){0};
    for (size k = 0; k < K; k++, panel += vectors * LANES_HERE)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            REAL number = A[r * pitch + k];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                sum[r][v] += number * *(const VEC *)(panel + v * LANES_HERE);
        }
    if (columns >= vectors * LANES_HERE) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                *(VEC *)(C + r * line + v * LANES_HERE) += sum[r][v];
        return;
    }
    for (int r = 0; r < rows; r++)
        for (size c = 0; c < columns; c++)
            C[r * line + c] += ((const REAL *)sum[r])[c];
}

/* C (rows, columns) += A (rows, K) times the panels; a row of A begins `pitch` numbers behind the one before, one of C
   `line`. */
CPU_GENERATIONS static void NAME(add_product)(const REAL *A, size pitch, const REAL *panels, size K, REAL *C, size line,
                                              size rows, size columns, int vectors)
{
    size width = vectors * LANES_HERE;
    for (size first = 0; first < columns; first += width, panels += K * width) {
        size r = 0, left = columns - first;
#define TILES(count, vectors) \
        for (; r + count <= rows; r += count) \
            NAME(tile)(A + r * pitch, pitch, panels, K, C + r * line + first, line, left, count, vectors);
        if (vectors == 2) {
            TILES(10, 2) TILES(5, 2) TILES(2, 2) TILES(1, 2)
        } else {
            TILES(6, 1) TILES(3, 1) TILES(1, 1)
        }
#undef TILES
    }
}

/* One step of one sequence */
CPU_GENERATIONS static void NAME(cell_forward)(REAL *restrict z, const REAL *restrict before, REAL *restrict c,
                                               REAL *restrict h, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        REAL i = NAME(sigma)(z[j]), f = NAME(sigma)(z[n + j]), g = NAME(hyperbolic)(z[2 * n + j]);
        REAL o = NAME(sigma)(z[3 * n + j]), cell = f * before[j] + i * g;
        z[j] = i, z[n + j] = f, z[2 * n + j] = g, z[3 * n + j] = o;
        c[j] = cell;
        h[j] = o * NAME(hyperbolic)(cell);
    }
}

/* slope_h: in h_t; slope_c: in c_t, and then in c_{t−1} */
CPU_GENERATIONS static void NAME(cell_backward)(REAL *restrict z, const REAL *restrict before, const REAL *restrict c,
                                                const REAL *restrict slope_h, REAL *restrict slope_c, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        REAL i = z[j], f = z[n + j], g = z[2 * n + j], o = z[3 * n + j], tanh_c = NAME(hyperbolic)(c[j]);
        REAL slope = slope_c[j] + slope_h[j] * o * (1 - tanh_c * tanh_c);
        z[j] = slope * g * i * (1 - i);
        z[n + j] = slope * before[j] * f * (1 - f);
        z[2 * n + j] = slope * i * (1 - g * g);
        z[3 * n + j] = slope_h[j] * tanh_c * o * (1 - o);
        slope_c[j] = slope * f;
    }
}

/* The sequences first … last − 1 of worker i. room: (last − first) (4 n + APART) numbers, and as many n. */
static void NAME(forward_rows)(const sizes *s, size i, size first, size last, const REAL *panels, int vectors, REAL *z,
                               REAL *h, REAL *c, REAL *room)
{
    size n = s->units, step = s->rows * n, pitch = n + APART;
    z += (i * s->steps * s->rows + first) * 4 * n;
    h += (i * (s->steps + 1) * s->rows + first) * n;
    c += (i * (s->steps + 1) * s->rows + first) * n;
    for (size t = 0; t < s->steps; t++, z += 4 * step, h += step, c += step) {
        for (size r = 0; r < last - first; r++)
            memcpy(room + r * pitch, h + r * n, n * sizeof(REAL));
        NAME(add_product)(room, pitch, panels, n, z, 4 * n, last - first, 4 * n, vectors);
        for (size r = 0; r < last - first; r++)
            NAME(cell_forward)(z + r * 4 * n, c + r * n, c + step + r * n, h + step + r * n, n);
    }
}

static void NAME(backward_rows)(const sizes *s, size i, size first, size last, const REAL *panels, int vectors, REAL *z,
                                const REAL *c, REAL *slopes, REAL *room)
{
    size n = s->units, step = s->rows * n, pitch = 4 * n + APART, rows = last - first;
    REAL *slope_c = room + rows * pitch;
    memset(slope_c, 0, rows * n * sizeof(REAL));
    z += ((i * s->steps + s->steps) * s->rows + first) * 4 * n;
    slopes += ((i * s->steps + s->steps) * s->rows + first) * n;
    c += ((i * (s->steps + 1) + s->steps) * s->rows + first) * n;
    for (size t = s->steps; t-- > 0; c -= step) {
        z -= 4 * step, slopes -= step;
        if (t + 1 < s->steps)
            NAME(add_product)(room, pitch, panels, 4 * n, slopes, n, rows, n, vectors);
        for (size r = 0; r < rows; r++) {
            NAME(cell_backward)(z + r * 4 * n, c - step + r * n, c + r * n, slopes + r * n, slope_c + r * n, n);
            memcpy(room + r * pitch, z + r * 4 * n, 4 * n * sizeof(REAL));
        }
    }
}

/* forward, or backward where h is NULL */
static int NAME(sequences)(const sizes *s, REAL *z, const REAL *W, REAL *h, REAL *c, REAL *slopes)
{
    size n = s->units, K = h ? n : 4 * n, columns = h ? 4 * n : n, matrices = s->pitch ? s->w : 1;
    if (s->w * s->rows == 0)
        return 0;
    int vectors = MANY_REGISTERS ? 2 : 1;
    size width = vectors * LANES_HERE, each = round_up(columns, width) * K;
    size parts = smaller(s->rows, (most_threads() + s->w - 1) / s->w);       /* that a worker's sequences are cut into */
    size room = round_up((s->rows + parts - 1) / parts * (5 * n + APART), VECTOR);
    REAL *panels = aligned_alloc(VECTOR, round_up((matrices * each + s->w * parts * room) * sizeof(REAL), VECTOR));
    if (!panels)
        return DECLINED;
#pragma omp parallel if (s->w * parts > 1)
    {
#pragma omp for schedule(static)
        for (size i = 0; i < matrices; i++)
            NAME(pack)((const REAL *)((const char *)W + i * s->pitch), n, width, !h, panels + i * each);
#pragma omp for schedule(static)
        for (size task = 0; task < s->w * parts; task++) {
            size i = task / parts, part = task % parts;
            size first = s->rows * part / parts, last = s->rows * (part + 1) / parts;
            const REAL *own = panels + (s->pitch ? i * each : 0);
            REAL *scratch = panels + matrices * each + task * room;
            if (h)
                NAME(forward_rows)(s, i, first, last, own, vectors, z, h, c, scratch);
            else
                NAME(backward_rows)(s, i, first, last, own, vectors, z, c, slopes, scratch);
        }
    }
    free(panels);
    return 0;
}

static int NAME(lstm_forward)(const sizes *s, REAL *z, const REAL *W, REAL *h, REAL *c)
{
    return NAME(sequences)(s, z, W, h, c, NULL);
}

static int NAME(lstm_backward)(const sizes *s, REAL *z, const REAL *W, REAL *c, REAL *slopes)
{
    return NAME(sequences)(s, z, W, NULL, c, slopes);
}

CPU_GENERATIONS static double NAME(cross_entropy)(REAL *restrict z, const REAL *restrict bias, size y, double share,
                                                  size n)
{
    REAL most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (size k = 0; k < n; k++) {
        z[k] += bias[k];
        most = z[k] > most ? z[k] : most;
    }
    REAL right = z[y];
    double total = 0;
    for (size first = 0; first < n; first += BLOCK) {
        size last = smaller(first + BLOCK, n);
        REAL sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size k = first; k < last; k++) {
            REAL scale, rest;
            NAME(power)(NAME(within)(z[k] - most, DIGITS == 23 ? 87 : 708), &scale, &rest);
            z[k] = scale * rest + scale;
            sum += z[k];
        }
        total += sum;
    }
    REAL factor = (REAL)(share / total);
#pragma omp simd
    for (size k = 0; k < n; k++)
        z[k] *= factor;
    z[y] -= (REAL)share;
    return log(total) + ((double)most - right);
}

static void NAME(cross_entropies)(REAL *z, const REAL *bias, const int64_t *y, double share, double *values, size m,
                                  size n)
{
#pragma omp parallel for schedule(static) if (m * n > SMALL)
    for (size r = 0; r < m; r++)
        values[r] = NAME(cross_entropy)(z + r * n, bias, y[r], share, n);
}

CPU_GENERATIONS static void NAME(add_columns)(REAL *restrict out, const int64_t *row, const REAL *restrict values,
                                              size m, size n, size first, size last)
{
    for (size r = 0; r < m; r++)
#pragma omp simd
        for (size j = first; j < last; j++)
            out[row[r] * n + j] += values[r * n + j];
}

static void NAME(add_rows)(REAL *out, const int64_t *row, const REAL *values, size m, size n)
{
    size parts = m * n > SMALL ? smaller(most_threads(), n / LANES_HERE + 1) : 1;
#pragma omp parallel for schedule(static) if (parts > 1)
    for (size part = 0; part < parts; part++)
        NAME(add_columns)(out, row, values, m, n, n * part / parts, n * (part + 1) / parts);
}

#undef LANES_HERE
#undef VEC
#endif
