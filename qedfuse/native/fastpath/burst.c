/* When Python has its turn, and what it must be told before. */

#include "burst.h"
#include "view.h"

static uint64_t bursts;

void burst_begin(struct burst *burst, int fd)
{
    *burst = (struct burst){.number = ++bursts, .fd = fd};
}

void burst_renew(struct burst *burst)
{
    burst->number = ++bursts;
}

void take_gil(struct burst *burst)
{
    if (burst->thread)
        PyEval_RestoreThread(burst->thread);
    burst->thread = NULL;
}

void release_gil(struct burst *burst)
{
    burst->thread = PyEval_SaveThread();
}

bool note_write(struct burst *burst, Layer *layer)
{
    if (!layer->dirty) {
        if (burst->writes == sizeof burst->wrote / sizeof *burst->wrote)
            return false;
        burst->wrote[burst->writes++] = layer; /* no reference: only Python detaches, and is told before it runs */
        layer->dirty = true;
    }
    return true;
}

void tell_writes(struct burst *burst)
{
    while (burst->writes)
        view_tell(burst->wrote[--burst->writes]);
}
