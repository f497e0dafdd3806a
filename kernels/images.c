/* A convolution, of which each pool × pool window keeps its largest number: forward, and its two transposes.

       z_{pkr} = Σ_{a,b,c} W_{k,a,b,c} h_{r, p + (a, b), c}          at the places p of image r, for the channels k
       out_{qkr} = max_{p in window q} z_{pkr}                       and which p it is
       slopes in h:  Σ_{q,k} δ_{qkr} W_k    at the patch of the largest z
       sums:         Σ_{q,r} δ_{qkr} times the patch of the largest z, for the rows r of each worker

   Images are (height, width, channels): the parts of a patch that lie in one line of the image are one piece of memory.
   Forward, a vector holds channels k, a few of them and a few places stay in registers for the whole patch, and no
   patch is ever copied. Backward goes by the numbers that were kept: one of pool² places, and none whose slope is 0.

   NumPy definitions: convolve, slopes_of_images and sums_of_patches in mpiclip/problems/cnn.py.

   Threads share out the images, or the workers and channels; each result is computed by one of them, in one order: the
   bytes do not depend on the threads. */

#ifndef REAL
/* Fused multiply-add where the CPU has it. */
#pragma GCC optimize("fp-contract=fast")

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#undef CPU_GENERATIONS
#define CPU_GENERATIONS __attribute__((noinline, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif

#define INLINE static inline __attribute__((always_inline))     /* into its caller's CPU_GENERATIONS */

enum { UINT8 = 2, INT64 = sizeof(long) == 8 ? 7 : 9 };          /* NPY_UBYTE; NPY_LONG or NPY_LONGLONG */
enum { WRITTEN = WRITABLE & ~READABLE };                         /* an array that may be written to */
enum {
    VECTOR = 64,                    /* bytes */
    MOST = 8,                       /* vectors that stay in registers */
    DECLINED = 1,
};

typedef struct {
    size m, height, width, channels;            /* images */
    size kernel, pool, outputs;
    size down, across;                          /* windows in an image */
    size w;                                     /* workers, or 1 */
    const int64_t *starts;                      /* worker i's rows are starts[i]:starts[i+1] */
    const uint8_t *which;                       /* (m, down, across, outputs) */
    ptrdiff_t step[4];                          /* bytes from one row, line, column, channel of `maps` to the next */
} sizes;

/* The numbers of a map whose slope is not 0: the slopes, and the patches that they come from or go to. */
typedef struct {
    void *slope;
    ptrdiff_t *from;                /* counted from the image's first number */
    ptrdiff_t place[16 * 16];       /* the same, of each number of a window from its first */
    size line, step;                /* from a place to the one below, and to the next */
} kept;

static int kept_new(kept *list, const sizes *s, size bytes, size line, size step)
{
    size windows = s->down * s->across + 1;
    *list = (kept){.slope = malloc(windows * bytes), .from = malloc(windows * sizeof(ptrdiff_t)), .line = line,
                   .step = step};
    for (size t = 0; t < s->pool * s->pool; t++)
        list->place[t] = t / s->pool * line + t % s->pool * step;
    return list->slope && list->from;
}

static void kept_free(kept *list)
{
    free(list->slope), free(list->from);
}

static inline size round_up(size n, size to) { return (n + to - 1) / to * to; }

#define REAL float
#define INT int32_t
#define SUFFIX f32
#include "images.c"
#undef REAL
#undef INT
#undef SUFFIX
#define REAL double
#define INT int64_t
#define SUFFIX f64
#include "images.c"

static int fits_4(const array *a, int number)
{
    return a->type == ndarray && a->dtype->byteorder == '=' && a->ndim == 4 && (a->flags & ALIGNED)
        && a->dtype->number == number;
}

static int is_bytes(const array *a, int flags)
{
    return a->type == ndarray && (a->flags & flags) == flags && a->dtype->number == UINT8;
}

/* What the three kernels have in common: images (m, height, width, channels), maps and which (m, down, across,
   outputs), starts (w + 1,). 0 if something does not fit. */
static int sizes_of(sizes *s, const array *images, const array *maps, const array *which, const array *starts,
                    size kernel, size pool)
{
    if (!is_float(images, READABLE) || images->ndim != 4 || !fits_4(maps, images->dtype->number)
        || !is_bytes(which, READABLE) || which->ndim != 4
        || !is_dense(starts, READABLE) || starts->dtype->number != INT64 || starts->ndim != 1 || starts->shape[0] < 2
        || kernel < 1 || pool < 1 || pool > 16)
        return 0;
    for (int k = 0; k < 4; k++)
        if (maps->shape[k] != which->shape[k])
            return 0;
    *s = (sizes){.m = images->shape[0], .height = images->shape[1], .width = images->shape[2],
                 .channels = images->shape[3], .kernel = kernel, .pool = pool, .outputs = maps->shape[3],
                 .down = maps->shape[1], .across = maps->shape[2], .w = starts->shape[0] - 1, .starts = starts->data,
                 .which = which->data};
    for (int k = 0; k < 4; k++)
        s->step[k] = maps->strides[k];
    if (maps->shape[0] != s->m || s->starts[0] != 0 || s->starts[s->w] != s->m
        || s->down * pool > s->height - kernel + 1 || s->across * pool > s->width - kernel + 1)
        return 0;
    for (size i = 0; i < s->w; i++)
        if (s->starts[i] > s->starts[i + 1])
            return 0;
    return 1;
}

static int is_weights(const array *W, int flags, const sizes *s, int number)
{
    return is_dense(W, flags) && W->dtype->number == number && W->ndim == 3 && W->shape[0] == s->w
        && W->shape[1] == s->outputs && W->shape[2] == s->kernel * s->kernel * s->channels;
}

/* images (m, height, width, channels), W (w, outputs, kernel · kernel · channels) → out, which */
int convolve(const array *images, const array *W, const array *starts, size kernel, size pool, const array *out,
             const array *which)
{
    sizes s;
    if (!sizes_of(&s, images, out, which, starts, kernel, pool) || !(out->flags & WRITTEN)
        || !is_bytes(which, WRITABLE) || !is_weights(W, READABLE, &s, images->dtype->number))
        return DECLINED;
    return BY_DTYPE(images, convolve, &s, images->data, W->data, out->data, which->data);
}

/* out (m, height, width, channels): the slopes in the images, of slopes in what convolve made of them */
int slopes_of_images(const array *slopes, const array *which, const array *W, const array *starts, size kernel,
                     size pool, const array *out)
{
    sizes s;
    if (!is_float(out, WRITABLE) || !sizes_of(&s, out, slopes, which, starts, kernel, pool)
        || !is_weights(W, READABLE, &s, out->dtype->number))
        return DECLINED;
    return BY_DTYPE(out, slopes_of_images, &s, W->data, slopes->data, out->data);
}

/* out (w, outputs, kernel · kernel · channels): the slopes in W, of slopes in what convolve made with it */
int sums_of_patches(const array *images, const array *slopes, const array *which, const array *starts, size kernel,
                    size pool, const array *out)
{
    sizes s;
    if (!sizes_of(&s, images, slopes, which, starts, kernel, pool)
        || !is_weights(out, WRITABLE, &s, images->dtype->number))
        return DECLINED;
    return BY_DTYPE(images, sums_of_patches, &s, images->data, slopes->data, out->data);
}

#else

#define LANES_HERE ((size)(VECTOR / sizeof(REAL)))
#define VEC NAME(vec)

typedef REAL VEC __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)), may_alias));

/* The numbers of channel k of row r. Returns how many. */
INLINE size NAME(find)(const sizes *s, const kept *list, const void *slopes, size r, size k)
{
    const char *slope = (const char *)slopes + r * s->step[0] + k * s->step[3];
    const uint8_t *which = s->which + r * s->down * s->across * s->outputs + k;
    REAL *found = list->slope;
    size n = 0;
    for (size i = 0; i < s->down; i++)
        for (size j = 0; j < s->across; j++, which += s->outputs) {
            found[n] = *(const REAL *)(slope + i * s->step[1] + j * s->step[2]);
            list->from[n] = i * s->pool * list->line + j * s->pool * list->step + list->place[*which];
            n += found[n] != 0;
        }
    return n;
}

/* z (places, padded): the numbers of `places` neighbouring places, `vectors` of channels. W: (patch, padded). */
INLINE void NAME(dots)(const sizes *s, const REAL *image, const REAL *W, size padded, REAL *z, const int places,
                       const int vectors)
{
    VEC sum[places][vectors];
    for (int r = 0; r < places; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = (VEC){0};
    for (size a = 0; a < s->kernel; a++) {
        const REAL *h = image + a * s->width * s->channels;
        for (size b = 0; b < s->kernel * s->channels; b++, W += padded)
            for (int r = 0; r < places; r++) {
                REAL number = h[b + r * s->channels];
                for (int v = 0; v < vectors; v++)
                    sum[r][v] += number * *(const VEC *)(W + v * LANES_HERE);
            }
    }
    for (int r = 0; r < places; r++)
        for (int v = 0; v < vectors; v++)
            *(VEC *)(z + r * padded + v * LANES_HERE) = sum[r][v];
}

/* The numbers of n places of one line; the last few are computed twice rather than one by one. */
INLINE void NAME(line)(const sizes *s, const REAL *image, const REAL *W, size padded, REAL *z, size n, const int places,
                       const int vectors)
{
    if (n < places) {
        for (size j = 0; j < n; j++)
            NAME(dots)(s, image + j * s->channels, W, padded, z + j * padded, 1, vectors);
        return;
    }
    for (size j = 0; j < n; j += places) {
        size at = smaller(j, n - places);
        NAME(dots)(s, image + at * s->channels, W, padded, z + at * padded, places, vectors);
    }
}

INLINE void NAME(larger)(REAL *restrict best, INT *restrict place, const REAL *restrict other, INT t, size n)
{
    for (size k = 0; k < n; k++) {
        REAL here = other[k], before = best[k];
        INT was = place[k];
        int more = !(here <= before) & (before == before);
        best[k] = more ? here : before;
        place[k] = more ? t : was;
    }
}

/* One image. z: room for pool · pool · across · padded numbers; place: for one of each channel. */
CPU_GENERATIONS static void NAME(convolve_image)(const sizes *s, const REAL *image, const REAL *W, size padded, REAL *z,
                                                 INT *place, char *out, uint8_t *restrict which)
{
    size n = s->across * s->pool, vectors = padded / LANES_HERE;
    for (size i = 0; i < s->down; i++) {
        for (size a = 0; a < s->pool; a++) {
            const REAL *from = image + (i * s->pool + a) * s->width * s->channels;
            REAL *to = z + a * n * padded;
            size v = 0;
            for (; v + 4 <= vectors; v += 4)
                NAME(line)(s, from, W + v * LANES_HERE, padded, to + v * LANES_HERE, n, 4, 4);
            for (; v + 2 <= vectors; v += 2)
                NAME(line)(s, from, W + v * LANES_HERE, padded, to + v * LANES_HERE, n, 8, 2);
            if (v < vectors)
                NAME(line)(s, from, W + v * LANES_HERE, padded, to + v * LANES_HERE, n, 8, 1);
        }
        for (size j = 0; j < s->across; j++, which += s->outputs) {
            REAL *first = z + j * s->pool * padded;                 /* the largest so far; NaN counts as that */
            memset(place, 0, s->outputs * sizeof(INT));
            for (size a = 0; a < s->pool; a++)
                for (size b = !a; b < s->pool; b++)
                    NAME(larger)(first, place, first + (a * n + b) * padded, (INT)(a * s->pool + b), s->outputs);
            char *to = out + i * s->step[1] + j * s->step[2];
            for (size k = 0; k < s->outputs; k++)
                *(REAL *)(to + k * s->step[3]) = first[k];
            for (size k = 0; k < s->outputs; k++)
                which[k] = (uint8_t)place[k];
        }
    }
}

static int NAME(convolve)(const sizes *s, const REAL *images, const REAL *W, char *out, uint8_t *which)
{
    size patch = s->kernel * s->kernel * s->channels, padded = round_up(s->outputs, LANES_HERE);
    REAL *packed = calloc(s->w * patch * padded, sizeof(REAL));         /* (w, patch, padded) */
    if (!packed)
        return DECLINED;
    for (size i = 0; i < s->w; i++)
        for (size k = 0; k < s->outputs; k++)
            for (size b = 0; b < patch; b++)
                packed[(i * patch + b) * padded + k] = W[(i * s->outputs + k) * patch + b];
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (s->m > 1)
    {
        REAL *z = malloc((s->pool * s->pool * s->across + 1) * padded * sizeof(REAL));
        failed = !z;
#pragma omp for schedule(static)
        for (size r = 0; r < s->m; r++) {
            size i = 0;
            while (s->starts[i + 1] <= r)
                i++;
            if (z)
                NAME(convolve_image)(s, images + r * s->height * s->width * s->channels, packed + i * patch * padded,
                                     padded, z + padded, (INT *)z, out + r * s->step[0],
                                     which + r * s->down * s->across * s->outputs);
        }
        free(z);
    }
    free(packed);
    return failed ? DECLINED : 0;
}

/* to_e += slope_e W, of `vectors` vectors each */
INLINE void NAME(spread)(REAL *to, const REAL *slope, const ptrdiff_t *at, size n, const REAL *W, const int vectors)
{
    VEC weight[vectors];
    for (int v = 0; v < vectors; v++)
        weight[v] = *(const VEC *)(W + v * LANES_HERE);
    for (size e = 0; e < n; e++)
        for (int v = 0; v < vectors; v++)
            *(VEC *)(to + at[e] + v * LANES_HERE) += slope[e] * weight[v];
}

/* W (outputs, kernel, padded). out: an image, and a vector's room behind it. */
CPU_GENERATIONS static void NAME(slopes_of_image)(const sizes *s, const kept *list, const REAL *W, size padded,
                                                  const void *slopes, size r, REAL *out)
{
    for (size k = 0; k < s->outputs; k++, W += s->kernel * padded) {
        size n = NAME(find)(s, list, slopes, r, k);
        for (size a = 0; a < s->kernel; a++)
            for (size v = 0; v < padded; v += MOST * LANES_HERE) {
                REAL *to = out + a * list->line + v;
                const REAL *weights = W + a * padded + v;
                switch (smaller(MOST, (padded - v) / LANES_HERE)) {
                case 1: NAME(spread)(to, list->slope, list->from, n, weights, 1); break;
                case 2: NAME(spread)(to, list->slope, list->from, n, weights, 2); break;
                case 3: NAME(spread)(to, list->slope, list->from, n, weights, 3); break;
                case 4: NAME(spread)(to, list->slope, list->from, n, weights, 4); break;
                case 5: NAME(spread)(to, list->slope, list->from, n, weights, 5); break;
                case 6: NAME(spread)(to, list->slope, list->from, n, weights, 6); break;
                case 7: NAME(spread)(to, list->slope, list->from, n, weights, 7); break;
                default: NAME(spread)(to, list->slope, list->from, n, weights, 8);
                }
            }
    }
}

static int NAME(slopes_of_images)(const sizes *s, const REAL *W, const void *slopes, REAL *out)
{
    size line = s->width * s->channels, image = s->height * line, piece = s->kernel * s->channels;
    size padded = round_up(piece, LANES_HERE), lines = s->outputs * s->kernel;
    REAL *packed = calloc(s->w * lines * padded, sizeof(REAL));         /* (w, outputs, kernel, padded) */
    if (!packed)
        return DECLINED;
    for (size k = 0; k < s->w * lines; k++)
        memcpy(packed + k * padded, W + k * piece, piece * sizeof(REAL));
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (s->m > 1)
    {
        kept list;
        REAL *below = malloc((image + padded) * sizeof(REAL));
        failed = !kept_new(&list, s, sizeof(REAL), line, s->channels) || !below;
#pragma omp for schedule(static)
        for (size r = 0; r < s->m; r++) {
            size i = 0;
            while (s->starts[i + 1] <= r)
                i++;
            if (failed)
                continue;
            memset(below, 0, (image + padded) * sizeof(REAL));
            NAME(slopes_of_image)(s, &list, packed + i * lines * padded, padded, slopes, r, below);
            memcpy(out + r * image, below, image * sizeof(REAL));
        }
        kept_free(&list), free(below);
    }
    free(packed);
    return failed ? DECLINED : 0;
}

/* sum += Σ_e slope_e h_e, of `vectors` vectors each */
INLINE void NAME(add)(REAL *sum, const REAL *slope, const ptrdiff_t *from, size n, const REAL *h, const int vectors)
{
    const int together = vectors > 2 ? 1 : 4;       /* independent sums, to hide the latency of an addition */
    VEC part[together][vectors];
    for (int v = 0; v < vectors; v++)
        part[0][v] = *(VEC *)(sum + v * LANES_HERE);
    for (int u = 1; u < together; u++)
        for (int v = 0; v < vectors; v++)
            part[u][v] = (VEC){0};
    size e = 0;
    for (; e + together <= n; e += together)
        for (int u = 0; u < together; u++)
            for (int v = 0; v < vectors; v++)
                part[u][v] += slope[e + u] * *(const VEC *)(h + from[e + u] + v * LANES_HERE);
    for (; e < n; e++)
        for (int v = 0; v < vectors; v++)
            part[0][v] += slope[e] * *(const VEC *)(h + from[e] + v * LANES_HERE);
    for (int u = 1; u < together; u++)
        for (int v = 0; v < vectors; v++)
            part[0][v] += part[u][v];
    for (int v = 0; v < vectors; v++)
        *(VEC *)(sum + v * LANES_HERE) = part[0][v];
}

/* The sums of one image, added to those of the channels first … last − 1. h: the image, or where pieces are short its
   patches; what follows each piece may be read, up to a vector. sums: (channels, pieces, padded). */
CPU_GENERATIONS static void NAME(sums_of_image)(const sizes *s, const kept *list, const REAL *h, const void *slopes,
                                                size r, size first, size last, size pieces, size padded, REAL *sums)
{
    for (size k = first; k < last; k++, sums += pieces * padded) {
        size n = NAME(find)(s, list, slopes, r, k);
        for (size a = 0; a < pieces; a++)
            for (size v = 0; v < padded; v += MOST * LANES_HERE) {
                REAL *sum = sums + a * padded + v;
                const REAL *from = h + a * list->line + v;
                switch (smaller(MOST, (padded - v) / LANES_HERE)) {
                case 1: NAME(add)(sum, list->slope, list->from, n, from, 1); break;
                case 2: NAME(add)(sum, list->slope, list->from, n, from, 2); break;
                case 3: NAME(add)(sum, list->slope, list->from, n, from, 3); break;
                case 4: NAME(add)(sum, list->slope, list->from, n, from, 4); break;
                case 5: NAME(add)(sum, list->slope, list->from, n, from, 5); break;
                case 6: NAME(add)(sum, list->slope, list->from, n, from, 6); break;
                case 7: NAME(add)(sum, list->slope, list->from, n, from, 7); break;
                default: NAME(add)(sum, list->slope, list->from, n, from, 8);
                }
            }
    }
}

/* All patches of an image, each (kernel, piece) in `step` numbers, line after line. A whole vector is copied for each
   piece; what is too much of it, the next piece overwrites. */
CPU_GENERATIONS static void NAME(copy_patches)(const sizes *s, const REAL *image, size piece, size step, REAL *h)
{
    for (size i = 0; i < s->height - s->kernel + 1; i++)
        for (size j = 0; j < s->width - s->kernel + 1; j++, h += step)
            for (size a = 0; a < s->kernel; a++)
                *(VEC *)(h + a * piece) = *(const VEC *)(image + ((i + a) * s->width + j) * s->channels);
}

/* The sums of worker i's channels first … last − 1. */
static int NAME(sums_of_worker)(const sizes *s, const REAL *images, const void *slopes, size i, size first, size last,
                                REAL *out)
{
    size piece = s->kernel * s->channels, pieces = s->kernel, step = s->channels, line = s->width * s->channels;
    size image = s->height * line, copied = 0, short_piece = 0;
    if (piece < LANES_HERE) {           /* a piece is not worth a loop: patches are copied together */
        short_piece = piece, piece *= s->kernel, pieces = 1;
        step = round_up(piece, LANES_HERE), line = (s->width - s->kernel + 1) * step;
        copied = (s->height - s->kernel + 1) * line + LANES_HERE;
    }
    size padded = round_up(piece, LANES_HERE);
    kept list;
    REAL *h = calloc(image + padded + copied, sizeof(REAL)), *patches = h + image + padded;
    REAL *sums = calloc((last - first) * pieces * padded, sizeof(REAL));
    int failed = !kept_new(&list, s, sizeof(REAL), line, step) || !h || !sums;
    for (size r = s->starts[i]; r < s->starts[i + 1] && !failed; r++) {
        memcpy(h, images + r * image, image * sizeof(REAL));
        if (short_piece)
            NAME(copy_patches)(s, h, short_piece, step, patches);
        NAME(sums_of_image)(s, &list, short_piece ? patches : h, slopes, r, first, last, pieces, padded, sums);
    }
    for (size k = 0; k < last - first && !failed; k++)
        for (size a = 0; a < pieces; a++)
            memcpy(out + ((i * s->outputs + first + k) * pieces + a) * piece, sums + (k * pieces + a) * padded,
                   piece * sizeof(REAL));
    kept_free(&list), free(h), free(sums);
    return failed;
}

static int NAME(sums_of_patches)(const sizes *s, const REAL *images, const void *slopes, REAL *out)
{
    size shares = s->w < most_threads() ? smaller(most_threads(), s->outputs) : 1;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (s->w * shares > 1)
    for (size task = 0; task < s->w * shares; task++) {
        size share = task % shares;
        failed |= NAME(sums_of_worker)(s, images, slopes, task / shares, s->outputs * share / shares,
                                       s->outputs * (share + 1) / shares, out);
    }
    return failed ? DECLINED : 0;
}

#undef LANES_HERE
#undef VEC
#endif
