/* A weighted sum of a few rows, in one pass over memory.

   CHUNK columns of the sum stay in the first-level cache while those of one row after the other are
   added to them, in order; so a number depends neither on the instruction set nor on the number of
   threads. */

#include <stdint.h>

#include "threads.h"

#define CHUNK ((int64_t)(8192 / sizeof(REAL))) /* columns at a time */

typedef struct {
    const REAL *const *rows; /* n pointers to rows of numbers */
    const double *weights;
    int64_t n, first_column, last_column;
    REAL *out;
    int odd;
} Sum;

static void *add(void *argument)
{
    Sum *job = argument;
    int odd = 0;
    for (int64_t begin = job->first_column; begin < job->last_column; begin += CHUNK) {
        int64_t left = job->last_column - begin, count = left < CHUNK ? left : CHUNK;
        REAL *restrict out = job->out + begin;
        for (int64_t c = 0; c < count; c++)
            out[c] = 0;
        for (int64_t i = 0; i < job->n; i++) {
            const REAL *restrict row = job->rows[i] + begin;
            const REAL weight = (REAL)job->weights[i];
            for (int64_t c = 0; c < count; c++)
                out[c] += weight * row[c];
        }
        for (int64_t c = 0; c < count; c++)
            odd |= !(out[c] * 0 == 0);
    }
    job->odd = odd;
    return NULL;
}

/* out[c] = the sum over i of weights[i] * rows[i][c], for `count` columns. Returns 1 if a number of
   the result is nan or inf, else 0. */
int weighted_sum(const REAL *const *rows, const double *weights, int64_t n, int64_t count,
                 REAL *out, int64_t threads)
{
    Sum jobs[MOST_THREADS];
    threads = threads < 1 ? 1 : threads < MOST_THREADS ? threads : MOST_THREADS;
    int64_t chunks = (count + CHUNK - 1) / CHUNK;
    int odd = 0;
    for (int64_t t = 0; t < threads; t++) {
        int64_t begin = chunks * t / threads * CHUNK, end = chunks * (t + 1) / threads * CHUNK;
        jobs[t] = (Sum){rows, weights, n, begin, end < count ? end : count, out, 0};
    }
    in_threads(add, jobs, sizeof *jobs, threads);
    for (int64_t t = 0; t < threads; t++)
        odd |= jobs[t].odd;
    return odd;
}
