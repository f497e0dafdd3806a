/* The k largest |·| of each row of u (w, d), float32 and float64: top_k and clip_step_top_k of mpiclip/ops.py.

   |x| is compared as the integer that its bits are without the sign, its key: the same order, with infinity and NaN
   above all numbers. A few thousand numbers of the row, drawn at fixed places, give a threshold a little below the k-th
   largest key; one pass collects the candidates, the numbers at or above it, and those are selected from exactly. The
   threshold may be wrong, the result cannot: where the candidates become too many, the k best of them stay and the
   threshold rises; where there are fewer than k, the row is passed over again with no threshold.

   A kernel returns 0, or DECLINED before anything is written, as in ops.c. */

#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "kernels.h"

enum {
    BLOCK = 1 << 12,                /* numbers that are looked at together: they stay in the first-level cache */
    SAMPLE = 2 * BLOCK,             /* numbers drawn from a row, … */
    SPARSENESS = 32,                /* … but no more than one in so many */
    BINS = 1 << 11,                 /* of a histogram of keys, … */
    FEW_BINS = 1 << 7,              /* … and of fewer keys than that */
    DECLINED = 1,
};

static inline size larger(size a, size b) { return a > b ? a : b; }

/* How many candidates the list of n numbers has room for: for all of them; or for so many that k are chosen from 4k at
   a time, a few steps a number even where every number is a candidate. The sample, too, has room there. */
static size list_capacity(size n, size k)
{
    return smaller(n, 4 * k + 2 * BLOCK);
}

#define REAL float
#define BITS int32_t
#define MOST INT32_MAX
#define SUFFIX f32
#include "select.c"
#undef REAL
#undef BITS
#undef MOST
#undef SUFFIX
#define REAL double
#define BITS int64_t
#define MOST INT64_MAX
#define SUFFIX f64
#include "select.c"

/* v is NULL in top_k. */
static int select_rows(const array *u, const array *v, size k, double tau, const array *taus, const array *norms,
                       const array *indices, const array *values)
{
    if (!is_float(u, READABLE) || u->ndim < 1 || u->ndim > 2)
        return DECLINED;
    int number = u->dtype->number, rows = u->ndim - 1;
    size d = u->shape[rows];
    if (k < 1 || k > d || d > INT32_MAX || (v && (v == u || !fits(v, WRITABLE, number, u, u->ndim)))
        || (taus != none && !fits(taus, READABLE, FLOAT64, u, rows))
        || (norms != none && !fits(norms, WRITABLE, FLOAT64, u, rows)))
        return DECLINED;
    return BY_DTYPE(u, select_rows, u->data, v ? v->data : NULL, k, tau, taus == none ? NULL : taus->data,
                    norms == none ? NULL : norms->data, indices->data, values->data, rows ? u->shape[0] : 1, d);
}

/* ops.top_k; indices (w, k) int32 and values (w, k) are the launcher's. */
int top_k(const array *u, size k, const array *indices, const array *values)
{
    return select_rows(u, NULL, k, 0, none, none, indices, values);
}

/* ops.clip_step_top_k: the k largest |·| of c_i = clip_τ(u_i − v_i), v_i += those, norms_i = ‖u_i − v_i‖ */
int clip_step_top_k(const array *u, const array *v, size k, double tau, const array *taus, const array *norms,
                    const array *indices, const array *values)
{
    return select_rows(u, v, k, tau, taus, norms, indices, values);
}

#else                               /* once for each REAL */

/* The candidates of a part of a row, in the order of their places; keys is scratch. */
typedef struct {
    int32_t *index;
    REAL *value;
    BITS *keys, floor;
    size n, capacity;
} NAME(list);

static inline BITS NAME(key)(REAL x)
{
    BITS bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & MOST;
}

CPU_GENERATIONS static void NAME(keys)(const REAL *x, BITS *keys, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++)
        keys[j] = NAME(key)(x[j]);
}

CPU_GENERATIONS static void NAME(range)(const BITS *keys, size n, BITS *lowest, BITS *highest)
{
    BITS low = keys[0], high = keys[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (size j = 1; j < n; j++) {
        low = keys[j] < low ? keys[j] : low;
        high = keys[j] > high ? keys[j] : high;
    }
    *lowest = low;
    *highest = high;
}

/* The k-th largest key. The keys are moved; *k becomes how many of the k largest are equal to it. Each turn keeps the
   keys of one bin. */
static BITS NAME(kth_largest)(BITS *keys, size n, size *k)
{
    for (;;) {
        BITS low, high;
        NAME(range)(keys, n, &low, &high);
        if (low == high)
            return low;
        int shift = 0, bins = n < BINS ? FEW_BINS : BINS;
        while ((high - low) >> shift >= bins)
            shift++;
        uint32_t count[BINS];
        memset(count, 0, bins * sizeof *count);
        for (size j = 0; j < n; j++)
            count[(keys[j] - low) >> shift]++;
        BITS bin = (high - low) >> shift;
        while (count[bin] < *k)
            *k -= count[bin--];
        size kept = 0;
        for (size j = 0; j < n; j++) {
            keys[kept] = keys[j];
            kept += (keys[j] - low) >> shift == bin;
        }
        n = kept;
    }
}

/* The k largest of several lists, which have k at least, into index and value, which may be the first list's own.
   Returns the k-th largest key. */
static BITS NAME(select)(const NAME(list) *lists, size parts, size k, int32_t *index, REAL *value)
{
    BITS *keys = lists[0].keys, kth = 0;
    size n = 0, ties = k;
    for (size part = 0; part < parts; part++) {
        NAME(keys)(lists[part].value, keys + n, lists[part].n);
        n += lists[part].n;
    }
    if (n > k)
        kth = NAME(kth_largest)(keys, n, &ties);
    size out = 0;
    for (size part = 0; part < parts; part++)
        for (size j = 0; j < lists[part].n && out < k; j++) {
            REAL x = lists[part].value[j];
            BITS key = NAME(key)(x);
            int tie = key == kth && ties > 0;
            index[out] = lists[part].index[j];
            value[out] = x;
            out += (key > kth) | tie;
            ties -= tie;
        }
    return kth;
}

/* The threshold that the sample says: k of the row's numbers lie above it but for rare bad luck, few more do. */
static BITS NAME(guess)(const REAL *u, const REAL *v, size d, size k, BITS *keys)
{
    size n = smaller(SAMPLE, d / SPARSENESS);
    double expected = (double)k * n / d;
    size rank = expected + 4 * sqrt(expected) + 4;
    if (rank >= n)
        return -1;
    uint32_t random = 1;
    for (size i = 0; i < n; i++) {
        random = random * 1664525 + 1013904223;             /* Knuth; no pattern in the row keeps step with it */
        size j = ((double)i + random * 0x1p-32) * ((double)d / n);
        keys[i] = NAME(key)(v ? u[j] - v[j] : u[j]);
    }
    return NAME(kth_largest)(keys, n, &rank) - 1;
}

/* e = u − v; lane[l] += e², in the order of clip_step's sums */
CPU_GENERATIONS static void NAME(difference)(const REAL *restrict u, const REAL *restrict v, REAL *restrict e,
                                             double *restrict lane, size n)
{
    size j = 0;
    for (; j + LANES <= n; j += LANES) {
        fetch_ahead(u + j, LANES * sizeof(REAL));
        fetch_ahead(v + j, LANES * sizeof(REAL));
        for (int l = 0; l < LANES; l++) {
            e[j + l] = u[j + l] - v[j + l];
            double x = e[j + l];
            lane[l] += x * x;
        }
    }
    for (int l = 0; j < n; j++, l++) {
        e[j] = u[j] - v[j];
        lane[l] += (double)e[j] * e[j];
    }
}

/* Puts the candidates among e_0 … e_n−1 on the list; e_0 has the place j0 in the row. */
CPU_GENERATIONS static void NAME(append)(NAME(list) *list, const REAL *e, size n, size j0)
{
    BITS floor = list->floor;
    unsigned char hit[BLOCK + 8];
    short group[BLOCK / 8 + 1];
    size j = 0, m = list->n, groups = 0;
    for (; j + LANES <= n; j += LANES) {
        fetch_ahead(e + j, LANES * sizeof(REAL));
        for (int l = 0; l < LANES; l++)
            hit[j + l] = NAME(key)(e[j + l]) > floor;
    }
    for (; j < n; j++)
        hit[j] = NAME(key)(e[j]) > floor;
    memset(hit + n, 0, 8);

    /* A hit is rare and comes by surprise. Eight bytes are looked at together, without a branch first. */
    for (j = 0; j < n; j += 8) {
        uint64_t hits;
        memcpy(&hits, hit + j, 8);
        group[groups] = j;
        groups += hits != 0;
    }
    for (size g = 0; g < groups; g++) {
        uint64_t hits;
        memcpy(&hits, hit + group[g], 8);
        for (; hits; hits &= hits - 1) {
            size at = group[g] + (__builtin_ctzll(hits) >> 3);
            list->index[m] = j0 + at;
            list->value[m++] = e[at];
        }
    }
    list->n = m;
}

/* Collects the candidates among n numbers of a row, the first of them at the place j0. Returns Σ (u_j − v_j)², the
   bytes that clip_step has for a chunk or a short row. */
static double NAME(collect)(NAME(list) *list, const REAL *u, const REAL *v, size j0, size n, size k)
{
    double lane[LANES] = {0};
    REAL e[BLOCK];
    for (size j = j0; j < j0 + n; j += BLOCK) {
        size m = smaller(BLOCK, j0 + n - j);
        if (list->n + m > list->capacity) {
            list->floor = NAME(select)(list, 1, k, list->index, list->value);
            list->n = k;
        }
        if (v)
            NAME(difference)(u + j, v + j, e, lane, m);
        NAME(append)(list, v ? e : u + j, m, j);
    }
    return sum_of(lane);
}

/* From a row's candidates to its results. */
static void NAME(finish)(const NAME(list) *lists, size parts, size k, REAL *v, REAL factor, int32_t *index, REAL *value)
{
    NAME(select)(lists, parts, k, index, value);
    int finite = !isnan(factor);
    for (size j = 0; j < k; j++)
        finite &= isfinite(value[j]) != 0;
    for (size j = 0; j < k; j++)
        if (!finite) {
            index[j] = j;
            value[j] = NAN;
        } else if (v) {
            value[j] *= factor;
            v[index[j]] += value[j];
        }
}

/* The candidates among the chunks first … last − 1 of a row, and each chunk's sum. Returns how many there are. */
static size NAME(collect_part)(NAME(list) *list, BITS floor, double *sums, const REAL *u, const REAL *v, size d,
                               size chunk, size first, size last, size k)
{
    list->floor = floor;
    list->n = 0;
    for (size c = first; c < last; c++)
        sums[c] = NAME(collect)(list, u, v, c * chunk, smaller(chunk, d - c * chunk), k);
    return list->n;
}

/* One row. Its chunks are dealt out to the parts, one list and one thread each; sums has a place for each chunk. */
static void NAME(select_row)(NAME(list) *lists, size parts, double *sums, const REAL *u, REAL *v, size d, size chunk,
                             size k, double tau, double *norm, int32_t *index, REAL *value)
{
    size chunks = (d + chunk - 1) / chunk, found;
    BITS floor = NAME(guess)(u, v, d, k, lists[0].keys);
    for (;; floor = -1) {
        if (parts == 1)                                     /* a parallel region costs more than a short row */
            found = NAME(collect_part)(lists, floor, sums, u, v, d, chunk, 0, chunks, k);
        else {
            found = 0;
#pragma omp parallel for schedule(static) num_threads(parts) reduction(+ : found)
            for (size part = 0; part < parts; part++)
                found += NAME(collect_part)(lists + part, floor, sums, u, v, d, chunk, chunks * part / parts,
                                            chunks * (part + 1) / parts, k);
        }
        if (found >= k)
            break;
    }
    double sum = 0;
    for (size c = 0; c < chunks; c++)
        sum += sums[c];
    if (norm)
        *norm = sqrt(sum);
    NAME(finish)(lists, parts, k, v, v ? NAME(factor)(sqrt(sum), tau, 0) : 1, index, value);
}

/* select_rows above; v, taus and norms may be NULL. */
static int NAME(select_rows)(const REAL *u, REAL *v, size k, double tau, const double *taus, double *norms,
                             int32_t *indices, REAL *values, size w, size d)
{
    if (!(tau >= 0))
        return DECLINED;
    for (size i = 0; taus && i < w; i++)
        if (!(taus[i] >= 0))
            return DECLINED;

    int together = d >= LONG_ROW;                           /* the threads share a row */
    size threads = w * d > SMALL ? most_threads() : 1, chunk = together ? CHUNK : d, chunks = (d + chunk - 1) / chunk;
    size parts = together ? smaller(threads, chunks) : 1;
    size capacity = list_capacity((chunks + parts - 1) / parts * chunk, k);
    NAME(list) *lists = malloc(threads * sizeof *lists);
    double *sums = malloc(larger(threads, chunks) * sizeof *sums);
    BITS *keys = malloc(threads * capacity * (sizeof(BITS) + sizeof(REAL) + sizeof(int32_t)));
    int failed = !lists || !sums || !keys;
    if (!failed) {
        REAL *value = (REAL *)(keys + threads * capacity);
        int32_t *index = (int32_t *)(value + threads * capacity);
        for (size t = 0; t < threads; t++)                  /* all keys one behind the other: NAME(select) wants it */
            lists[t] = (NAME(list)){.keys = keys + t * capacity, .value = value + t * capacity,
                                    .index = index + t * capacity, .capacity = capacity};
#pragma omp parallel for schedule(static) num_threads(threads) if (!together && threads > 1)
        for (size i = 0; i < w; i++) {
            size t = together ? 0 : thread_number();
            NAME(select_row)(lists + t, parts, sums + t, u + i * d, v ? v + i * d : NULL, d, chunk, k,
                             taus ? taus[i] : tau, norms ? norms + i : NULL, indices + i * k, values + i * k);
        }
    }
    free(lists);
    free(sums);
    free(keys);
    return failed ? DECLINED : 0;
}

#endif
