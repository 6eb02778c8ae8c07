/* Work that is cut into shares, one for each thread. */

#ifndef THREADS_H
#define THREADS_H

#include <pthread.h>
#include <stdint.h>

#define MOST_THREADS 64

/* Runs `run` on each of `shares` <= MOST_THREADS jobs of `size` bytes, one after the other in
   memory; the last one in this thread, and every one for which no thread can be had. */
static void in_threads(void *(*run)(void *), void *jobs, int64_t size, int64_t shares)
{
    pthread_t ids[MOST_THREADS];
    int started[MOST_THREADS] = {0};
    for (int64_t t = 0; t < shares; t++) {
        void *job = (char *)jobs + t * size;
        if (t + 1 < shares)
            started[t] = pthread_create(&ids[t], NULL, run, job) == 0;
        if (!started[t])
            run(job);
    }
    for (int64_t t = 0; t < shares; t++)
        if (started[t])
            pthread_join(ids[t], NULL);
}

#endif
