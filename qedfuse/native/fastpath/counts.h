/* What the filter has done since the module was loaded. */
#ifndef QEDFUSE_COUNTS_H
#define QEDFUSE_COUNTS_H

#include <stdint.h>

extern struct counts {
    uint64_t calls;  /* of the filter: 0 means not bound */
    uint64_t reads;  /* answered here, or past pyfuse3 */
    uint64_t writes; /* answered here */
    uint64_t syncs;  /* answered past pyfuse3 */
    uint64_t opens;  /* answered past pyfuse3 */
    uint64_t passed; /* to pyfuse3, of any kind */
    uint64_t missed; /* reads and writes that Python got for the host's page cache or the host */
    uint64_t handed; /* to Python, past pyfuse3 */
} count;

#endif
