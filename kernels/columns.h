/* What kernels/columns.c and kernels/gram.c share: n vectors as rows, and further rows below them. */

#ifndef COLUMNS_H
#define COLUMNS_H

#include <stdlib.h>

#include "array.h"
#include "kernels.h"

#ifdef __x86_64__                   /* what has fma: where products are added they are fused, on every CPU */
#undef CPU_GENERATIONS
#if defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CPU_GENERATIONS __attribute__((noinline, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CPU_GENERATIONS
#endif
#endif

enum {
    LINE = 64,                                  /* bytes */
    MOST_ROWS = 1 << 14,
    LEAST_PART = 1 << 13, MOST_PARTS = 64,      /* columns of a part, and parts, where one adds over columns */
    DECLINED = 1,
};

/* The rows [X; E]; pitch in bytes. */
typedef struct {
    const char *x, *e;
    size x_pitch, e_pitch, n, b, d;     /* n rows of X, b in all, of d columns */
} sources;

static inline const void *source(const sources *s, size j)
{
    return j < s->n ? s->x + j * s->x_pitch : s->e + (j - s->n) * s->e_pitch;
}

/* Whether X and E, perhaps none, are rows that fit together; then s says where they are. */
static inline int sources_of(const array *X, const array *E, sources *s)
{
    if (!is_rows(X) || X->shape[0] < 1
        || (E != none && (!is_rows(E) || E->dtype->number != X->dtype->number || E->shape[1] != X->shape[1])))
        return 0;
    *s = (sources){.x = X->data, .x_pitch = X->strides[0], .n = X->shape[0], .b = X->shape[0], .d = X->shape[1]};
    if (E != none)
        s->e = E->data, s->e_pitch = E->strides[0], s->b += E->shape[0];
    return s->b <= MOST_ROWS;
}

/* Memory that begins at a LINE, or NULL. */
static inline void *lines(size bytes)
{
    return aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE + LINE);
}

/* Sums over columns are added up part by part; how long a part is depends on d alone. `of` divides it. */
static inline size part_length(size d, size of)
{
    size length = (d + MOST_PARTS - 1) / MOST_PARTS;
    return ((length < LEAST_PART ? LEAST_PART : length) + of - 1) / of * of;
}

#endif
