/* Requests that Python answers past pyfuse3: one method of one object for each kind. */
#ifndef QEDFUSE_HANDOVER_H
#define QEDFUSE_HANDOVER_H

#include "burst.h"

#include <linux/fuse.h>

/* To be called once. False: an exception. */
bool hand_prepare(void);

/* The object: fuse.bypass.HandOver, or NULL. Needs the GIL. */
void hand_to(PyObject *handlers);

/* The arguments of its methods, which reply, now or later, and return whether they have. DONE, HANDED; PASS: nothing is
 * handed, or not for this handle. */
enum outcome hand_read(struct burst *burst, const struct fuse_in_header *in, const struct fuse_read_in *arg,
                       bool to_end);
enum outcome hand_open(struct burst *burst, const struct fuse_in_header *in, const struct fuse_open_in *arg);
enum outcome hand_fsync(struct burst *burst, const struct fuse_in_header *in, const struct fuse_fsync_in *arg);
enum outcome hand_fallocate(struct burst *burst, const struct fuse_in_header *in, const struct fuse_fallocate_in *arg);
enum outcome hand_seek(struct burst *burst, const struct fuse_in_header *in, const struct fuse_lseek_in *arg);

#endif
