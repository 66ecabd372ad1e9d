/* Reading and writing ranges of an image. */
#ifndef QEDFUSE_TRANSFER_H
#define QEDFUSE_TRANSFER_H

#include "layer.h"

enum {
    MAX_IO = 1 << 20, /* a request's data: the most that the kernel asks for (256 pages) */
    REQUEST_SPACE = MAX_IO + 8 * PAGE, /* with the headers, and what malloc rounds up by */
};

extern char *request_memory; /* REQUEST_SPACE; from a page boundary */
extern char *reply_memory;   /* a reply: the header right before a page boundary, the data from there on */

/* Returns false without memory. */
bool memory_prepare(void);

/* One stay in the function at the end. */
struct burst {
    uint64_t number;
    int fd;                /* the session's */
    void *request;         /* the one at hand */
    PyThreadState *thread; /* NULL: we have the GIL */
    Layer *wrote[8];       /* images that were written, and whose Python does not know yet */
    unsigned writes;
};

void take_gil(struct burst *burst);
void release_gil(struct burst *burst);

/* Before Python does anything else. Needs the GIL. */
void tell_writes(struct burst *burst);

/* HANDED: to Python, which should have its turn. PASS, MISS, WAIT: nothing was replied; to pyfuse3. WAIT: the host has
 * begun to read what is missing. */
enum outcome { DONE, HANDED, PASS, MISS, WAIT };

enum outcome read_image(struct burst *burst, const Layer *top, uint64_t offset, uint64_t size, char *memory);

/* Nothing is written in place unless all of the range has clusters of its own in the top layer. */
enum outcome write_image(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory);

#endif
