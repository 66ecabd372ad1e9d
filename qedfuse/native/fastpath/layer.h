/* An image of a chain as C sees it, and the mapping in its tables. */
#ifndef QEDFUSE_LAYER_H
#define QEDFUSE_LAYER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "index.h"

enum {
    BURST_REQUESTS = 64, /* that are answered before Python has its turn */
    MAX_CLUSTER_BITS = 26,
    MAX_DEPTH = 200, /* layers in a chain */
    MAX_TABLE_BITS = 27,
    PAGE = 4096,
    PAGE_BITS = 9, /* table entries in a page, as a power of two */
    PAGE_ENTRIES = 1 << PAGE_BITS,
};

/* Where the pages of one table level are, told by table_pages.PageMap. */
typedef struct {
    PyObject_HEAD
    struct index pages;
} PageIndex;

extern PyTypeObject PageIndexType;

/* One image of a chain: what `view.h` has fetched of it, and what it has not told yet. */
typedef struct Layer {
    PyObject_HEAD
    /* what stays */
    PyObject *view;          /* qed.native_view.NativeView; NULL: a raw file, or opaque */
    PageIndex *l1, *l2;      /* if there is a view */
    struct Layer *below;     /* NULL: zeroes */
    int fd;                  /* -1: opaque, all that it has is Python's business */
    uint64_t data_start;     /* bytes: no cluster lies before it in the file */
    uint64_t l1_offset;      /* bytes: of the L1 table in the file */
    unsigned cluster_bits;   /* log2 of bytes */
    unsigned table_bits;     /* log2 of entries */
    /* what `view_refresh` fetches */
    uint64_t burst;          /* when it did last */
    uint64_t size;           /* bytes that the guest sees */
    uint64_t file_end;       /* bytes: every cluster ends before it in the file */
    bool writable;           /* clusters may be overwritten */
    uint64_t free, free_end; /* bytes of the file: clusters that may be taken, from the first on */
    /* what `view_tell` tells */
    bool dirty;              /* something was written */
    uint64_t taken, lost;    /* bytes of clusters; `lost`, the last of them, hold what was left of a write */
    uint64_t filled;         /* bytes that the guest has written into the clusters taken */
    unsigned pages;          /* L2 pages in which entries were set */
    uint64_t page[BURST_REQUESTS];
} Layer;

extern PyTypeObject LayerType;
extern PyTypeObject SyncerType;

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
