/* Writing into new clusters. */
#ifndef QEDFUSE_ALLOCATE_H
#define QEDFUSE_ALLOCATE_H

#include "burst.h"

/*
 * Writes into clusters that have no data yet, all of one run and one table page, as ClusterWriter._write_unmapped does:
 * head, data and tail go to clusters that Python offers, and then the entries are set, which Python brings to the file
 * (commit.py). Passes whatever is not that simple.
 */
enum outcome write_new(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory);

#endif
