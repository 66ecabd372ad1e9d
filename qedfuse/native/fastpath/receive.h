/* Taking requests from the kernel. */
#ifndef QEDFUSE_RECEIVE_H
#define QEDFUSE_RECEIVE_H

#include "burst.h"

/* For what stands in front of libfuse's functions. */
#define EXPORTED __attribute__((visibility("default")))

struct fuse_session; /* libfuse's; opaque */

/* The beginning of libfuse 3's struct (fuse_common.h), the same in all its releases. */
struct fuse_buf {
    size_t size;
    int flags; /* 2: the data is in the pipe `fd`, not in `mem` */
    void *mem; /* owned by pyfuse3's task, allocated by libfuse or by us */
    int fd;
    off_t pos;
};

/* Its functions; NULL until they are found. */
extern struct libfuse {
    int (*receive_buf)(struct fuse_session *, struct fuse_buf *);
    void (*process_buf)(struct fuse_session *, const struct fuse_buf *);
    int (*session_fd)(struct fuse_session *);
} libfuse;

/* Finds them behind pyfuse3's library, which is loaded. */
void find_libfuse(const char *path);

/* One request: its size, 0 when the session is over, or a negative error: -EINTR if there is none. It is at
 * `burst->request`, or, if that is NULL, in the buffer's pipe. */
int receive(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf);
int receive_by_libfuse(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf);

/* Puts the request of `size` bytes where pyfuse3 expects it. */
void pass(const struct burst *burst, struct fuse_buf *buf, size_t size);

#endif
