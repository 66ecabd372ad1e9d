/*
 * INIT is libfuse's to answer, and its answer is amended on the way.
 *
 * A handle with FOPEN_DIRECT_IO cannot be mapped shared unless the kernel is told that it may
 * (FUSE_DIRECT_IO_ALLOW_MMAP, Linux 6.6), and libfuse can tell it from 3.17 on only. So this module defines
 * `fuse_session_process_buf` as well, by which pyfuse3 has libfuse work on a request, and lets libfuse answer INIT into
 * a pipe: for that moment its descriptor leads there. It is the first request of a connection, nothing else is under
 * way, and libfuse answers it before it returns. If anything is not as expected, libfuse answers the kernel as ever.
 *
 * Source: Linux fs/fuse/inode.c (process_init_reply), include/uapi/linux/fuse.h.
 */

#define _GNU_SOURCE /* dup3, pipe2 */
#include "negotiate.h"
#include "receive.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <unistd.h>

/* In `flags2`; the headers that we are built with may be older. */
#define ALLOW_MMAP (1U << (36 - 32))

bool wants_direct_maps;
bool direct_maps;

/* What libfuse may answer, and more. */
struct answer {
    struct fuse_out_header header;
    struct fuse_init_out init;
    char more[256];
};

static bool is_offered(const struct fuse_buf *buf)
{
    const struct fuse_in_header *in = buf->mem;
    const struct fuse_init_in *init = (const void *)(in + 1);
    return buf->flags == 0 && buf->size >= sizeof *in && in->opcode == FUSE_INIT &&
           buf->size >= sizeof *in + offsetof(struct fuse_init_in, flags2) + sizeof init->flags2 &&
           init->flags & FUSE_INIT_EXT && init->flags2 & ALLOW_MMAP;
}

/* Have `fd`, which is libfuse's, lead to where `other` does; `other` is closed. */
static void redirect(int fd, int other)
{
    while (dup3(other, fd, O_CLOEXEC) < 0 && (errno == EINTR || errno == EBUSY))
        ;
    close(other);
}

static void send_answer(int fd, struct answer *answer, size_t size)
{
    const struct answer given = *answer;
    if (answer->header.error == 0 && size >= sizeof answer->header + sizeof answer->init) {
        answer->init.flags |= FUSE_INIT_EXT;
        answer->init.flags2 |= ALLOW_MMAP;
        if (write(fd, answer, size) >= 0) {
            direct_maps = true;
            return;
        }
    }
    while (write(fd, &given, size) < 0 && errno == EINTR)
        ;
}

/* In front of libfuse's function of this name; called by pyfuse3, with the GIL. */
EXPORTED void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *buf);

EXPORTED void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *buf)
{
    int pipes[2], fd = libfuse.session_fd(session), kernel = -1;
    bool amends = wants_direct_maps && is_offered(buf) && pipe2(pipes, O_CLOEXEC | O_NONBLOCK) == 0;
    if (amends) {
        kernel = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (kernel >= 0) {
            redirect(fd, pipes[1]);
        } else {
            amends = false;
            close(pipes[0]);
            close(pipes[1]);
        }
    }
    libfuse.process_buf(session, buf);
    if (amends) {
        struct answer answer;
        ssize_t size = read(pipes[0], &answer, sizeof answer);
        redirect(fd, kernel);
        close(pipes[0]);
        if (size > 0)
            send_answer(fd, &answer, (size_t)size);
    }
}
