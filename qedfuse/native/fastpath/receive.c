/* Taking requests from the kernel: by ourselves, or as libfuse does it; at once, or after a wait. */

#include "receive.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/fuse.h>
#include <malloc.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#define BUF_IS_FD 2

enum {
    SPIN_NS = 200 * 1000, /* a client on a virtual processor that sleeps needs 100 to ask again */
    WAIT_NS = 500 * 1000,
    PAUSE_MAX = 63,
};

struct libfuse libfuse;
struct pace spins;

/* Where a request goes in our memory: a WRITE's data then begins a page, and is copied page by page. */
#define REQUEST (request_memory + PAGE - sizeof(struct fuse_in_header) - sizeof(struct fuse_write_in))

int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

void find_libfuse(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (library) {
        /* ISO C has no cast from object to function pointers; POSIX wants this to work. */
        *(void **)&libfuse.session_fd = dlsym(library, "fuse_session_fd");
        *(void **)&libfuse.receive_buf = libfuse.session_fd ? dlsym(library, "fuse_session_receive_buf") : NULL;
    }
}

int receive_by_libfuse(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int result = libfuse.receive_buf(session, buf);
    burst->request = buf->flags & BUF_IS_FD ? NULL : buf->mem;
    return result == -EAGAIN ? -EINTR : result;
}

/* We read ourselves: libfuse would splice through a pipe, which is slower, and where nobody sees a request's flags. The
 * kernel refuses, with EINVAL and without taking a request, a space that could be too small for what was agreed with
 * it; then it is libfuse's turn, which must not find our buffer, as it believes that every one is its own. */
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

bool pace_try(struct pace *pace)
{
    return pace->waited++ >= pace->pause;
}

void pace_note(struct pace *pace, bool met)
{
    pace->tries++;
    pace->met += met;
    if (met) {
        pace->pause /= 2;
    } else {
        pace->pause = pace->pause < PAUSE_MAX / 2 ? pace->pause * 2 + 1 : PAUSE_MAX;
        pace->waited = 0;
    }
}

/* Receives for a moment, until there is a request. No sched_yield: the scheduler makes a task that yields often wait. */
static int spin(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int64_t end = now() + SPIN_NS;
    int result;
    do
        result = receive(burst, session, buf);
    while (result == -EINTR && now() < end);
    pace_note(&spins, result != -EINTR);
    return result;
}

int await_and_receive(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int result = receive(burst, session, buf);
    if (result == -EINTR && pace_try(&spins))
        result = spin(burst, session, buf);
    if (result != -EINTR)
        return result;
    /* Sleeping is still quicker than the way through the event loop. */
    struct pollfd ready = {.fd = burst->fd, .events = POLLIN};
    return ppoll(&ready, 1, &(struct timespec){.tv_nsec = WAIT_NS}, NULL) > 0 ? receive(burst, session, buf) : -EINTR;
}
