/* The pace at which waits are tried. */

#include "pace.h"

#include <time.h>

enum { PAUSE_MAX = 63 };

bool spinning = true;
unsigned in_python;

int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
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
