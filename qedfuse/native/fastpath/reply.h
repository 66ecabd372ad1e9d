/* Replies to the kernel: from C, and, by way of a Request, from Python. */
#ifndef QEDFUSE_REPLY_H
#define QEDFUSE_REPLY_H

#include "burst.h"

#include <linux/fuse.h>

/* A request that Python answers, as a Python object. */
extern PyTypeObject RequestType;

PyObject *request_new(int fd, const struct fuse_in_header *in);

/* `size` bytes at `reply_memory`, or a negative error. What the kernel does not want (ENOENT: its process is gone,
 * ENODEV: unmounted) is no loss. */
void reply(int fd, uint64_t unique, int error, size_t size);

#endif
