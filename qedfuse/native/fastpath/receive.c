/* A request is taken by ourselves, or as libfuse does it. */

#include "receive.h"
#include "memory.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/fuse.h>
#include <malloc.h>
#include <unistd.h>

#define BUF_IS_FD 2

struct libfuse libfuse;

/* Where a request goes in our memory: a WRITE's data then begins a page, and is copied page by page. */
#define REQUEST (request_memory + PAGE - sizeof(struct fuse_in_header) - sizeof(struct fuse_write_in))

void find_libfuse(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (library) {
        /* ISO C has no cast from object to function pointers; POSIX wants this to work. */
        *(void **)&libfuse.session_fd = dlsym(library, "fuse_session_fd");
        *(void **)&libfuse.process_buf = dlsym(library, "fuse_session_process_buf");
        *(void **)&libfuse.receive_buf = libfuse.session_fd ? dlsym(library, "fuse_session_receive_buf") : NULL;
    }
}

int receive_by_libfuse(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int result = libfuse.receive_buf(session, buf);
    burst->request = buf->flags & BUF_IS_FD ? NULL : buf->mem;
    return result == -EAGAIN ? -EINTR : result;
}

/* We read ourselves: libfuse would splice through a pipe, which is slower, and where a request's flags cannot be seen.
 * The kernel refuses, with EINVAL and without taking a request, a space that could be too small for what was agreed
 * with it; then it is libfuse's turn, which must not find our buffer, as it believes that every one is its own. */
int receive(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    bool ours = !buf->mem;
    if (ours)
        buf->mem = malloc(MAX_IO + 2 * PAGE); /* pyfuse3 frees it */
    if (buf->mem) {
        size_t space = malloc_usable_size(buf->mem);
        burst->request = space <= (size_t)(request_memory + REQUEST_SPACE - REQUEST) ? REQUEST : buf->mem;
        ssize_t size = read(burst->fd, burst->request, space);
        if (size >= (ssize_t)sizeof(struct fuse_in_header))
            return (int)size;
        /* ENOENT: the request was withdrawn as it was being read. */
        if (size < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOENT))
            return -EINTR;
    }
    if (ours) {
        free(buf->mem);
        buf->mem = NULL;
    }
    return receive_by_libfuse(burst, session, buf);
}

void pass(const struct burst *burst, struct fuse_buf *buf, size_t size)
{
    if (burst->request == REQUEST)
        memcpy(buf->mem, REQUEST, size);
    if (burst->request) {
        buf->size = size;
        buf->flags = 0;
    }
}
