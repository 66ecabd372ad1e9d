/* What is agreed with the kernel beyond what libfuse knows of. */
#ifndef QEDFUSE_NEGOTIATE_H
#define QEDFUSE_NEGOTIATE_H

#include <stdbool.h>

/* Whether it is to be asked for, if the kernel offers it. */
extern bool wants_direct_maps;

/* Whether files that are open past the kernel's cache can be mapped shared (FUSE_DIRECT_IO_ALLOW_MMAP). Known when INIT
 * was answered. */
extern bool direct_maps;

#endif
