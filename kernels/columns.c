/* What robust aggregation does to all the columns of n vectors, float32 and float64: mpiclip/columns.py.

   The columns are taken TILE at a time: that many numbers of each row are copied to where they lie side by side (load)
   (PANEL tiles at once: long reads are faster) and mixed where there is a mixing matrix (mix): what comes out is in the
   first-level cache when the rule looks at it.
   Order statistics are found by comparators, min and max of two rows: Batcher's odd-even merge sort, less all that the
   result does not need. The first comparators, of up to LEAF rows, run in registers (sort_leaf); the others, of which
   the number of rows and f decide, are a list that is made in each call, which takes some µs (make_program).

   What becomes of a column depends on nothing but the column: not on the tile it is in, nor on the threads. Sums over
   columns are added in parts that depend on d alone.

   A kernel returns 0, or DECLINED before anything is written, as in ops.c. */

#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tgmath.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "columns.h"

enum {
    ROW = 4 * LINE,                 /* bytes of a row in a tile */
    SIDE = 4,                       /* rows that are mixed together */
    LEAF = 16,                      /* as many rows are sorted in registers */
    LEAF_COMPARES = 63,
    PANEL = 8,                      /* tiles that are copied together, for memory likes long reads */
    LANE = 8,                       /* sums of a row */
    AT_ONCE = 4 * LANE,             /* independent ones: enough to hide the latency of an addition */
};

/* The comparators that sort LEAF rows, those of rows up to n sort n. */
static const unsigned char leaf_compare[LEAF_COMPARES][2] = {
    {0, 1}, {2, 3}, {0, 2}, {1, 3}, {1, 2}, {4, 5}, {6, 7}, {4, 6}, {5, 7},
    {5, 6}, {0, 4}, {2, 6}, {2, 4}, {1, 5}, {3, 7}, {3, 5}, {1, 2}, {3, 4},
    {5, 6}, {8, 9}, {10, 11}, {8, 10}, {9, 11}, {9, 10}, {12, 13}, {14, 15}, {12, 14},
    {13, 15}, {13, 14}, {8, 12}, {10, 14}, {10, 12}, {9, 13}, {11, 15}, {11, 13}, {9, 10},
    {11, 12}, {13, 14}, {0, 8}, {4, 12}, {4, 8}, {2, 10}, {6, 14}, {6, 10}, {2, 4},
    {6, 8}, {10, 12}, {1, 9}, {5, 13}, {5, 9}, {3, 11}, {7, 15}, {7, 11}, {3, 5},
    {7, 9}, {11, 13}, {1, 2}, {3, 4}, {5, 6}, {7, 8}, {9, 10}, {11, 12}, {13, 14},
};

/* The rules that look at one column after another. */
enum { MEDIAN, TRIMMED_MEAN, MEAN_AROUND_MEDIAN, DEVIATION };

/* Puts the smaller of two rows into the first and the larger into the second. */
typedef struct {
    uint16_t low, high;
} comparator;

/* What a rule does to the rows of a tile. First the leaves are sorted, rows leaf[i] … leaf[i + 1] − 1; then come the
   comparators. MEDIAN: of the smaller numbers of the pairs the largest is looked for, of the larger ones, and the middle
   row if k is odd, the smallest. TRIMMED_MEAN: the chosen rows are added. MEAN_AROUND_MEDIAN: the i-th smallest and the
   (k − f + i)-th are the pair i, the chosen rows lie between them, the median is in the middle one or two rows. */
typedef struct {
    comparator *compare, *pair;
    uint16_t *chosen, middle[2], *leaf;
    size compares, pairs, n_chosen, leaves;
} program;

/* The rows [X; E] and how they are mixed. */
typedef struct {
    sources from;
    size k;                         /* rows that come out */
    const double *w;                /* (k, b) or NULL */
    const double *common;           /* (b,), to be added to all rows of w, or NULL */
    size n_used, *used;             /* the rows of [X; E] that are read */
    size *first, *place;            /* SIDE rows are mixed of those loaded rows that lie at place[first] … */
    void *factor;                   /* … with SIDE factors for each */
} mixture;

/* Merge two sorted lists of rows by Batcher's odd-even merge: the merged list goes to `out`. Returns the comparators'
   new number. `spare` has room for 2 (n_x + n_y) rows. */
static size merge(const uint16_t *x, size n_x, const uint16_t *y, size n_y, size step, uint16_t *out, uint16_t *spare,
                  comparator *list, size n)
{
    size total = n_x + n_y;
    if (n_x == 0 || n_y == 0) {
        for (size i = 0; i < total; i++)
            out[i] = n_x ? x[i * step] : y[i * step];
        return n;
    }
    if (total == 2) {
        out[0] = x[0], out[1] = y[0];
        list[n++] = (comparator){x[0], y[0]};
        return n;
    }
    size odd_x = (n_x + 1) / 2, odd_y = (n_y + 1) / 2, odd = odd_x + odd_y, even = total - odd;
    uint16_t *v = spare, *w = spare + odd;
    n = merge(x, odd_x, y, odd_y, 2 * step, v, spare + total, list, n);
    n = merge(x + step, n_x - odd_x, y + step, n_y - odd_y, 2 * step, w, spare + total, list, n);
    size place = 0;
    out[place++] = v[0];
    for (size i = 0; i < even || i + 1 < odd; i++) {
        if (i < even && i + 1 < odd)
            list[n++] = (comparator){w[i], v[i + 1]};
        if (i < even)
            out[place++] = w[i];
        if (i + 1 < odd)
            out[place++] = v[i + 1];
    }
    return n;
}

/* Sort `k` rows from `first` on: the sorted list goes to `out`. `spare` has room for 5 k rows. */
static void sort(program *p, size first, size k, uint16_t *out, uint16_t *spare)
{
    if (k <= LEAF) {
        for (size i = 0; i < k; i++)
            out[i] = first + i;
        p->leaf[p->leaves += k > 0] = first + k;
        return;
    }
    size half = k / 2;
    sort(p, first, half, spare, spare + k);
    sort(p, first + half, k - half, spare + half, spare + k);
    p->compares = merge(spare, half, spare + half, k - half, 1, out, spare + k, p->compare, p->compares);
}

/* Leave out, from the end, every comparator whose two rows no later one looks at and whose order does not matter:
   group[row] is the same for both, and not 0. Returns how many stay. */
static size prune(comparator *list, size n, uint16_t *group)
{
    size kept = n;
    for (size i = n - 1; i >= 0; i--) {
        uint16_t *low = group + list[i].low, *high = group + list[i].high;
        if (*low == *high && *low)
            continue;
        *low = *high = 0;
        list[--kept] = list[i];
    }
    memmove(list, list + kept, (n - kept) * sizeof *list);
    return n - kept;
}

/* The program of a rule for k rows, in one piece of memory (*memory, for free). Returns whether there was memory. */
static int make_program(int rule, size k, size f, program *p, void **memory)
{
    size levels = 1, h = k / 2;
    while ((size)1 << levels < k)
        levels++;
    size most = k * levels * (levels + 1) / 4 + 2 * k;              /* comparators */
    *p = (program){.compare = *memory = malloc((most + k) * sizeof(comparator) + (10 * k + 1) * sizeof(uint16_t))};
    if (!*memory)
        return 0;
    p->pair = p->compare + most;
    p->chosen = (uint16_t *)(p->pair + k);
    p->leaf = p->chosen + k;
    uint16_t *a = p->leaf + k + 1, *b = a + h, *group = a + k, *spare = group + k;
    memset(group, 0, k * sizeof *group);
    p->leaf[0] = 0;
    if (rule == MEDIAN || (rule == TRIMMED_MEAN && 2 * f <= h)) {   /* two sorted halves, a and b, will do */
        sort(p, 0, h, a, spare);
        sort(p, h, k - h, b, spare);
    } else {
        sort(p, 0, k, a, spare);
    }
    if (rule == MEDIAN) {
        /* Of the pairs (a_i, b_{h−1−i}) the smaller ones are the h smallest of all. */
        for (size i = 0; i < h; i++)
            p->pair[p->pairs++] = (comparator){a[i], b[h - 1 - i]};
        p->middle[0] = b[k - h - 1];
    } else if (rule == TRIMMED_MEAN && 2 * f <= h) {
        /* Of the pairs (a_i, b_{f−1−i}) the smaller ones are the f smallest of all; from above the same. */
        for (size i = 0; i < f; i++) {
            comparator low = {a[i], b[f - 1 - i]}, high = {a[h - 1 - i], b[k - h - f + i]};
            p->compare[p->compares++] = low;
            p->compare[p->compares++] = high;
            group[low.low] = group[high.high] = 1;
            group[p->chosen[p->n_chosen++] = low.high] = 2;
            group[p->chosen[p->n_chosen++] = high.low] = 2;
        }
        for (size i = f; i < h - f; i++)
            group[p->chosen[p->n_chosen++] = a[i]] = 2;
        for (size i = f; i < k - h - f; i++)
            group[p->chosen[p->n_chosen++] = b[i]] = 2;
    } else {
        p->middle[0] = a[(k - 1) / 2];
        p->middle[1] = a[h];
        for (size i = 0; i < f; i++)
            p->pair[p->pairs++] = (comparator){a[i], a[k - f + i]};
        for (size i = f; i < k - f; i++)
            p->chosen[p->n_chosen++] = a[i];
        for (size i = 0; rule == TRIMMED_MEAN && i < k; i++)        /* only which rows are chosen must be known, … */
            group[a[i]] = i < f ? 1 : i < k - f ? 2 : 3;
        for (size i = f; rule == MEAN_AROUND_MEDIAN && i < k - f; i++)      /* … or which are the middle ones, too */
            group[a[i]] = i < (k - 1) / 2 ? 1 : i > h ? 2 : 0;
    }
    p->compares = prune(p->compare, p->compares, group);
    return 1;
}

/* Copy bytes, past the caches where the destination is the beginning of a LINE: nobody reads it soon. */
static void put(void *to, const void *from, size bytes)
{
#ifdef __SSE2__
    if ((uintptr_t)to % LINE == 0 && bytes % LINE == 0) {
        for (size k = 0; k < bytes; k += 16)
            _mm_stream_si128((__m128i *)((char *)to + k), _mm_loadu_si128((const __m128i *)((const char *)from + k)));
        _mm_sfence();
        return;
    }
#endif
    memcpy(to, from, bytes);
}

#define REAL float
#define SUFFIX f32
#include "columns.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "columns.c"

/* Whether E and W fit to X; then m says what the rows are, and m->used is to be freed. common: (b,) or NULL. */
static int mixture_of(const array *X, const array *E, const array *W, const double *common, mixture *m)
{
    *m = (mixture){.common = common};
    if (!sources_of(X, E, &m->from))
        return 0;
    size b = m->from.b;
    if (W != none && (!is_dense(W, READABLE) || W->dtype->number != FLOAT64 || W->ndim != 2 || W->shape[1] != b
                      || W->shape[0] < 1 || W->shape[0] > MOST_ROWS))
        return 0;
    m->k = W == none ? b : W->shape[0];
    m->w = W == none ? NULL : W->data;
    size groups = (m->k + SIDE - 1) / SIDE, entries = m->w ? groups * b : 0;
    m->used = malloc((b + groups + 1 + entries) * sizeof(size) + entries * SIDE * sizeof(double));
    if (!m->used)
        return 0;
    m->first = m->used + b;
    m->place = m->first + groups + 1;
    m->factor = m->place + entries;
    BY_DTYPE(X, recipe, m);
    return 1;
}

/* columns.median, trimmed_mean, mean_around_median, deviation; out (d,) is the launcher's. */
int column_rule(int rule, const array *X, size f, const array *E, const array *W, const array *out)
{
    mixture m;
    if (!mixture_of(X, E, W, NULL, &m))
        return DECLINED;
    program p = {0};
    void *memory = NULL;
    int failed = f < 0 || 2 * f >= m.k || (rule == DEVIATION && m.k < 2)
        || (rule != DEVIATION && !make_program(rule, m.k, f, &p, &memory))
        || BY_DTYPE(X, each_tile, rule, &m, &p, f, out->data);
    free(memory);
    free(m.used);
    return failed ? DECLINED : 0;
}

/* columns.distances; out (k,) float64 is the launcher's. */
int column_distances(const array *X, const array *v, const array *E, const array *W, const array *out)
{
    mixture m;
    if (!is_rows(X) || !is_float(v, READABLE) || v->dtype->number != X->dtype->number || v->ndim != 1
        || v->shape[0] != X->shape[1] || !mixture_of(X, E, W, NULL, &m))
        return DECLINED;
    int failed = out->shape[0] != m.k || BY_DTYPE(X, distances, &m, v->data, out->data);
    free(m.used);
    return failed ? DECLINED : 0;
}

/* columns.combine; w (rows of [X; E],) is float64, out (d,) is the launcher's. */
int column_combine(const array *X, const array *w, const array *E, const array *out)
{
    mixture m;
    if (!mixture_of(X, E, none, NULL, &m))
        return DECLINED;
    int failed = w->ndim != 1 || w->shape[0] != m.k;
    if (!failed)
        BY_DTYPE(X, combine, &m, w->data, out->data);
    free(m.used);
    return failed ? DECLINED : 0;
}

/* columns.mixed; common (rows of [X; E],) is float64, out (k, d) is the launcher's. */
int column_mixed(const array *X, const array *W, const array *E, const array *common, const array *out)
{
    mixture m;
    if (W == none || !mixture_of(X, E, W, common->data, &m))
        return DECLINED;
    int failed = common->ndim != 1 || common->shape[0] != m.from.b || BY_DTYPE(X, mixed, &m, out->data);
    free(m.used);
    return failed ? DECLINED : 0;
}

#else                               /* once for each REAL */

#define TILE ((size)(ROW / sizeof(REAL)))           /* columns */
#define VECTOR ((size)(LINE / sizeof(REAL)))
#define QUARTER ((REAL)0.25)

/* Which rows of [X; E] are read, and the factors of each SIDE rows, rounded to REAL: those that are not all 0. */
static void NAME(recipe)(mixture *m)
{
    size b = m->from.b;
    for (size j = 0; j < b; j++) {
        int any = !m->w || (m->common && m->common[j] != 0);
        for (size i = 0; m->w && i < m->k && !any; i++)
            any = m->w[i * b + j] != 0;
        if (any)
            m->used[m->n_used++] = j;
    }
    REAL *factor = m->factor;
    size entries = 0, groups = m->w ? (m->k + SIDE - 1) / SIDE : 0;
    for (size g = 0; g < groups; g++) {
        m->first[g] = entries;
        for (size place = 0; place < m->n_used; place++) {
            int any = 0;
            for (size i = 0; i < SIDE; i++) {
                double w = g * SIDE + i < m->k ? m->w[(g * SIDE + i) * b + m->used[place]] : 0;
                factor[entries * SIDE + i] = w;
                any |= w != 0;
            }
            if (any)
                m->place[entries++] = place;
        }
    }
    m->first[groups] = entries;
}

/* Copy the n columns from c on, tile after tile (tiles, used rows, TILE), with zeros up to the end of the last tile. */
CPU_GENERATIONS static void NAME(load)(const mixture *m, size c, size n, REAL *restrict panel)
{
    for (size i = 0; i < m->n_used; i++, panel += TILE) {
        const REAL *row = (const REAL *)source(&m->from, m->used[i]) + c;
        REAL *to = panel;
        size l = 0;
        for (; l + TILE <= n; l += TILE, to += m->n_used * TILE)
            memcpy(to, row + l, ROW);
        for (size end = l + TILE; l < n || (l % TILE && l < end); l++)
            *to++ = l < n ? row[l] : 0;
    }
}

/* SIDE rows of W y, those from g · SIDE on, on top of `start`, a row: rows (SIDE, TILE), `stride` apart */
CPU_GENERATIONS static void NAME(mix)(const mixture *m, size g, const REAL *restrict y, const REAL *restrict start,
                                      REAL *restrict rows, size stride)
{
    REAL sum[SIDE][ROW / sizeof(REAL)];
    for (int i = 0; i < SIDE; i++)
        memcpy(sum[i], start, ROW);
    const REAL *restrict factor = (const REAL *)m->factor + m->first[g] * SIDE;
    for (size j = m->first[g]; j < m->first[g + 1]; j++, factor += SIDE) {
        const REAL *restrict row = y + m->place[j] * TILE;
        for (int i = 0; i < SIDE; i++)
#pragma omp simd
            for (size l = 0; l < TILE; l++)
                sum[i][l] = fma(factor[i], row[l], sum[i][l]);
    }
    for (int i = 0; i < SIDE; i++)
        memcpy(rows + i * stride, sum[i], ROW);
}

/* Σ_j factor_j y_j; a row with the factor 0 may be no number */
CPU_GENERATIONS static void NAME(sum_rows)(const REAL *restrict factor, size n, const REAL *restrict y,
                                           REAL *restrict out)
{
    REAL sum[ROW / sizeof(REAL)] = {0};
    for (size j = 0; j < n; j++, y += TILE) {
        if (factor[j] == 0)
            continue;
#pragma omp simd
        for (size l = 0; l < TILE; l++)
            sum[l] = fma(factor[j], y[l], sum[l]);
    }
    memcpy(out, sum, ROW);
}

/* The smaller of two rows of `n` numbers goes to the first and the larger to the second; even of NaN, none is lost. */
static inline __attribute__((always_inline)) void NAME(order)(REAL *restrict a, REAL *restrict b, size n)
{
#pragma omp simd
    for (size l = 0; l < n; l++) {
        REAL x = a[l], y = b[l], low = x < y ? x : y, high = x < y ? y : x;
        a[l] = low;
        b[l] = high;
    }
}

/* Sort n rows in registers, as if more came behind them up to `room`, a constant. */
static inline __attribute__((always_inline)) void NAME(sort_n)(REAL *restrict rows, size n, int room)
{
    for (size part = 0; part < TILE; part += VECTOR) {
        REAL at[LEAF][LINE / sizeof(REAL)];
#pragma GCC unroll 16
        for (int i = 0; i < room; i++)
            for (size l = 0; l < VECTOR; l++)
                at[i][l] = i < n ? rows[i * TILE + part + l] : INFINITY;
#pragma GCC unroll 63
        for (int c = 0; c < LEAF_COMPARES; c++)
            if (leaf_compare[c][1] < room)
                NAME(order)(at[leaf_compare[c][0]], at[leaf_compare[c][1]], VECTOR);
#pragma GCC unroll 16
        for (int i = 0; i < room; i++)
            if (i < n)
                memcpy(rows + i * TILE + part, at[i], LINE);
    }
}

CPU_GENERATIONS static void NAME(sort_leaf)(REAL *rows, size n)
{
    if (n > LEAF / 2)
        NAME(sort_n)(rows, n, LEAF);
    else if (n > 1)
        NAME(sort_n)(rows, n, LEAF / 2);
}

CPU_GENERATIONS static void NAME(compare)(REAL *rows, const comparator *list, size n)
{
    for (size i = 0; i < n; i++)
        NAME(order)(rows + list[i].low * TILE, rows + list[i].high * TILE, TILE);
}

CPU_GENERATIONS static void NAME(median)(const REAL *rows, const program *p, size k, REAL *restrict out)
{
    for (size part = 0; part < TILE; part += VECTOR) {
        const REAL *at = rows + part, *last = at + p->middle[0] * TILE;
        REAL low[LINE / sizeof(REAL)], high[LINE / sizeof(REAL)];
        for (size l = 0; l < VECTOR; l++)
            low[l] = -INFINITY, high[l] = k % 2 ? last[l] : INFINITY;
        for (size i = 0; i < p->pairs; i++) {
            const REAL *restrict a = at + p->pair[i].low * TILE, *restrict b = at + p->pair[i].high * TILE;
#pragma omp simd
            for (size l = 0; l < VECTOR; l++) {
                REAL x = a[l], y = b[l], lower = x < y ? x : y, upper = x < y ? y : x;
                low[l] = lower > low[l] ? lower : low[l];
                high[l] = upper < high[l] ? upper : high[l];
            }
        }
        for (size l = 0; l < VECTOR; l++)
            out[part + l] = k % 2 ? high[l] : low[l] / 2 + high[l] / 2;
    }
}

/* sum += a quarter of the `n` chosen rows; four quarters are added in REAL, where they cannot overflow. */
CPU_GENERATIONS static void NAME(add_chosen)(const REAL *rows, const uint16_t *chosen, size n, double *restrict sum)
{
    for (size i = 0; i < n; i += SIDE) {
        const REAL *restrict a = rows + chosen[i] * TILE, *restrict b = rows + chosen[i + 1] * TILE;
        const REAL *restrict c = rows + chosen[i + 2] * TILE, *restrict d = rows + chosen[i + 3] * TILE;
        REAL four[ROW / sizeof(REAL)];
        if (i + SIDE <= n)
#pragma omp simd
            for (size l = 0; l < TILE; l++)
                four[l] = fma(d[l], QUARTER, fma(c[l], QUARTER, fma(b[l], QUARTER, a[l] * QUARTER)));
        else
#pragma omp simd
            for (size l = 0; l < TILE; l++)
                four[l] = fma(i + 2 < n ? c[l] : 0, QUARTER, fma(i + 1 < n ? b[l] : 0, QUARTER, a[l] * QUARTER));
#pragma omp simd
        for (size l = 0; l < TILE; l++)
            sum[l] += four[l];
    }
}

/* sum += a quarter of what is nearest to the median, as far as it is not among the chosen rows: of each pair the lower
   number, unless the upper is nearer. For the nearest are neighbours in the sorted column: those from the lowest on,
   but each of the f lowest gives way to the one k − f above it where that is nearer. */
CPU_GENERATIONS static void NAME(add_nearer)(const REAL *rows, const program *p, double *restrict sum)
{
    const REAL *restrict below = rows + p->middle[0] * TILE, *restrict above = rows + p->middle[1] * TILE;
    REAL m[ROW / sizeof(REAL)], nearer[ROW / sizeof(REAL)];
    for (size l = 0; l < TILE; l++)
        m[l] = p->middle[0] == p->middle[1] ? below[l] : below[l] / 2 + above[l] / 2;
    for (size i = 0; i < p->pairs; i++) {
        const REAL *restrict a = rows + p->pair[i].low * TILE, *restrict b = rows + p->pair[i].high * TILE;
#pragma omp simd
        for (size l = 0; l < TILE; l++)
            nearer[l] = b[l] - m[l] < m[l] - a[l] ? b[l] : a[l];
#pragma omp simd
        for (size l = 0; l < TILE; l++)
            sum[l] += 0.25 * nearer[l];
    }
}

CPU_GENERATIONS static void NAME(deviation)(const REAL *rows, size k, REAL *restrict out)
{
    double mean[ROW / sizeof(REAL)] = {0}, square[ROW / sizeof(REAL)] = {0};
    for (size i = 0; i < k; i++)
#pragma omp simd
        for (size l = 0; l < TILE; l++)
            mean[l] += rows[i * TILE + l];
    for (size l = 0; l < TILE; l++)
        mean[l] /= k;
    for (size i = 0; i < k; i++)
#pragma omp simd
        for (size l = 0; l < TILE; l++) {
            double difference = rows[i * TILE + l] - mean[l];
            square[l] += difference * difference;
        }
    for (size l = 0; l < TILE; l++)
        out[l] = sqrt(square[l] / (k - 1));
}

/* Room for a panel, and for the rows of one tile after they are mixed. */
static size NAME(room)(const mixture *m)
{
    return (PANEL * m->n_used + (m->w ? m->k + SIDE : 0)) * TILE;
}

/* The rows of the tile t of a panel, mixed. */
static REAL *NAME(tile)(const mixture *m, size t, REAL *room)
{
    REAL *rows = room + t * m->n_used * TILE, *mixed = room + PANEL * m->n_used * TILE, zero[ROW / sizeof(REAL)] = {0};
    for (size i = 0; m->w && i < m->k; i += SIDE)
        NAME(mix)(m, i / SIDE, rows, zero, mixed + i * TILE, TILE);
    return m->w ? mixed : rows;
}

/* What a rule makes of the k rows of a tile, whose order it changes. */
static void NAME(apply)(int rule, const program *p, size k, size f, REAL *rows, REAL *result)
{
    for (size i = 0; i < p->leaves; i++)
        NAME(sort_leaf)(rows + p->leaf[i] * TILE, p->leaf[i + 1] - p->leaf[i]);
    NAME(compare)(rows, p->compare, p->compares);
    double sum[ROW / sizeof(REAL)] = {0}, kept = rule == MEAN_AROUND_MEDIAN ? k - f : k - 2 * f;
    switch (rule) {
    case MEDIAN:
        NAME(median)(rows, p, k, result);
        break;
    case DEVIATION:
        NAME(deviation)(rows, k, result);
        break;
    case MEAN_AROUND_MEDIAN:
        NAME(add_nearer)(rows, p, sum);                                                         /* fall through */
    default:
        NAME(add_chosen)(rows, p->chosen, p->n_chosen, sum);
        for (size l = 0; l < TILE; l++)
            result[l] = 4 * sum[l] / kept;
    }
}

static int NAME(each_tile)(int rule, const mixture *m, const program *p, size f, REAL *out)
{
    size d = m->from.d, each = NAME(room)(m), panels = (d + PANEL * TILE - 1) / (PANEL * TILE);
    size threads = m->from.b * d > SMALL ? smaller(most_threads(), panels) : 1;
    REAL *room = lines(threads * each * sizeof(REAL));
    if (!room)
        return DECLINED;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (size panel = 0; panel < panels; panel++) {
        size c = panel * PANEL * TILE, n = smaller(PANEL * TILE, d - c);
        REAL *own = room + thread_number() * each, result[ROW / sizeof(REAL)];
        NAME(load)(m, c, n, own);
        for (size t = 0; t * TILE < n; t++) {
            NAME(apply)(rule, p, m->k, f, NAME(tile)(m, t, own), result);
            memcpy(out + c + t * TILE, result, smaller(TILE, n - t * TILE) * sizeof(REAL));
        }
    }
    free(room);
    return 0;
}

static int NAME(mixed)(const mixture *m, REAL *out)
{
    enum { WIDTH = PANEL * (ROW / sizeof(REAL)) };
    size d = m->from.d, each = (PANEL * (m->n_used + 1) + PANEL * SIDE) * TILE;
    size head = d * sizeof(REAL) % LINE ? 0 : (LINE - (uintptr_t)out % LINE) % LINE / sizeof(REAL);
    size panels = 1 + (d - smaller(head, d) + WIDTH - 1) / WIDTH;       /* the first ends where all rows begin a LINE */
    size threads = m->from.b * d > SMALL ? smaller(most_threads(), panels) : 1;
    REAL *room = lines((m->n_used + threads * each) * sizeof(REAL));
    if (!room)
        return DECLINED;
    REAL *factor = room + threads * each;
    for (size j = 0; j < m->n_used; j++)
        factor[j] = m->common[m->used[j]];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (size panel = 0; panel < panels; panel++) {
        size c = panel ? head + (panel - 1) * WIDTH : 0, n = smaller(panel ? WIDTH : head, d - c);
        REAL *own = room + thread_number() * each, *start = own + PANEL * m->n_used * TILE, *rows = start + WIDTH;
        NAME(load)(m, c, n, own);
        for (size t = 0; t * TILE < n; t++)
            NAME(sum_rows)(factor, m->n_used, own + t * m->n_used * TILE, start + t * TILE);
        for (size i = 0; i < m->k && n > 0; i += SIDE) {
            for (size t = 0; t * TILE < n; t++)
                NAME(mix)(m, i / SIDE, own + t * m->n_used * TILE, start + t * TILE, rows + t * TILE, WIDTH);
            for (size j = 0; j < smaller(SIDE, m->k - i); j++)
                put(out + (i + j) * d + c, rows + j * WIDTH, n * sizeof(REAL));
        }
    }
    free(room);
    return 0;
}

/* lanes (LANE,) += Σ_l (row_l − v_l)² of n columns */
CPU_GENERATIONS static void NAME(add_squares)(const REAL *restrict row, const double *restrict v, size n,
                                              double *restrict lanes)
{
    double sum[AT_ONCE] = {0};
    size c = 0;
    for (; c + AT_ONCE <= n; c += AT_ONCE) {
        fetch_ahead(row + c, AT_ONCE * sizeof(REAL));
#pragma omp simd
        for (size l = 0; l < AT_ONCE; l++) {
            double difference = row[c + l] - v[c + l];
            sum[l] = fma(difference, difference, sum[l]);
        }
    }
    for (size l = 0; c + l < n; l++) {
        double difference = row[c + l] - v[c + l];
        sum[l] = fma(difference, difference, sum[l]);
    }
    for (size l = 0; l < LANE; l++)
        lanes[l] += (sum[l] + sum[l + LANE]) + (sum[l + 2 * LANE] + sum[l + 3 * LANE]);
}

static int NAME(distances)(const mixture *m, const REAL *v, double *out)
{
    enum { WIDTH = PANEL * (ROW / sizeof(REAL)) };
    size d = m->from.d, length = part_length(d, WIDTH), parts = (d + length - 1) / length, each = NAME(room)(m);
    size threads = m->from.b * d > SMALL ? smaller(most_threads(), parts) : 1, width = m->k * LANE;
    REAL *room = lines(threads * each * sizeof(REAL));
    double *lanes = calloc(parts * width + 1, sizeof *lanes);
    int failed = !room || !lanes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && !failed)
    for (size part = 0; part < (failed ? 0 : parts); part++)
        for (size c = part * length; c < smaller((part + 1) * length, d); c += WIDTH) {
            size n = smaller(WIDTH, d - c);
            double to[WIDTH], *sums = lanes + part * width;
            REAL *own = room + thread_number() * each;
            for (size l = 0; l < n; l++)
                to[l] = v[c + l];
            for (size i = 0; !m->w && i < m->k; i++)                    /* no need to copy the rows */
                NAME(add_squares)((const REAL *)source(&m->from, i) + c, to, n, sums + i * LANE);
            if (m->w)
                NAME(load)(m, c, n, own);
            for (size t = 0; m->w && t * TILE < n; t++) {
                const REAL *rows = NAME(tile)(m, t, own);
                for (size i = 0; i < m->k; i++)
                    NAME(add_squares)(rows + i * TILE, to + t * TILE, smaller(TILE, n - t * TILE), sums + i * LANE);
            }
        }
    for (size i = 0; i < (failed ? 0 : m->k); i++) {
        double sum = 0;
        for (size part = 0; part < parts; part++)
            for (size l = 0; l < LANE; l++)
                sum += lanes[part * width + i * LANE + l];
        out[i] = sum;
    }
    free(room);
    free(lanes);
    return failed ? DECLINED : 0;
}

CPU_GENERATIONS static void NAME(add_row)(double *restrict sum, double w, const REAL *restrict row, size n)
{
#pragma omp simd
    for (size l = 0; l < n; l++)
        sum[l] += w * row[l];
}

CPU_GENERATIONS static void NAME(add_rows)(double *restrict sum, const double *w, const REAL *const *row, size n)
{
    double w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    const REAL *a = row[0], *b = row[1], *c = row[2], *d = row[3];
    size part = LINE / sizeof(REAL), k = 0;
    for (; k + part <= n; k += part) {
        fetch_ahead(a + k, LINE), fetch_ahead(b + k, LINE), fetch_ahead(c + k, LINE), fetch_ahead(d + k, LINE);
#pragma omp simd
        for (size l = k; l < k + part; l++)
            sum[l] = (((sum[l] + w0 * a[l]) + w1 * b[l]) + w2 * c[l]) + w3 * d[l];
    }
    for (; k < n; k++)
        sum[k] = (((sum[k] + w0 * a[k]) + w1 * b[k]) + w2 * c[k]) + w3 * d[k];
}

static void NAME(combine)(const mixture *m, const double *w, REAL *out)
{
    enum { BLOCK = 1024 };
    size d = m->from.d, blocks = (d + BLOCK - 1) / BLOCK;
    size threads = m->from.b * d > SMALL ? smaller(most_threads(), blocks) : 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (size block = 0; block < blocks; block++) {
        size c = block * BLOCK, n = smaller(BLOCK, d - c), waiting = 0;
        double sum[BLOCK] = {0}, factor[4];
        const REAL *row[4];
        for (size j = 0; j < m->k; j++) {
            if (w[j] == 0)
                continue;
            factor[waiting] = w[j];
            row[waiting++] = (const REAL *)source(&m->from, j) + c;
            if (waiting == 4) {
                NAME(add_rows)(sum, factor, row, n);
                waiting = 0;
            }
        }
        for (size i = 0; i < waiting; i++)
            NAME(add_row)(sum, factor[i], row[i], n);
        for (size l = 0; l < n; l++)
            out[c + l] = sum[l];
    }
}

#undef TILE
#undef VECTOR
#undef QUARTER
#endif
