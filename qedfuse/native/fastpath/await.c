/* Without a request, the filter polls for the next one, then it sleeps for a moment. */

#include "await.h"

#include <errno.h>
#include <poll.h>

enum {
    SPIN_NS = 200 * 1000, /* a client on a virtual processor that sleeps needs 100 to ask again */
    WAIT_NS = 500 * 1000,
};

struct pace spins;

/* Receives for a moment, until there is a request. No sched_yield: a task that yields often must wait. */
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
