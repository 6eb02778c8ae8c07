/* Sums of products of which no bit depends on the instruction set or on the number of threads.

   Numbers are added up in REAL, in LANES side by side, over a chunk of columns, and these sums in
   double. Chunks belong to SEGMENTS, however many threads there are, whose sums are added up in
   order. */

#ifndef LANES_H
#define LANES_H

#include <stdint.h>

#define SEGMENTS 64
#define LANES ((int)(32 / sizeof(REAL)))

typedef REAL V __attribute__((vector_size(32)));
typedef REAL Unaligned __attribute__((vector_size(32), aligned(sizeof(REAL))));

/* The sum of a vector's lanes. */
static double added(V vector)
{
    double lanes[LANES];
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = vector[lane];
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

#endif
