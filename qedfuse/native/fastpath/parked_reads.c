/* A few places in which READs are kept, with what is needed to answer them. */

#include "parked_reads.h"
#include "counts.h"
#include "handover.h"
#include "reply.h"
#include "requests.h"

#include <errno.h>

enum {
    DISK_NS = 250 * 1000,
    PARKED = 16,
};

static struct parked {
    struct fuse_in_header in;
    struct fuse_read_in arg;
    int64_t end; /* when it goes to Python, in ns */
} parked[PARKED];
unsigned parking;
struct pace disk;

bool park(struct burst *burst)
{
    if (parking == PARKED || !spinning || in_python || !pace_try(&disk))
        return false;
    const struct fuse_in_header *in = burst->request; /* a READ: nothing else waits */
    struct parked *place = &parked[parking++];
    place->in = *in;
    memcpy(&place->arg, in + 1, sizeof place->arg);
    place->end = now() + DISK_NS;
    return true;
}

enum outcome retry_parked(struct burst *burst)
{
    enum outcome result = DONE;
    for (unsigned i = 0; i < parking;) {
        struct parked place = parked[i];
        bool late = now() >= place.end;
        enum outcome outcome = answer_read(burst, &place.in, &place.arg);
        if (outcome == WAIT && !late) {
            i++;
            continue;
        }
        pace_note(&disk, outcome == DONE);
        parked[i] = parked[--parking];
        if (outcome != DONE) {
            count.missed++;
            if (hand_read(burst, &place.in, &place.arg, false) == PASS)
                reply(burst->fd, place.in.unique, -EIO, 0);
            result = HANDED;
        }
    }
    return result;
}
