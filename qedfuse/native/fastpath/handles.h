/* Open files whose requests are answered. */
#ifndef QEDFUSE_HANDLES_H
#define QEDFUSE_HANDLES_H

#include "burst.h"

struct handle {
    Layer *layer;  /* NULL: suspended */
    bool writable; /* writes are answered, too */
};

/* NULL: the file is Python's business. */
const struct handle *handle_find(uint64_t fh);

/* The handle's layer with its numbers as they are now, or NULL. */
Layer *current_layer(struct burst *burst, const struct handle *handle);

/* Requests for the handle `fh` are answered, from this layer from now on. NULL: READs and WRITEs are passed to pyfuse3
 * for now, what is handed over still is. Needs the GIL. False: no memory, which only a handle that is new needs. */
bool attach(uint64_t fh, Layer *layer, bool writable);

/* They no longer are, if they were. Needs the GIL. */
void detach(uint64_t fh);

#endif
