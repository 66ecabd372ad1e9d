/* Which requests are answered, and how. */
#ifndef QEDFUSE_REQUESTS_H
#define QEDFUSE_REQUESTS_H

#include "burst.h"

#include <linux/fuse.h>

/* `size` bytes of request, which stay as they are. DONE: it has been answered. */
enum outcome answer(struct burst *burst, void *request, size_t size);

/* A READ alone, which may have been tried before. */
enum outcome answer_read(struct burst *burst, const struct fuse_in_header *in, const struct fuse_read_in *arg);

#endif
