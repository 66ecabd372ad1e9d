/* Requests of the kernel, and their answers. */
#ifndef QEDFUSE_REQUESTS_H
#define QEDFUSE_REQUESTS_H

#include "receive.h"

/* Since the module was loaded. */
extern struct counts {
    uint64_t calls;  /* of the filter: 0 means not bound */
    uint64_t reads;  /* answered here */
    uint64_t writes; /* answered here */
    uint64_t passed; /* to pyfuse3, of any kind */
    uint64_t missed; /* reads and writes that Python got for the host's page cache or the host */
    uint64_t handed; /* to Python, past pyfuse3 */
} count;

extern struct pace disk; /* for the disk */

extern bool spinning;       /* may wait for what will be there in a moment */
extern unsigned in_python;  /* requests that Python is working on */
extern uint64_t bursts;     /* numbers them; a new number has the numbers that live in Python fetched anew */
extern PyObject *hand_over; /* callable(session_fd, opcode, unique, nodeid, fh, offset, length, mode) -> answered, or NULL */

/* `size` bytes of request, which stay as they are. DONE: it has been answered. */
enum outcome answer(struct burst *burst, void *request, size_t size);

/* A READ that could not be answered (WAIT) is tried again by `retry_parked`. False: it had better not. */
bool park(struct burst *burst);

extern unsigned parking; /* how many there are; none when a burst is over */

/* HANDED: Python should have its turn. */
enum outcome retry_parked(struct burst *burst);

/* Requests for the handle `fh` are answered. Needs the GIL. False: no memory. */
bool attach(uint64_t fh, Layer *layer, bool writable);

/* They no longer are, if they were. Needs the GIL. */
void detach(uint64_t fh);

#endif
