/* A batch: a transfer between memory and one range of one file, in one system call that does not wait for a disk. */
#ifndef QEDFUSE_BATCH_H
#define QEDFUSE_BATCH_H

#include "burst.h"

#include <sys/uio.h>

enum { MAX_IOV = 64 };

/* Begins as all zeroes, but for `write`. */
struct batch {
    int fd;
    bool write;
    uint64_t host, length; /* bytes of the file */
    int pieces;            /* of memory; 0: there is nothing to do */
    struct iovec iov[MAX_IOV];
};

/* One more piece, for `length` bytes at `host`; does what there is if it does not follow that. */
enum outcome batch_add(struct batch *batch, int fd, uint64_t host, char *memory, uint64_t length);

/* DONE; MISS: Python should try; WAIT: it is being read. */
enum outcome batch_do(struct batch *batch);

#endif
