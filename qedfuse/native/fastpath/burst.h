/* A burst: one stay in the filter, in which requests are answered without the GIL. */
#ifndef QEDFUSE_BURST_H
#define QEDFUSE_BURST_H

#include "layer.h"

/* What has become of a request. HANDED: to Python, which should have its turn. PASS, MISS, WAIT: nothing was replied;
 * to pyfuse3. WAIT: the host has begun to read what is missing. */
enum outcome { DONE, HANDED, PASS, MISS, WAIT };

struct burst {
    uint64_t number;       /* what a Layer got in one of another number (its `burst`) is old */
    int fd;                /* the session's */
    void *request;         /* the current one */
    PyThreadState *thread; /* NULL: we have the GIL */
    Layer *wrote[8];       /* images that were written, of which Python does not know yet */
    unsigned writes;
};

void burst_begin(struct burst *burst, int fd);

/* Python has run: from here on it is another burst. */
void burst_renew(struct burst *burst);

void take_gil(struct burst *burst);
void release_gil(struct burst *burst);

/* The image will be told of as written. False: there are too many. */
bool note_write(struct burst *burst, Layer *layer);

/* Before Python does anything else. Needs the GIL. */
void tell_writes(struct burst *burst);

#endif
