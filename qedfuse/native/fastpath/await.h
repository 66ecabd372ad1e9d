/* Waiting for the next request. */
#ifndef QEDFUSE_AWAIT_H
#define QEDFUSE_AWAIT_H

#include "receive.h"

#include "pace.h"

extern struct pace spins; /* of waits for it */

/* As `receive`, and waits for a moment if it seems worth it. */
int await_and_receive(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf);

#endif
