/* An image of a chain as C sees it, and the mapping in its tables. */
#ifndef QEDFUSE_LAYER_H
#define QEDFUSE_LAYER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "index.h"

enum {
    BURST_REQUESTS = 64, /* that are answered before Python has its turn */
    MAX_DEPTH = 200, /* layers in a chain */
    PAGE = 4096,
    PAGE_BITS = 9, /* table entries in a page, as a power of two */
    PAGE_ENTRIES = 1 << PAGE_BITS,
};

/* Where the pages of one table level are, told by pages.PageMap. */
typedef struct {
    PyObject_HEAD
    struct index pages;
} PageIndex;

extern PyTypeObject PageIndexType;

/* One image of a chain. */
typedef struct Layer {
    PyObject_HEAD
    int fd;                         /* -1: opaque, all that it has is Python's business */
    uint64_t size;                  /* bytes that the guest sees */
    uint64_t file_end, data_start;  /* where clusters may lie in the file */
    uint64_t l1_offset;             /* of the L1 table in the file */
    unsigned cluster_bits;          /* log2 of bytes */
    unsigned table_bits;            /* log2 of entries */
    PageIndex *l1, *l2;             /* NULL: a raw file */
    struct Layer *below;            /* NULL: zeroes */
    PyObject *state;                /* callable() -> (size, file_end, writable, free, free_end), or NULL: as above */
    PyObject *loaded;               /* callable(is_l1, number, host, page): a table page was read; whether it is taken */
    PyObject *wrote;                /* callable(first, taken, lost, filled, pages): something was written */
    uint64_t free, free_end;        /* bytes of the file: clusters that may be taken, from the first on */
    bool writable;
    uint64_t burst; /* the one that has fetched `state` */
    /* what Python has not been told yet */
    bool dirty;
    uint64_t taken, lost;            /* bytes of clusters; `lost`, the last of them, hold what was left of a write */
    uint64_t filled;                 /* bytes that the guest has written into the clusters taken */
    unsigned pages;                  /* L2 pages in which entries were set */
    uint64_t page[BURST_REQUESTS];
} Layer;

extern PyTypeObject LayerType;
extern PyTypeObject SyncerType;

/* Asks Python for the numbers that change, which must know of all writes. False: they are not known. Needs the GIL. */
bool layer_refresh(Layer *layer);

/* Tells Python what was done to an image. Needs the GIL. */
void layer_tell(Layer *layer);

enum kind {
    UNALLOCATED = 0, /* as in the tables */
    ZERO = 1,        /* as in the tables */
    DATA,
    ABSENT,  /* a table page is not in memory */
    UNKNOWN, /* Python's business */
};

/* The run at `offset`, which lies inside the layer, of at most *length bytes; *length is cut to where it ends. */
enum kind layer_run(const Layer *layer, uint64_t offset, uint64_t *length, uint64_t *host);

/* The same through the chain: DATA or ABSENT in *owner, or ZERO, or UNKNOWN. */
enum kind chain_run(const Layer *layer, uint64_t offset, uint64_t *length, uint64_t *host, const Layer **owner);

/* The table page that is missing at `offset`: which one it is, and where in the file. False: it can be nowhere. */
bool layer_missing(const Layer *layer, uint64_t offset, bool *is_l1, uint64_t *number, uint64_t *host);

#endif
