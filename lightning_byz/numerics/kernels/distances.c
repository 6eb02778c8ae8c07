/* Squared distances of a few rows to a point, in one pass over memory.

   CHUNK columns of a row at a time, and of the point, which stay in the first-level cache. */

#include <stdint.h>
#include <stdlib.h>

#include "lanes.h"
#include "threads.h"

#define CHUNK ((int64_t)(16384 / sizeof(REAL))) /* columns at a time */
#define VECTORS 4                               /* that are added up side by side */

typedef struct {
    const REAL *const *rows, *center;
    int64_t n, count, chunks;
    int64_t first_segment, last_segment, segments;
    double *sums; /* [segments, n] */
} Squares;

static void *square(void *argument)
{
    Squares *job = argument;
    for (int64_t segment = job->first_segment; segment < job->last_segment; segment++) {
        int64_t end = job->chunks * (segment + 1) / job->segments;
        double *sums = job->sums + segment * job->n;
        for (int64_t i = 0; i < job->n; i++)
            sums[i] = 0;
        for (int64_t k = job->chunks * segment / job->segments; k < end; k++) {
            int64_t left = job->count - k * CHUNK, count = left < CHUNK ? left : CHUNK;
            const REAL *center = job->center ? job->center + k * CHUNK : NULL;
            for (int64_t i = 0; i < job->n; i++) {
                const REAL *row = job->rows[i] + k * CHUNK;
                V total[VECTORS] = {0};
                int64_t c = 0;
                for (; c + VECTORS * LANES <= count; c += VECTORS * LANES)
                    for (int v = 0; v < VECTORS; v++) {
                        V part = *(const Unaligned *)(row + c + v * LANES);
                        if (center)
                            part -= *(const Unaligned *)(center + c + v * LANES);
                        total[v] += part * part;
                    }
                for (int lane = 0; c < count; c++, lane++) {
                    REAL part = center ? row[c] - center[c] : row[c];
                    total[lane / LANES][lane % LANES] += part * part;
                }
                for (int v = 0; v < VECTORS; v++)
                    sums[i] += added(total[v]);
            }
        }
    }
    return NULL;
}

/* out[i] of n rows of `count` numbers: their squared distances to `center`, or, if it is NULL, to
   the origin. Returns 1 if there was no memory, else 0. */
int squares(const REAL *const *rows, int64_t n, int64_t count, const REAL *center, double *out,
            int64_t threads)
{
    Squares jobs[MOST_THREADS];
    int64_t chunks = (count + CHUNK - 1) / CHUNK, segments = chunks < SEGMENTS ? chunks : SEGMENTS;
    double *sums = malloc((size_t)(segments * n + 1) * sizeof(double));
    if (sums == NULL)
        return 1;
    threads = threads < 1 ? 1 : threads < MOST_THREADS ? threads : MOST_THREADS;
    for (int64_t t = 0; t < threads; t++)
        jobs[t] = (Squares){rows, center, n, count, chunks, segments * t / threads,
                            segments * (t + 1) / threads, segments, sums};
    in_threads(square, jobs, sizeof *jobs, threads);
    for (int64_t i = 0; i < n; i++) {
        out[i] = 0;
        for (int64_t segment = 0; segment < segments; segment++)
            out[i] += sums[segment * n + i];
    }
    free(sums);
    return 0;
}
