/*
 * Reads that wait for the disk.
 *
 * The host has begun to read what they miss (RWF_NOWAIT starts readahead), and a fast disk has it in less time than a
 * thread takes to wake: they are tried again and again, for a moment.
 */
#ifndef QEDFUSE_PARKED_READS_H
#define QEDFUSE_PARKED_READS_H

#include "burst.h"
#include "pace.h"

/* A READ that could not be answered (WAIT) is tried again by `retry_parked`. False: it had better not. */
bool park(struct burst *burst);

extern unsigned parking; /* how many there are; none when a burst is over */
extern struct pace disk; /* of waits for it */

/* Tries each of them again. Those whose time is over, or that meet anything else, go to Python: HANDED. */
enum outcome retry_parked(struct burst *burst);

#endif
