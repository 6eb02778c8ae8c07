/* Inner products of a few rows, in one pass over memory.

   CHUNK columns at a time are copied into the cache, and the products of TALL rows with BROAD
   others are added up there in registers. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lanes.h"
#include "threads.h"

#define CHUNK ((int64_t)(2048 / sizeof(REAL))) /* columns at a time */
#define TALL 2
#define BROAD 4

typedef struct {
    const REAL *const *rows; /* n pointers to rows of `count` numbers */
    int64_t n, count, chunks;
    int64_t first_segment, last_segment, segments;
    double *sums; /* [segments, n, n], of which j <= i is used */
    int failed;
} Products;

/* sums[i, j] += the products of rows i, i + 1 with rows j ... j + 3 of a chunk, where there are
   such rows and j <= i; the last row stands in for those that are not there. Meanwhile the cache
   fetches what begins at `next`. */
static void tile(const REAL *chunk, int64_t n, int64_t i, int64_t j, const REAL *next, double *sums)
{
    const REAL *a[TALL], *b[BROAD];
    V total[TALL][BROAD] = {0};
    for (int64_t k = 0; k < TALL; k++)
        a[k] = chunk + (i + k < n ? i + k : n - 1) * CHUNK;
    for (int64_t k = 0; k < BROAD; k++)
        b[k] = chunk + (j + k < n ? j + k : n - 1) * CHUNK;
    for (int64_t c = 0; c < CHUNK; c += LANES) {
        __builtin_prefetch(next + c);
        for (int k = 0; k < TALL; k++)
            for (int l = 0; l < BROAD; l++)
                total[k][l] += *(const V *)(a[k] + c) * *(const V *)(b[l] + c);
    }
    for (int64_t k = 0; k < TALL && i + k < n; k++)
        for (int64_t l = 0; l < BROAD && j + l <= i + k; l++)
            sums[(i + k) * n + j + l] += added(total[k][l]);
}

static void *multiply(void *argument)
{
    Products *job = argument;
    int64_t n = job->n;
    REAL *chunk;
    if (posix_memalign((void **)&chunk, 64, (size_t)(n * CHUNK) * sizeof(REAL))) {
        job->failed = 1;
        return NULL;
    }
    for (int64_t segment = job->first_segment; segment < job->last_segment; segment++) {
        double *sums = job->sums + segment * n * n;
        int64_t end = job->chunks * (segment + 1) / job->segments;
        memset(sums, 0, (size_t)(n * n) * sizeof(double));
        for (int64_t k = job->chunks * segment / job->segments; k < end; k++) {
            int64_t left = job->count - k * CHUNK;
            size_t size = (size_t)(left < CHUNK ? left : CHUNK) * sizeof(REAL);
            for (int64_t i = 0; i < n; i++) {
                memcpy(chunk + i * CHUNK, job->rows[i] + k * CHUNK, size);
                memset((char *)(chunk + i * CHUNK) + size, 0, CHUNK * sizeof(REAL) - size);
            }
            int64_t row = 0;
            for (int64_t i = 0; i < n; i += TALL)
                for (int64_t j = 0; j < i + TALL; j += BROAD, row += row < n - 1)
                    tile(chunk, n, i, j, job->rows[row] + (k + 1) * CHUNK, sums);
        }
    }
    free(chunk);
    return NULL;
}

/* out[i, j] of n rows of `count` numbers: their inner products. Returns 1 if there was
   no memory, else 0. */
int products(const REAL *const *rows, int64_t n, int64_t count, double *out, int64_t threads)
{
    Products jobs[MOST_THREADS];
    int64_t chunks = (count + CHUNK - 1) / CHUNK, segments = chunks < SEGMENTS ? chunks : SEGMENTS;
    double *sums = malloc((size_t)(segments * n * n + 1) * sizeof(double));
    int failed = sums == NULL;
    threads = threads < 1 ? 1 : threads < MOST_THREADS ? threads : MOST_THREADS;
    for (int64_t t = 0; t < threads; t++)
        jobs[t] = (Products){rows, n, count, chunks, segments * t / threads,
                             segments * (t + 1) / threads, segments, sums, 0};
    if (!failed)
        in_threads(multiply, jobs, sizeof *jobs, threads);
    for (int64_t t = 0; t < threads; t++)
        failed |= jobs[t].failed;
    for (int64_t i = 0; !failed && i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = 0;
            for (int64_t segment = 0; segment < segments; segment++)
                sum += sums[(segment * n + i) * n + j];
            out[i * n + j] = out[j * n + i] = sum;
        }
    free(sums);
    return failed;
}
