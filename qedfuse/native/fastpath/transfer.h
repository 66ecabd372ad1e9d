/* Reading and writing ranges of an image, in as few system calls as there are runs in its file. */
#ifndef QEDFUSE_TRANSFER_H
#define QEDFUSE_TRANSFER_H

#include "burst.h"

enum outcome read_image(struct burst *burst, const Layer *top, uint64_t offset, uint64_t size, char *memory);

/* Nothing is written in place unless all of the range has clusters of its own in the top layer. */
enum outcome write_image(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory);

#endif
