/* The memory that requests and replies lie in. */
#ifndef QEDFUSE_MEMORY_H
#define QEDFUSE_MEMORY_H

#include "layer.h"

enum {
    MAX_IO = 1 << 20, /* bytes: a request's data, the most that the kernel asks for (256 pages) */
    REQUEST_SPACE = MAX_IO + 8 * PAGE, /* with the headers, and what malloc rounds up by */
};

extern char *request_memory; /* REQUEST_SPACE; from a page boundary */
extern char *reply_memory;   /* a reply: the header right before a page boundary, the data from there on */
extern char *scratch;        /* twice MAX_IO: what a new cluster gets from below, before and behind a write */

/* False: no memory, and errno says so. */
bool memory_prepare(void);

#endif
