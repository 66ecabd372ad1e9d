/* Adjoining runs of a file go into one preadv2 or pwritev. */

#include "batch.h"
#include "memory.h"

#include <errno.h>

/* Is the page of the file at `host` in memory? A write of a part of a page would otherwise wait to read the rest. */
static bool cached(int fd, uint64_t host)
{
    char byte;
    struct iovec iov = {&byte, 1};
    return preadv2(fd, &iov, 1, (off_t)host, RWF_NOWAIT) == 1;
}

enum outcome batch_do(struct batch *batch)
{
    if (!batch->pieces)
        return DONE;
    uint64_t end = batch->host + batch->length;
    ssize_t done;
    if (batch->write) {
        if ((batch->host % PAGE && !cached(batch->fd, batch->host)) || (end % PAGE && !cached(batch->fd, end - 1)))
            return MISS;
        done = pwritev(batch->fd, batch->iov, batch->pieces, (off_t)batch->host);
    } else {
        done = preadv2(batch->fd, batch->iov, batch->pieces, (off_t)batch->host, RWF_NOWAIT);
        if (done > 0 ? (uint64_t)done < batch->length : done < 0 && errno == EAGAIN)
            return WAIT;
    }
    batch->pieces = 0;
    return done >= 0 && (uint64_t)done == batch->length ? DONE : MISS;
}

enum outcome batch_add(struct batch *batch, int fd, uint64_t host, char *memory, uint64_t length)
{
    bool follows = batch->pieces && batch->fd == fd && batch->host + batch->length == host;
    struct iovec *last = &batch->iov[batch->pieces - follows];
    if (follows && (char *)last->iov_base + last->iov_len == memory) {
        last->iov_len += length;
    } else {
        enum outcome before = !follows || batch->pieces == MAX_IOV ? batch_do(batch) : DONE;
        if (before != DONE)
            return before;
        if (!batch->pieces) {
            batch->fd = fd;
            batch->host = host;
            batch->length = 0;
        }
        batch->iov[batch->pieces++] = (struct iovec){memory, length};
    }
    batch->length += length;
    return DONE;
}
