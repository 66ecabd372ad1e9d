/*
 * The fast path: a request filter in front of pyfuse3. receive.c takes requests from the kernel; requests.c tells them
 * apart; handles.c knows their images; layer.c where an image's bytes are; transfer.c and allocate.c read and write
 * them, by batch.c; reply.c answers, parked_reads.c later, handover.c by way of Python; negotiate.c amends what libfuse
 * agrees on with the kernel; view.c is what C knows of an image in Python, module.c what Python knows of C.
 *
 * How it gets there. This module defines `fuse_session_receive_buf`, the libfuse function by which pyfuse3 takes a
 * request from the kernel. It is loaded with RTLD_GLOBAL before pyfuse3, so the dynamic linker binds pyfuse3's call to
 * it. `bind` looks the real function up behind pyfuse3's own library, which finds exactly the libfuse that pyfuse3
 * uses. If a linker does not do us the favour, the function below is never called (`counters()["calls"]` stays 0) and
 * everything works as if this file did not exist.
 *
 * What it does. It reads requests from the session's descriptor. READs, WRITEs that overwrite allocated clusters, and
 * most WRITEs into new ones it answers at once and goes on to the next request (a *burst*). FALLOCATE and LSEEK, for
 * which pyfuse3 has no handlers, OPEN, whose reply lacks a flag there, and FSYNC, which is quicker this way, it hands
 * to Python (bypass.py). The first request that is anything else ends the burst and is returned to pyfuse3 untouched.
 * At the end of a burst without such a request it returns -EINTR, upon which pyfuse3 waits for the descriptor as it
 * always does. The GIL is released but for the moments when Python is asked or told something.
 *
 * What it never does: choose clusters, bring a table to the file, block on a disk, report an error. Whatever is not
 * plainly fine (an entry that points nowhere, data that the host does not come up with, a failed write) goes to Python,
 * whose behaviour is the reference: it does the request again from its start and owns the outcome. A write that failed
 * half-way and is done again is the same write.
 *
 * Cold data. preadv2 with RWF_NOWAIT does not wait for the disk, but has the host begin to read, and a fast disk is
 * done in less time than it takes to wake a thread. A READ that meets this is parked and tried again, between other
 * requests, until it is answered or its moment is over and Python gets it. If that happens often, the disk is slow, and
 * fewer are parked. No burst ends with one parked. A table page that is not in memory is read the same way and put into
 * Python's pool if Python agrees (`NativeView.take_l2_page`), which it does not while it is reading that page itself.
 *
 * New clusters. Python offers a run of them, all of which read as zeroes and lie inside the file, whenever no range is
 * locked (native_view.py, `refresh`). They are taken from the front: data first, with what the layers below have around
 * it, then the entries in the page in memory. Python is told how many were taken and which pages have changed, before
 * it runs again (`note_taken`), so for allocator.py and commit.py it is as if Python had done it. A cluster whose write
 * failed is told of as lost: what is in it must not show up in anything else. Both sides check: the numbers are not
 * asked for while there is something to tell, and what is told must be what was offered.
 *
 * Why the mapping cannot change under it. The tables have one place, the page pool of table_pages.py; this file reads
 * the entries there, by way of an index (page number -> address) that table_pages.py keeps up to date. Python changes
 * tables, and the pool moves pages, only on the thread that runs trio, and this function is called by pyfuse3 on that
 * thread: until it returns, nothing else runs there, whichever thread has the GIL. The worker threads that may run
 * meanwhile make system calls on the host files (a slow read, a commit's fdatasync, a punch) and touch no table. So
 * what is done here is atomic for the engine, just as the engine's own `_nowait` functions are, and is right for the
 * same reasons. The two times that Python does something in a burst, a table page coming in and a request handed over,
 * it is told of writes first, and no pointer to a page is kept across.
 *
 * Numbers that live in Python objects (image size, end of the file, whether it may be written) are fetched once in a
 * burst, before the first request to an image is looked at, and again after a request was handed over. That something
 * was written is told to Python before the function returns, hence before any flush or sync can begin.
 *
 * How long it stays: at most BURST_REQUESTS requests or BURST_NS, a fraction of that while Python is known to have
 * requests of its own to work on; then trio's other tasks have their turn. When the queue becomes empty the next
 * request is awaited (await.c) by polling for SPIN_NS: a lone reader, which asks again when it is answered, is served
 * without a trip through the event loop. After a spin in vain ever more chances to spin are let pass, so that it costs
 * little where it does not pay off. Then it sleeps for WAIT_NS at most, which costs nothing and is still quicker than
 * the event loop. Neither happens while Python has requests to work on; an idle mount does neither, as there is nothing
 * to answer before.
 *
 * Sources: linux/fuse.h (wire format), preadv2(2), QEMU docs/interop/qed_spec (tables).
 */

#include "filter.h"
#include "await.h"
#include "counts.h"
#include "parked_reads.h"
#include "receive.h"
#include "requests.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>

enum {
    BURST_NS = 2000 * 1000,
    BUSY_BURST_NS = 250 * 1000, /* while Python works on requests, too */
};

bool enabled;
bool writeback;
bool sync_asked;

/* The next request, awaited for a moment. */
static int next_request(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf, bool busy)
{
    int result = -EINTR;
    do {
        if (retry_parked(burst) == HANDED)
            break;
        result = parking || busy || !spinning ? receive(burst, session, buf) : await_and_receive(burst, session, buf);
    } while (result == -EINTR && parking);
    return result;
}

/* Is the request a WRITE that must be durable when it is answered? If it cannot be seen, it may be one. */
static bool asks_for_sync(const struct burst *burst, size_t size)
{
    const struct fuse_in_header *in = burst->request;
    if (!in)
        return true;
    const struct fuse_write_in *write = (const void *)(in + 1);
    return in->opcode == FUSE_WRITE && size >= sizeof *in + sizeof *write && write->flags & O_DSYNC;
}

static int do_burst(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int64_t start = now();
    bool busy = in_python > 0;
    int64_t limit = start + (busy ? BUSY_BURST_NS : BURST_NS);
    int result = receive(burst, session, buf);
    for (int requests = 1; result > 0; requests++) {
        enum outcome outcome = burst->request ? answer(burst, burst->request, (size_t)result) : PASS;
        if (outcome == WAIT && park(burst))
            outcome = DONE;
        if (outcome == PASS || outcome == MISS || outcome == WAIT) {
            count.passed++;
            count.missed += outcome != PASS;
            sync_asked = asks_for_sync(burst, (size_t)result);
            pass(burst, buf, (size_t)result);
            break;
        }
        result = -EINTR;
        if (outcome == HANDED || requests == BURST_REQUESTS || now() >= limit)
            break;
        result = next_request(burst, session, buf, busy);
    }
    while (parking)
        retry_parked(burst);
    return result;
}

/* In front of libfuse's function of this name; called by pyfuse3, with the GIL, on the thread that runs trio. */
EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf);

EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
    static int prepared = -1;
    Dl_info caller; /* `bind` has failed: the caller knows libfuse, and all goes on as without us */
    if (!libfuse.receive_buf && dladdr(__builtin_return_address(0), &caller))
        find_libfuse(caller.dli_fname);
    if (!libfuse.receive_buf)
        return -ENOSYS;
    count.calls++;
    struct burst burst;
    burst_begin(&burst, libfuse.session_fd(session));
    if (burst.fd != prepared) {
        /* A request may be withdrawn between poll and read: the read must not wait for the next one. */
        int flags = fcntl(burst.fd, F_GETFL);
        if (flags >= 0)
            fcntl(burst.fd, F_SETFL, flags | O_NONBLOCK);
        prepared = burst.fd;
    }
    if (!enabled) {
        int result = receive_by_libfuse(&burst, session, buf);
        count.passed += result > 0;
        return result;
    }
    release_gil(&burst);
    int result = do_burst(&burst, session, buf);
    take_gil(&burst);
    tell_writes(&burst);
    return result;
}
