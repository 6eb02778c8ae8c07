/* Order statistics of every column of a few rows, or of mixtures of them, in one pass over memory.

   WIDTH columns at a time are copied into the first-level cache, mixed, sorted there by a network
   of comparators (one minimum and one maximum of two rows each), and reduced to one number a
   column. The file is compiled once for each REAL (float, double) and instruction set, and needs
   nothing but C11 and POSIX threads. Sums run in the order of the rows, and nothing is contracted
   (-ffp-contract=off), so that a number depends neither on the instruction set nor on the number
   of threads. */

#include <stdint.h>
#include <string.h>

#include "threads.h"

#define WIDTH ((int)(128 / sizeof(REAL))) /* columns at a time */
#define MOST_ROWS 256

/* A vector of the instruction set: what it is, and the smaller and the larger of two. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#if defined(__AVX512F__)
#include <immintrin.h>
typedef REAL V __attribute__((vector_size(64)));
#define MIN(a, b) JOIN(_mm512_min_, PACKED)(a, b)
#define MAX(a, b) JOIN(_mm512_max_, PACKED)(a, b)
#elif defined(__AVX2__)
#include <immintrin.h>
typedef REAL V __attribute__((vector_size(32)));
#define MIN(a, b) JOIN(_mm256_min_, PACKED)(a, b)
#define MAX(a, b) JOIN(_mm256_max_, PACKED)(a, b)
#elif defined(__SSE2__)
#include <immintrin.h>
typedef REAL V __attribute__((vector_size(16)));
#define MIN(a, b) JOIN(_mm_min_, PACKED)(a, b)
#define MAX(a, b) JOIN(_mm_max_, PACKED)(a, b)
#elif defined(__aarch64__)
#include <arm_neon.h>
typedef REAL V __attribute__((vector_size(16)));
#define MIN(a, b) JOIN(vminq_, NEON)(a, b)
#define MAX(a, b) JOIN(vmaxq_, NEON)(a, b)
#else
typedef REAL V;
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#endif
#define LANES ((int)(sizeof(V) / sizeof(REAL)))

/* For every n up to MOST_UNROLLED, sort_n: LOAD all n rows of a vector's columns into registers,
   COMPARE as the network says, STORE them. build.py writes it. */
#define LOAD(i) V r##i = *(const V *)(rows[i] + k);
#define COMPARE(a, b) { V low = MIN(r##a, r##b); r##b = MAX(r##a, r##b); r##a = low; }
#define STORE(i) *(V *)(rows[i] + k) = r##i;
#include "networks.h"

/* What becomes of the sorted values r[0] <= ... <= r[n - 1] of a column. */
enum { MIDDLE, MEAN, NEAREST_TO_MIDDLE, NEAREST_TO_MEAN, VOTE };

/* What `columns` says of the numbers that it has seen. */
enum { ODD_INPUT = 1, ODD_RESULT = 2 };

/* Mixture i is the sum of weights[k] * row places[k], k from starts[i] to starts[i + 1] - 1. */
typedef struct {
    const int64_t *starts, *places;
    const REAL *weights;
} Mixing;

typedef struct {
    const REAL *const *rows;  /* `stored` pointers to rows of `count` numbers */
    int64_t stored, n;
    const Mixing *mixing;  /* what is sorted: n mixtures of the rows; NULL: the rows */
    int64_t first_column, last_column;
    const int32_t *network;  /* triples: low, high, and which of both to keep (1: low, 2: high) */
    int64_t comparators;
    int32_t what;
    int64_t first, last, keep;
    REAL tie;
    REAL *out;
    int odd;
} Job;

/* The same from a table, with the rows in the cache: for more of them. */
static void sort(REAL rows[][WIDTH], const int32_t *network, int64_t comparators)
{
    for (int64_t i = 0; i < comparators; i++, network += 3) {
        REAL *restrict low = rows[network[0]], *restrict high = rows[network[1]];
        switch (network[2]) {
        case 1:
            for (int k = 0; k < WIDTH; k++)
                low[k] = low[k] < high[k] ? low[k] : high[k];
            break;
        case 2:
            for (int k = 0; k < WIDTH; k++)
                high[k] = low[k] > high[k] ? low[k] : high[k];
            break;
        default:
            for (int k = 0; k < WIDTH; k++) {
                REAL a = low[k], b = high[k];
                low[k] = a < b ? a : b;
                high[k] = a > b ? a : b;
            }
        }
    }
}

static void middle(REAL rows[][WIDTH], int64_t n, REAL *restrict out)
{
    const REAL *a = rows[(n - 1) / 2], *b = rows[n / 2];
    if (n % 2)
        for (int k = 0; k < WIDTH; k++)
            out[k] = a[k];
    else
        for (int k = 0; k < WIDTH; k++)
            out[k] = a[k] / 2 + b[k] / 2;
}

static void mean(REAL rows[][WIDTH], int64_t first, int64_t last, REAL *restrict out)
{
    for (int k = 0; k < WIDTH; k++)
        out[k] = rows[first][k];
    for (int64_t i = first + 1; i < last; i++)
        for (int k = 0; k < WIDTH; k++)
            out[k] += rows[i][k];
    REAL count = (REAL)(last - first);
    for (int k = 0; k < WIDTH; k++)
        out[k] /= count;
}

/* A window of `keep` sorted values moves up as long as the value that enters is nearer to the
   center than the one that leaves. */
static void mean_of_nearest(REAL rows[][WIDTH], int64_t n, int64_t keep, REAL *restrict center)
{
    for (int64_t i = 0; i < n - keep; i++) {
        const REAL *entering = rows[keep + i], *leaving = rows[i];
        REAL *slot = rows[i % keep];
        for (int k = 0; k < WIDTH; k++)
            slot[k] = entering[k] - center[k] < center[k] - leaving[k] ? entering[k] : slot[k];
    }
    mean(rows, 0, keep, center);
}

static void vote(REAL rows[][WIDTH], int64_t n, REAL tie, REAL *restrict out)
{
    REAL balance[WIDTH] = {0};
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < WIDTH; k++)
            balance[k] += rows[i][k] < 0 ? (REAL)-1 : (REAL)1;
    for (int k = 0; k < WIDTH; k++)
        out[k] = balance[k] > 0 ? (REAL)1 : balance[k] < 0 ? (REAL)-1 : tie;
}

/* The n mixtures of rows, whose terms are added up in order. */
static void mix(REAL rows[][WIDTH], const Mixing *mixing, int64_t n, REAL mixed[][WIDTH])
{
    for (int64_t i = 0; i < n; i++) {
        V sum[WIDTH / LANES] = {0};
        for (int64_t j = mixing->starts[i]; j < mixing->starts[i + 1]; j++) {
            const V *row = (const V *)rows[mixing->places[j]];
            for (int k = 0; k < WIDTH / LANES; k++)
                sum[k] += mixing->weights[j] * row[k];
        }
        memcpy(mixed[i], sum, sizeof sum);
    }
}

static void *run(void *argument)
{
    Job *job = argument;
    _Alignas(64) REAL stored[MOST_ROWS][WIDTH], mixed[MOST_ROWS][WIDTH];
    REAL (*const rows)[WIDTH] = job->mixing ? mixed : stored;
    REAL result[WIDTH], trace[WIDTH] = {0}, end[WIDTH] = {0};
    for (int64_t begin = job->first_column; begin < job->last_column; begin += WIDTH) {
        int64_t count = job->last_column - begin;
        count = count < WIDTH ? count : WIDTH;
        for (int64_t i = 0; i < job->stored; i++) {
            const REAL *from = job->rows[i] + begin;
            if (count == WIDTH) {
                __builtin_prefetch(from + 4 * WIDTH);
                __builtin_prefetch(from + 4 * WIDTH + WIDTH / 2);
                for (int k = 0; k < WIDTH; k++)
                    stored[i][k] = from[k];
            } else {
                memset(stored[i], 0, sizeof stored[i]);
                memcpy(stored[i], from, (size_t)count * sizeof(REAL));
            }
            for (int k = 0; k < WIDTH; k++)
                trace[k] += stored[i][k] * 0; /* nan once there was a nan or an inf */
        }
        if (job->mixing)
            mix(stored, job->mixing, job->n, mixed);
        if (job->what != VOTE && job->n <= MOST_UNROLLED)
            sorts[job->n](rows);
        else
            sort(rows, job->network, job->comparators);
        switch (job->what) {
        case MIDDLE:
            middle(rows, job->n, result);
            break;
        case MEAN:
            mean(rows, job->first, job->last, result);
            break;
        case NEAREST_TO_MIDDLE:
            middle(rows, job->n, result);
            mean_of_nearest(rows, job->n, job->keep, result);
            break;
        case NEAREST_TO_MEAN:
            mean(rows, job->first, job->last, result);
            mean_of_nearest(rows, job->n, job->keep, result);
            break;
        default:
            vote(rows, job->n, job->tie, result);
        }
        for (int k = 0; k < WIDTH; k++)
            end[k] += result[k] * 0;
        memcpy(job->out + begin, result, (size_t)count * sizeof(REAL));
    }
    for (int k = 0; k < WIDTH; k++)
        job->odd |= (trace[k] == 0 ? 0 : ODD_INPUT) | (end[k] == 0 ? 0 : ODD_RESULT);
    return NULL;
}

/* out[c] of every column c of n <= MOST_ROWS rows: the `stored` ones, or, if `starts` is not NULL,
   mixtures of these. Returns ODD_INPUT if a stored row holds a nan or an inf, plus ODD_RESULT if
   the result does. */
int columns(const REAL *const *rows, int64_t stored, const int64_t *starts, const int64_t *places,
            const REAL *weights, int64_t n, int64_t count, const int32_t *network,
            int64_t comparators, int32_t what, int64_t first, int64_t last, int64_t keep,
            double tie, REAL *out, int64_t threads)
{
    Job jobs[MOST_THREADS];
    const Mixing mixing = {starts, places, weights};
    threads = threads < 1 ? 1 : threads < MOST_THREADS ? threads : MOST_THREADS;
    int64_t blocks = (count + WIDTH - 1) / WIDTH, odd = 0;
    for (int64_t t = 0; t < threads; t++) {
        int64_t begin = blocks * t / threads * WIDTH, end = blocks * (t + 1) / threads * WIDTH;
        jobs[t] = (Job){rows, stored, n, starts ? &mixing : NULL, begin, end < count ? end : count,
                        network, comparators, what, first, last, keep, (REAL)tie, out, 0};
    }
    in_threads(run, jobs, sizeof *jobs, threads);
    for (int64_t t = 0; t < threads; t++)
        odd |= jobs[t].odd;
    return (int)odd;
}
