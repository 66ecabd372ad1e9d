/* Whether it pays to wait for something, as far as is known. */
#ifndef QEDFUSE_PACE_H
#define QEDFUSE_PACE_H

#include <stdbool.h>
#include <stdint.h>

struct pace {
    unsigned pause;  /* chances that are let pass after a wait in vain: more with each one, up to a limit */
    unsigned waited; /* of these, so many are over */
    uint64_t tries;
    uint64_t met; /* of these, so many were not in vain */
};

bool pace_try(struct pace *pace);
void pace_note(struct pace *pace, bool met);

extern bool spinning;      /* may wait for what will be there in a moment */
extern unsigned in_python; /* requests that Python is working on: then nothing is waited for */

int64_t now(void); /* nanoseconds */

#endif
