/* What Python can set and see of the filter. */
#ifndef QEDFUSE_FILTER_H
#define QEDFUSE_FILTER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

extern bool enabled;    /* false: every request is passed */
extern bool writeback;  /* the kernel gathers writes: for a while a file may be longer than its image */
extern bool sync_asked; /* the request that was passed last is a WRITE to be durable when it is answered */

#endif
