/*
 * The fast path: a request filter in front of pyfuse3.
 *
 * How it gets there. This module defines `fuse_session_receive_buf`, the libfuse function by which pyfuse3 takes a
 * request from the kernel. It is loaded with RTLD_GLOBAL before pyfuse3, so the dynamic linker binds pyfuse3's call to
 * it. `bind` looks the real function up behind pyfuse3's own library, which finds exactly the libfuse that pyfuse3
 * uses. If a linker does not do us the favour, the function below is never called (`counters()["calls"]` stays 0) and
 * everything works as if this file did not exist.
 *
 * What it does. It reads requests from the session's descriptor. READs, WRITEs that overwrite allocated clusters, and
 * most WRITEs into new ones it answers at once and goes on to the next request (a *burst*); FALLOCATE and LSEEK, for which pyfuse3 has no
 * handlers, it hands to a Python callable; the first request that is anything else ends the burst and is returned to
 * pyfuse3 untouched. At the end of a burst without such a request it returns -EINTR, upon which pyfuse3 waits for the
 * descriptor as it always does. The GIL is released but for the moments when Python is asked or told something.
 *
 * What it never does: choose clusters, bring a table to the file, wait for a disk to read, report an error. Whatever is not plainly fine
 * (a table page that is not in memory, an entry that points nowhere, data that is not in the host's page cache, a
 * failed or short read or write) goes to Python, whose behaviour is the reference: it does the request again from its
 * start and owns the outcome. A write that failed half-way and is done again is the same write.
 *
 * New clusters. Python offers a run of them, all of which read as zeroes and lie inside the file, whenever nobody holds a
 * lock on a range (image.py, `state`). They are taken from the front: data first, with what the layers below have around
 * it, then the entries in the page in memory. Python is told how many were taken and which pages have changed, before
 * it runs again (`note_written`), so for allocator.py and commit.py it is as if Python had done it. A cluster whose write
 * failed is told of as lost: what is in it must not show up in anything else.
 *
 * Why the mapping cannot change under it. The tables have one place, the page pool of pages.py; this file reads the
 * entries there, by way of an index (page number -> address) that pages.py keeps up to date. Python changes tables,
 * and the pool moves pages, only on the thread that runs trio, and this function is called by pyfuse3 on that thread:
 * until it returns, nothing else runs there, whoever has the GIL. The worker threads that may run meanwhile make system
 * calls on the host files (a slow read, a commit's fdatasync, a punch) and touch no table. So what is done here is
 * atomic for the engine, just as the engine's own `_nowait` functions are, and is right for the same reasons. Numbers
 * that live in Python objects (image size, end of the file, whether it may be written) are fetched once in a burst,
 * before the first request to an image is looked at. That something was written is told to Python before the function
 * returns, hence before any flush or sync can begin.
 *
 * How long it stays: at most BURST_REQUESTS requests or BURST_NS, a fraction of that while Python is known to have
 * requests of its own to work on; then trio's other tasks have their turn. When the queue becomes empty the next request
 * is awaited by polling for SPIN_NS: a lone reader that waits for one answer before it asks again is served without a
 * trip through the event loop. After a spin in vain ever more chances to spin are let pass, so that it costs little where
 * it does not pay off. Then it sleeps for WAIT_NS at most, which costs nothing and is still quicker than the event loop
 * (a writer of 1 MiB needs more than a spin's time between two requests). Neither happens while Python has requests to
 * work on; an idle mount does neither, as there is nothing to answer before.
 *
 * Sources: linux/fuse.h (wire format), preadv2(2), QEMU docs/interop/qed_spec (tables).
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <malloc.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

enum {
    BURST_REQUESTS = 64,
    BURST_NS = 2000 * 1000,
    BUSY_BURST_NS = 250 * 1000, /* while Python works on requests, too */
    SPIN_NS = 50 * 1000,
    WAIT_NS = 500 * 1000,
    PAUSE_MAX = 63,
    MAX_IO = 1 << 20, /* a request's data: the most that the kernel asks for (256 pages) */
    MAX_DEPTH = 200,  /* layers in a chain */
    MAX_IOV = 64,
    PAGE = 4096,
    PAGE_BITS = 9, /* table entries in a page, as a power of two */
    PAGE_ENTRIES = 1 << PAGE_BITS,
};

/* -- libfuse -------------------------------------------------------------------------------------------------------- */

struct fuse_session; /* opaque */

/* The beginning of libfuse 3's struct (fuse_common.h), the same in all its releases. */
struct fuse_buf {
    size_t size;
    int flags; /* 2: the data is in the pipe `fd`, not in `mem` */
    void *mem; /* owned by pyfuse3's task, allocated by libfuse */
    int fd;
    off_t pos;
};
#define BUF_IS_FD 2

static int (*real_receive_buf)(struct fuse_session *, struct fuse_buf *);
static int (*session_fd)(struct fuse_session *);

/* -- what Python can see of us -------------------------------------------------------------------------------------- */

static struct {
    uint64_t calls;  /* of the function below: 0 means not bound */
    uint64_t reads;  /* answered here */
    uint64_t writes; /* answered here */
    uint64_t passed; /* to pyfuse3, of any kind */
    uint64_t missed; /* of these, reads and writes that failed for the host's page cache or the host */
    uint64_t handed; /* FALLOCATE and LSEEK */
    uint64_t spins;
    uint64_t spun; /* spins that met a request */
} count;

static bool enabled;       /* false: every request is passed */
static bool spinning = true; /* may poll, and sleep, for the next request */
static unsigned in_python; /* requests that Python is working on */
static PyObject *hand_over; /* callable(session_fd, opcode, unique, nodeid, fh, offset, length, mode) or NULL */

/* -- index: numbers to pointers, open addressing ---------------------------------------------------------------------- */

struct index {
    uint64_t *keys;
    void **values; /* NULL: a free place */
    size_t mask, used;
};

static size_t index_home(const struct index *index, uint64_t key)
{
    return (size_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & index->mask;
}

/* The place of a key, or the free place where it belongs. */
static size_t index_place(const struct index *index, uint64_t key)
{
    size_t place = index_home(index, key);
    while (index->values[place] && index->keys[place] != key)
        place = (place + 1) & index->mask;
    return place;
}

static void *index_get(const struct index *index, uint64_t key)
{
    return index->used ? index->values[index_place(index, key)] : NULL;
}

static bool index_resize(struct index *index, size_t places)
{
    struct index grown = {calloc(places, sizeof(uint64_t)), calloc(places, sizeof(void *)), places - 1, index->used};
    if (!grown.keys || !grown.values) {
        free(grown.keys);
        free(grown.values);
        return false;
    }
    for (size_t i = 0; index->values && i <= index->mask; i++) {
        if (!index->values[i])
            continue;
        size_t place = index_place(&grown, index->keys[i]);
        grown.keys[place] = index->keys[i];
        grown.values[place] = index->values[i];
    }
    free(index->keys);
    free(index->values);
    *index = grown;
    return true;
}

/* Adds or replaces. Returns false without memory. */
static bool index_set(struct index *index, uint64_t key, void *value)
{
    if ((!index->values || index->used * 2 > index->mask) &&
        !index_resize(index, index->values ? (index->mask + 1) * 2 : 16))
        return false;
    size_t place = index_place(index, key);
    index->used += !index->values[place];
    index->keys[place] = key;
    index->values[place] = value;
    return true;
}

/* Returns what was there. Moves those back that a search would no longer find behind the gap. */
static void *index_drop(struct index *index, uint64_t key)
{
    if (!index->used)
        return NULL;
    size_t gap = index_place(index, key);
    void *value = index->values[gap];
    if (!value)
        return NULL;
    index->used--;
    for (size_t next = (gap + 1) & index->mask; index->values[next]; next = (next + 1) & index->mask) {
        size_t home = index_home(index, index->keys[next]);
        if (((next - home) & index->mask) >= ((next - gap) & index->mask)) {
            index->keys[gap] = index->keys[next];
            index->values[gap] = index->values[next];
            gap = next;
        }
    }
    index->values[gap] = NULL;
    return value;
}

static void index_clear(struct index *index)
{
    free(index->keys);
    free(index->values);
    memset(index, 0, sizeof *index);
}

/* -- PageIndex: where the pages of one table level are, told by pages.PageMap ------------------------------------------ */

typedef struct {
    PyObject_HEAD
    struct index pages;
} PageIndex;

static PyObject *page_index_insert(PyObject *self, PyObject *args)
{
    unsigned long long number;
    Py_buffer page;
    if (!PyArg_ParseTuple(args, "Ky*:insert", &number, &page))
        return NULL;
    void *address = page.buf; /* stays where it is until `drop`: the pool's memory, which the image keeps alive */
    Py_ssize_t size = page.len;
    PyBuffer_Release(&page);
    if (size != PAGE || (uintptr_t)address % sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "not a table page");
        return NULL;
    }
    if (!index_set(&((PageIndex *)self)->pages, number, address))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *page_index_drop(PyObject *self, PyObject *number)
{
    unsigned long long key = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    index_drop(&((PageIndex *)self)->pages, key);
    Py_RETURN_NONE;
}

static Py_ssize_t page_index_length(PyObject *self)
{
    return (Py_ssize_t)((PageIndex *)self)->pages.used;
}

static int page_index_contains(PyObject *self, PyObject *number)
{
    unsigned long long key = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return -1;
    return index_get(&((PageIndex *)self)->pages, key) != NULL;
}

static void page_index_dealloc(PyObject *self)
{
    index_clear(&((PageIndex *)self)->pages);
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef page_index_methods[] = {
    {"insert", page_index_insert, METH_VARARGS, "insert(number, page): a table page of 4 KiB is at this address."},
    {"drop", page_index_drop, METH_O, "drop(number): it is no longer."},
    {NULL, NULL, 0, NULL},
};

static PySequenceMethods page_index_sequence = {.sq_length = page_index_length, .sq_contains = page_index_contains};

static PyTypeObject PageIndexType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse._fastpath.PageIndex",
    .tp_doc = "Where the pages of one level of tables are in memory.",
    .tp_basicsize = sizeof(PageIndex),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = page_index_dealloc,
    .tp_methods = page_index_methods,
    .tp_as_sequence = &page_index_sequence,
};

/* -- Layer: one image of a chain --------------------------------------------------------------------------------------- */

typedef struct Layer {
    PyObject_HEAD
    int fd;                         /* -1: opaque, all that it has is Python's business */
    uint64_t size;                  /* bytes that the guest sees */
    uint64_t file_end, data_start;  /* where clusters may lie in the file */
    unsigned cluster_bits;          /* log2 of bytes */
    unsigned table_bits;            /* log2 of entries */
    PageIndex *l1, *l2;             /* NULL: a raw file */
    struct Layer *below;            /* NULL: zeroes */
    PyObject *state;                /* callable() -> (size, file_end, writable, free, free_end), or NULL: as above */
    PyObject *wrote;                /* callable(taken, lost, pages): something was written */
    uint64_t free, free_end;        /* bytes of the file: clusters that may be taken, from the first on */
    bool writable;
    uint64_t burst; /* the one that has fetched `state` */
    /* what Python has not been told yet */
    bool dirty;
    uint64_t taken, lost;            /* bytes of clusters; `lost`, the last of them, hold what was left of a write */
    unsigned pages;                  /* L2 pages in which entries were set */
    uint64_t page[BURST_REQUESTS];
} Layer;

static PyTypeObject LayerType;

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"fd", "size", "file_end", "data_start", "cluster_bits", "table_bits", "l1",
                            "l2", "below", "state", "wrote", NULL};
    int fd;
    unsigned long long size, file_end = 0, data_start = 0;
    unsigned cluster_bits = 0, table_bits = 0;
    PyObject *l1 = Py_None, *l2 = Py_None, *below = Py_None, *state = Py_None, *wrote = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iK|$KKIIOOOOO:Layer", names, &fd, &size, &file_end, &data_start,
                                     &cluster_bits, &table_bits, &l1, &l2, &below, &state, &wrote))
        return NULL;
    bool raw = l1 == Py_None && l2 == Py_None;
    if ((!raw && (!PyObject_TypeCheck(l1, &PageIndexType) || !PyObject_TypeCheck(l2, &PageIndexType))) ||
        (below != Py_None && !PyObject_TypeCheck(below, &LayerType)) || cluster_bits > 26 || table_bits > 27) {
        PyErr_SetString(PyExc_TypeError, "not a layer");
        return NULL;
    }
    Layer *self = (Layer *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->fd = fd;
    self->size = size;
    self->file_end = file_end;
    self->data_start = data_start;
    self->cluster_bits = cluster_bits;
    self->table_bits = table_bits;
    if (!raw) {
        self->l1 = (PageIndex *)Py_NewRef(l1);
        self->l2 = (PageIndex *)Py_NewRef(l2);
    }
    self->below = below == Py_None ? NULL : (Layer *)Py_NewRef(below);
    self->state = state == Py_None ? NULL : Py_NewRef(state);
    self->wrote = wrote == Py_None ? NULL : Py_NewRef(wrote);
    return (PyObject *)self;
}

/* Releases a chain in a loop: its length costs no stack. */
static void layer_dealloc(PyObject *object)
{
    Layer *self = (Layer *)object, *below = self->below;
    Py_XDECREF(self->l1);
    Py_XDECREF(self->l2);
    Py_XDECREF(self->state);
    Py_XDECREF(self->wrote);
    Py_TYPE(object)->tp_free(object);
    while (below && Py_REFCNT(below) == 1) {
        Layer *next = below->below;
        below->below = NULL;
        Py_DECREF(below);
        below = next;
    }
    Py_XDECREF(below);
}

static PyTypeObject LayerType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse._fastpath.Layer",
    .tp_doc = "Layer(fd, size, *, file_end, data_start, cluster_bits, table_bits, l1, l2, below, state, wrote)",
    .tp_basicsize = sizeof(Layer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = layer_new,
    .tp_dealloc = layer_dealloc,
};

/* Asks Python for the numbers that change. Needs the GIL. */
static bool layer_refresh(Layer *layer)
{
    unsigned long long size, file_end, free, free_end;
    int writable;
    PyObject *state = PyObject_CallNoArgs(layer->state);
    if (!state || !PyArg_ParseTuple(state, "KKpKK", &size, &file_end, &writable, &free, &free_end)) {
        Py_XDECREF(state);
        PyErr_WriteUnraisable(layer->state);
        return false;
    }
    Py_DECREF(state);
    layer->size = size;
    layer->file_end = file_end;
    layer->writable = writable;
    layer->free = free;
    layer->free_end = free_end;
    return true;
}

/* Tells Python what was done to an image. Needs the GIL. */
static void layer_tell(Layer *layer)
{
    PyObject *pages = PyTuple_New(layer->pages), *told = NULL;
    for (unsigned i = 0; pages && i < layer->pages; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(layer->page[i]);
        if (!number)
            Py_CLEAR(pages);
        else
            PyTuple_SET_ITEM(pages, i, number);
    }
    if (pages && layer->wrote)
        told = PyObject_CallFunction(layer->wrote, "KKO", (unsigned long long)layer->taken,
                                     (unsigned long long)layer->lost, pages);
    if (layer->wrote && !told)
        PyErr_WriteUnraisable(layer->wrote);
    Py_XDECREF(told);
    Py_XDECREF(pages);
    layer->dirty = false;
    layer->taken = layer->lost = 0;
    layer->pages = 0;
}

/* -- the mapping ------------------------------------------------------------------------------------------------------- */

enum kind {
    UNALLOCATED = 0, /* as in the tables */
    ZERO = 1,        /* as in the tables */
    DATA,
    UNKNOWN, /* Python's business */
};

/* The run at `offset`, which lies inside the layer, of at most *length bytes; *length is cut to where it ends. */
static enum kind layer_run(const Layer *layer, uint64_t offset, uint64_t *length, uint64_t *host)
{
    if (layer->fd < 0)
        return UNKNOWN;
    if (!layer->l1) {
        *host = offset;
        return DATA;
    }
    unsigned bits = layer->cluster_bits;
    uint64_t cluster = offset >> bits, skip = offset - (cluster << bits), end_cluster;
    const uint64_t *page = index_get(&layer->l2->pages, cluster >> PAGE_BITS);
    enum kind kind;
    if (page) {
        uint64_t wanted = (skip + *length + (UINT64_C(1) << bits) - 1) >> bits;
        unsigned first = cluster & (PAGE_ENTRIES - 1), stop = PAGE_ENTRIES, here = first + 1;
        if (wanted < stop - first)
            stop = first + (unsigned)wanted;
        uint64_t entry = page[first], step = entry > ZERO ? UINT64_C(1) << bits : 0;
        while (here < stop && page[here] == page[here - 1] + step)
            here++;
        end_cluster = cluster + (here - first);
        kind = entry > ZERO ? DATA : (enum kind)entry;
        if (kind == DATA) {
            uint64_t run = (uint64_t)(here - first) << bits;
            if (entry & (step - 1) || entry < layer->data_start || entry > layer->file_end ||
                run > layer->file_end - entry)
                return UNKNOWN;
            *host = entry + skip;
        }
    } else {
        uint64_t table = cluster >> layer->table_bits;
        page = index_get(&layer->l1->pages, table >> PAGE_BITS);
        if (!page || page[table & (PAGE_ENTRIES - 1)])
            return UNKNOWN;
        end_cluster = (table + 1) << layer->table_bits;
        kind = UNALLOCATED;
    }
    uint64_t room = ((end_cluster - cluster) << bits) - skip; /* at most 2^27 entries of 2^26 bytes */
    if (room < *length)
        *length = room;
    return kind;
}

/* The same through the chain: DATA in *owner, or ZERO, or UNKNOWN. */
static enum kind chain_run(const Layer *layer, uint64_t offset, uint64_t *length, uint64_t *host, const Layer **owner)
{
    for (int depth = 0; depth < MAX_DEPTH; depth++) {
        enum kind kind = layer_run(layer, offset, length, host);
        if (kind != UNALLOCATED) {
            *owner = layer;
            return kind;
        }
        layer = layer->below;
        if (!layer || offset >= layer->size)
            return ZERO;
        if (*length > layer->size - offset)
            *length = layer->size - offset;
    }
    return UNKNOWN;
}

/* -- memory ------------------------------------------------------------------------------------------------------------- */

static char *reply_memory; /* a reply: the header right before a page boundary, the data from there on */
static char *scratch;      /* twice MAX_IO: what a new cluster gets from below, before and behind a write */

static bool memory_prepare(void)
{
    if (!reply_memory) {
        void *memory = mmap(NULL, PAGE + 3 * MAX_IO, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory != MAP_FAILED) {
            reply_memory = (char *)memory + PAGE;
            scratch = reply_memory + MAX_IO;
        }
    }
    return reply_memory != NULL;
}

/* -- input and output --------------------------------------------------------------------------------------------------- */

/* A transfer that is one system call: pieces of memory for one range of one file. */
struct batch {
    int fd;
    bool write;
    uint64_t host, length;
    int pieces;
    struct iovec iov[MAX_IOV];
};

/* Is the page of the file at `host` in memory? A write of a part of a page would otherwise wait to read the rest. */
static bool at_hand(int fd, uint64_t host)
{
    char byte;
    struct iovec iov = {&byte, 1};
    return preadv2(fd, &iov, 1, (off_t)host, RWF_NOWAIT) == 1;
}

static bool batch_do(struct batch *batch)
{
    if (!batch->pieces)
        return true;
    uint64_t end = batch->host + batch->length;
    ssize_t done;
    if (batch->write) {
        if ((batch->host % PAGE && !at_hand(batch->fd, batch->host)) || (end % PAGE && !at_hand(batch->fd, end - 1)))
            return false;
        done = pwritev(batch->fd, batch->iov, batch->pieces, (off_t)batch->host);
    } else {
        done = preadv2(batch->fd, batch->iov, batch->pieces, (off_t)batch->host, RWF_NOWAIT);
    }
    batch->pieces = 0;
    return done >= 0 && (uint64_t)done == batch->length;
}

static bool batch_add(struct batch *batch, int fd, uint64_t host, char *memory, uint64_t length)
{
    bool follows = batch->pieces && batch->fd == fd && batch->host + batch->length == host;
    struct iovec *last = &batch->iov[batch->pieces - follows];
    if (follows && (char *)last->iov_base + last->iov_len == memory) {
        last->iov_len += length;
    } else {
        if ((!follows || batch->pieces == MAX_IOV) && !batch_do(batch))
            return false;
        if (!batch->pieces) {
            batch->fd = fd;
            batch->host = host;
            batch->length = 0;
        }
        batch->iov[batch->pieces++] = (struct iovec){memory, length};
    }
    batch->length += length;
    return true;
}

/* -- a burst ------------------------------------------------------------------------------------------------------------ */

/* One stay in the function at the end. */
struct burst {
    uint64_t number;
    int fd;                /* the session's */
    PyThreadState *thread; /* NULL: we have the GIL */
    Layer *wrote[8];       /* images that were written, and whose Python does not know yet */
    unsigned writes;
};

static void take_gil(struct burst *burst)
{
    if (burst->thread)
        PyEval_RestoreThread(burst->thread);
    burst->thread = NULL;
}

static void release_gil(struct burst *burst)
{
    burst->thread = PyEval_SaveThread();
}

/* Before Python does anything else. Needs the GIL. */
static void tell_writes(struct burst *burst)
{
    while (burst->writes)
        layer_tell(burst->wrote[--burst->writes]);
}

/* HANDED: to Python, which should have its turn. PASS, MISS: nothing was replied; to pyfuse3. */
enum outcome { DONE, HANDED, PASS, MISS };

static enum outcome read_image(const Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    struct batch batch = {.write = false};
    while (size) {
        uint64_t length = size, host = 0;
        const Layer *owner = NULL;
        switch (chain_run(top, offset, &length, &host, &owner)) {
        case ZERO:
            memset(memory, 0, length);
            break;
        case DATA:
            if (!batch_add(&batch, owner->fd, host, memory, length))
                return MISS;
            break;
        default:
            return PASS;
        }
        memory += length;
        offset += length;
        size -= length;
    }
    return batch_do(&batch) ? DONE : MISS;
}

/* Sees to it that Python will be told. */
static bool note_write(struct burst *burst, Layer *top)
{
    if (!top->dirty) {
        if (burst->writes == sizeof burst->wrote / sizeof *burst->wrote)
            return false;
        burst->wrote[burst->writes++] = top; /* no reference: only Python detaches, and is told before it runs */
        top->dirty = true;
    }
    return true;
}

static bool all_zero(const char *memory, uint64_t size)
{
    return !size || (!memory[0] && !memcmp(memory, memory + 1, size - 1));
}

/* What a new cluster gets of the layers below: bytes that are not there to be read are zeroes. */
static bool copy_below(const Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    uint64_t inside = offset >= top->size ? 0 : top->size - offset < size ? top->size - offset : size;
    memset(memory + inside, 0, size - inside);
    return !inside || read_image(top, offset, inside, memory) == DONE;
}

/*
 * Writes into clusters that have no data yet, all of one run and one table page, as ClusterWriter._write_unmapped does:
 * head, data and tail go to clusters that Python offers, and then the entries are set, which Python brings to the file
 * (commit.py). Passes whatever is not that simple.
 */
static enum outcome write_new(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    unsigned bits = top->cluster_bits;
    uint64_t length = size, host = 0, first = offset >> bits, last = (offset + size - 1) >> bits;
    uint64_t run = (last - first + 1) << bits, start = first << bits, end = offset + size;
    enum kind kind = layer_run(top, offset, &length, &host);
    uint64_t *page = index_get(&top->l2->pages, first >> PAGE_BITS);
    if ((kind != UNALLOCATED && kind != ZERO) || length != size || !page || first >> PAGE_BITS != last >> PAGE_BITS)
        return PASS;
    bool covers = kind == UNALLOCATED && top->below && start < top->below->size;
    if (all_zero(memory, size))
        return covers ? PASS : DONE;
    if (run > top->free_end - top->free || !note_write(burst, top))
        return PASS;
    unsigned at = 0;
    while (at < top->pages && top->page[at] != first >> PAGE_BITS)
        at++;
    if (at == BURST_REQUESTS)
        return PASS;
    struct iovec iov[3] = {{0}, {memory, size}, {0}};
    uint64_t head = offset - start, tail = start + run - end;
    if (covers) {
        if (head > MAX_IO || tail > MAX_IO)
            return PASS;
        if (!copy_below(top, start, head, scratch) || !copy_below(top, end, tail, scratch + MAX_IO))
            return MISS;
        if (!all_zero(scratch, head))
            iov[0] = (struct iovec){scratch, head};
        if (!all_zero(scratch + MAX_IO, tail))
            iov[2] = (struct iovec){scratch + MAX_IO, tail};
    }
    host = top->free;
    ssize_t done = pwritev(top->fd, iov, 3, (off_t)(host + (iov[0].iov_len ? 0 : head)));
    top->free += run;
    top->taken += run;
    if (done < 0 || (uint64_t)done != iov[0].iov_len + size + iov[2].iov_len) {
        top->lost = run;
        return MISS;
    }
    if (top->file_end < top->free)
        top->file_end = top->free;
    if (at == top->pages)
        top->page[top->pages++] = first >> PAGE_BITS;
    for (uint64_t cluster = first; cluster <= last; cluster++, host += UINT64_C(1) << bits)
        page[cluster & (PAGE_ENTRIES - 1)] = host;
    return DONE;
}

/* Nothing is written in place unless all of the range has clusters of its own in the top layer. */
static enum outcome write_image(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    uint64_t length, host = 0;
    for (uint64_t done = 0; done < size; done += length) {
        length = size - done;
        if (layer_run(top, offset + done, &length, &host) != DATA)
            return done ? PASS : write_new(burst, top, offset, size, memory);
    }
    if (!note_write(burst, top))
        return PASS;
    struct batch batch = {.write = true};
    for (uint64_t done = 0; done < size; done += length) {
        length = size - done;
        layer_run(top, offset + done, &length, &host);
        if (!batch_add(&batch, top->fd, host, memory + done, length))
            return MISS;
    }
    return batch_do(&batch) ? DONE : MISS;
}

/* -- requests ----------------------------------------------------------------------------------------------------------- */

struct handle {
    Layer *layer;
    bool writable;
};

static struct index handles; /* fh -> struct handle */


/* A reply that the kernel does not want (ENOENT: nobody waits any more, ENODEV: unmounted) is no loss. */
static void reply(int fd, uint64_t unique, int error, size_t size)
{
    struct fuse_out_header *out = (struct fuse_out_header *)reply_memory - 1;
    *out = (struct fuse_out_header){.len = (uint32_t)(sizeof *out + size), .error = error, .unique = unique};
    while (write(fd, out, out->len) < 0 && errno == EINTR)
        ;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* The handle's layer with its numbers as they are now, or NULL. */
static Layer *current_layer(struct burst *burst, const struct handle *handle)
{
    Layer *layer = handle->layer;
    if (layer->burst != burst->number) {
        take_gil(burst); /* `state` computes numbers and does nothing else */
        bool known = layer_refresh(layer);
        release_gil(burst);
        if (!known)
            return NULL;
        layer->burst = burst->number;
    }
    return layer;
}

static enum outcome answer_read(struct burst *burst, const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
    const struct handle *handle = index_get(&handles, arg->fh);
    if (!handle || arg->size > MAX_IO)
        return PASS;
    Layer *layer = current_layer(burst, handle);
    if (!layer || arg->offset > INT64_MAX - MAX_IO)
        return PASS;
    uint64_t size = arg->size;
    if (arg->offset >= layer->size)
        size = 0;
    else if (size > layer->size - arg->offset)
        size = layer->size - arg->offset;
    enum outcome outcome = read_image(layer, arg->offset, size, reply_memory);
    if (outcome == DONE) {
        reply(burst->fd, in->unique, 0, size);
        count.reads++;
    }
    return outcome;
}

static enum outcome answer_write(struct burst *burst, const struct fuse_in_header *in, struct fuse_write_in *arg)
{
    const struct handle *handle = index_get(&handles, arg->fh);
    if (!handle || !handle->writable || arg->size == 0 || arg->flags & O_DSYNC) /* O_SYNC has this bit, too */
        return PASS;
    Layer *layer = current_layer(burst, handle);
    if (!layer || !layer->writable || arg->offset >= layer->size || arg->size > layer->size - arg->offset)
        return PASS;
    enum outcome outcome = write_image(burst, layer, arg->offset, arg->size, (char *)(arg + 1));
    if (outcome == DONE) {
        *(struct fuse_write_out *)reply_memory = (struct fuse_write_out){.size = arg->size};
        reply(burst->fd, in->unique, 0, sizeof(struct fuse_write_out));
        count.writes++;
    }
    return outcome;
}

/* FALLOCATE and LSEEK. The Python callable replies, now or later. */
static enum outcome hand(struct burst *burst, const struct fuse_in_header *in, uint64_t fh, uint64_t offset,
                         uint64_t length, uint32_t mode)
{
    if (!hand_over || !index_get(&handles, fh))
        return PASS;
    take_gil(burst);
    tell_writes(burst);
    PyObject *result = PyObject_CallFunction(
        hand_over, "iIKKKKKI", burst->fd, (unsigned)in->opcode, (unsigned long long)in->unique,
        (unsigned long long)in->nodeid, (unsigned long long)fh, (unsigned long long)offset, (unsigned long long)length,
        (unsigned)mode);
    if (!result) {
        PyErr_WriteUnraisable(hand_over);
        reply(burst->fd, in->unique, -EIO, 0);
    }
    Py_XDECREF(result);
    release_gil(burst);
    count.handed++;
    return HANDED;
}

/* `size` bytes of request are at `in`, and stay as they are. */
static enum outcome answer(struct burst *burst, struct fuse_in_header *in, size_t size)
{
    if (size < sizeof *in || in->len != size)
        return PASS;
    void *arg = in + 1;
    size -= sizeof *in;
    if (in->opcode == FUSE_READ && size == sizeof(struct fuse_read_in))
        return answer_read(burst, in, arg);
    if (in->opcode == FUSE_WRITE && size >= sizeof(struct fuse_write_in)) {
        struct fuse_write_in *write = arg;
        return write->size == size - sizeof *write ? answer_write(burst, in, write) : PASS;
    }
    if (in->opcode == FUSE_FALLOCATE && size == sizeof(struct fuse_fallocate_in)) {
        struct fuse_fallocate_in *fallocate = arg;
        return hand(burst, in, fallocate->fh, fallocate->offset, fallocate->length, fallocate->mode);
    }
    if (in->opcode == FUSE_LSEEK && size == sizeof(struct fuse_lseek_in)) {
        struct fuse_lseek_in *lseek = arg;
        return hand(burst, in, lseek->fh, lseek->offset, 0, lseek->whence);
    }
    return PASS;
}

/* -- receiving ---------------------------------------------------------------------------------------------------------- */

/* One request into the buffer: its size, 0 when the session is over, or a negative error: -EINTR if there is none.
 *
 * libfuse allocates the buffer (large enough for whatever was agreed with the kernel) on a task's first call, so that
 * one is libfuse's; from then on we read ourselves: libfuse would splice through a pipe, which is slower. The kernel
 * refuses, with EINVAL and without taking a request, a buffer that could be too small; then it is libfuse's turn, too.
 */
static int receive(struct fuse_session *session, struct fuse_buf *buf, int fd)
{
    if (enabled && buf->mem) {
        ssize_t size = read(fd, buf->mem, malloc_usable_size(buf->mem));
        if (size >= (ssize_t)sizeof(struct fuse_in_header)) {
            buf->size = (size_t)size;
            buf->flags = 0;
            return (int)size;
        }
        /* ENOENT: the request was withdrawn as it was being read. */
        if (size < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOENT))
            return -EINTR;
    }
    int result = real_receive_buf(session, buf);
    return result == -EAGAIN ? -EINTR : result;
}

/* What we know of how requests arrive. */
static struct {
    unsigned pause;  /* chances to spin that are let pass after a spin in vain: more with each one, up to PAUSE_MAX */
    unsigned waited; /* of these, so many are over */
} pace;

/* Receives for a moment, until there is a request. No sched_yield: the scheduler makes a task that yields often wait. */
static int spin(struct fuse_session *session, struct fuse_buf *buf, int fd)
{
    int64_t end = now() + SPIN_NS;
    int result;
    count.spins++;
    do
        result = receive(session, buf, fd);
    while (result == -EINTR && now() < end);
    if (result == -EINTR) {
        pace.pause = pace.pause < PAUSE_MAX / 2 ? pace.pause * 2 + 1 : PAUSE_MAX;
        pace.waited = 0;
    } else {
        pace.pause /= 2;
        count.spun++;
    }
    return result;
}

/* Sleeps for a moment, until there is a request: still quicker than the way through the event loop. */
static int wait_and_receive(struct fuse_session *session, struct fuse_buf *buf, int fd)
{
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    return ppoll(&ready, 1, &(struct timespec){.tv_nsec = WAIT_NS}, NULL) > 0 ? receive(session, buf, fd) : -EINTR;
}

static int do_burst(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int64_t start = now();
    bool busy = in_python > 0;
    int64_t limit = start + (busy ? BUSY_BURST_NS : BURST_NS);
    int result = receive(session, buf, burst->fd);
    for (int requests = 1; result > 0; requests++) {
        enum outcome outcome = buf->flags & BUF_IS_FD ? PASS : answer(burst, buf->mem, (size_t)result);
        if (outcome == PASS || outcome == MISS) {
            count.passed++;
            count.missed += outcome == MISS;
            break;
        }
        result = -EINTR;
        if (outcome == HANDED || requests == BURST_REQUESTS || now() >= limit)
            break;
        result = receive(session, buf, burst->fd);
        if (result == -EINTR && spinning && !busy && pace.waited++ >= pace.pause)
            result = spin(session, buf, burst->fd);
        if (result == -EINTR && spinning && !busy)
            result = wait_and_receive(session, buf, burst->fd);
    }
    return result;
}

/* In front of libfuse's function of this name; called by pyfuse3, with the GIL, on the thread that runs trio. */
EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf);

EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
    static int prepared = -1;
    static uint64_t number;
    if (!real_receive_buf)
        return -ENOSYS;
    count.calls++;
    struct burst burst = {.number = ++number, .fd = session_fd(session)};
    if (burst.fd != prepared) {
        /* A request may be withdrawn between poll and read: the read must not wait for the next one. */
        int flags = fcntl(burst.fd, F_GETFL);
        if (flags >= 0)
            fcntl(burst.fd, F_SETFL, flags | O_NONBLOCK);
        prepared = burst.fd;
    }
    if (!enabled) {
        int result = receive(session, buf, burst.fd);
        count.passed += result > 0;
        return result;
    }
    release_gil(&burst);
    int result = do_burst(&burst, session, buf);
    take_gil(&burst);
    tell_writes(&burst);
    return result;
}

/* -- the module --------------------------------------------------------------------------------------------------------- */

static PyObject *bind_library(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *path;
    if (!PyArg_ParseTuple(args, "s:bind", &path))
        return NULL;
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (library) {
        /* ISO C has no cast from object to function pointers; POSIX wants this to work. */
        *(void **)&session_fd = dlsym(library, "fuse_session_fd");
        *(void **)&real_receive_buf = session_fd ? dlsym(library, "fuse_session_receive_buf") : NULL;
    }
    if (!real_receive_buf || !memory_prepare()) {
        PyErr_Format(PyExc_OSError, "%s: libfuse's functions were not found", path);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *configure(PyObject *Py_UNUSED(module), PyObject *args, PyObject *keywords)
{
    static char *names[] = {"enabled", "spin", "hand_over", NULL};
    int on, may_spin = 1;
    PyObject *callable = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "p|pO:configure", names, &on, &may_spin, &callable))
        return NULL;
    enabled = on;
    spinning = may_spin;
    Py_XSETREF(hand_over, callable == Py_None ? NULL : Py_NewRef(callable));
    Py_RETURN_NONE;
}

static PyObject *enter(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    in_python++;
    Py_RETURN_NONE;
}

static PyObject *leave(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    in_python--;
    Py_RETURN_NONE;
}

static PyObject *detach(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long fh = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    struct handle *handle = index_drop(&handles, fh);
    if (handle) {
        Py_DECREF(handle->layer);
        free(handle);
    }
    Py_RETURN_NONE;
}

static PyObject *attach(PyObject *module, PyObject *args)
{
    PyObject *number;
    Layer *layer;
    int writable;
    if (!PyArg_ParseTuple(args, "OO!p:attach", &number, &LayerType, &layer, &writable))
        return NULL;
    PyObject *detached = detach(module, number);
    if (!detached)
        return NULL;
    Py_DECREF(detached);
    if (!layer->state) {
        PyErr_SetString(PyExc_TypeError, "the layer of a handle needs a state");
        return NULL;
    }
    struct handle *handle = malloc(sizeof *handle);
    if (handle)
        *handle = (struct handle){layer, writable};
    if (!handle || !index_set(&handles, PyLong_AsUnsignedLongLong(number), handle)) {
        free(handle);
        return PyErr_NoMemory();
    }
    Py_INCREF(layer);
    Py_RETURN_NONE;
}

static PyObject *counters(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return Py_BuildValue("{sKsKsKsKsKsKsKsK}", "calls", (unsigned long long)count.calls, "reads",
                         (unsigned long long)count.reads, "writes", (unsigned long long)count.writes, "passed",
                         (unsigned long long)count.passed, "missed", (unsigned long long)count.missed, "handed",
                         (unsigned long long)count.handed, "spins", (unsigned long long)count.spins, "spun",
                         (unsigned long long)count.spun);
}

static PyMethodDef methods[] = {
    {"bind", bind_library, METH_VARARGS, "bind(path): find libfuse's functions behind pyfuse3's library."},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "configure(enabled, spin=True, hand_over=None)"},
    {"attach", attach, METH_VARARGS, "attach(fh, layer, writable): answer requests for this handle."},
    {"detach", detach, METH_O, "detach(fh): no longer."},
    {"enter", enter, METH_NOARGS, "enter(): Python begins to work on a request."},
    {"leave", leave, METH_NOARGS, "leave(): it has replied, or will in a moment."},
    {"counters", counters, METH_NOARGS, "counters() -> dict of what was done since loading."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse._fastpath",
    .m_doc = "A request filter in front of pyfuse3. Used by qedfuse.fastpath only.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__fastpath(void)
{
    if (PyType_Ready(&PageIndexType) < 0 || PyType_Ready(&LayerType) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (!module)
        return NULL;
    if (PyModule_AddObjectRef(module, "PageIndex", (PyObject *)&PageIndexType) < 0 ||
        PyModule_AddObjectRef(module, "Layer", (PyObject *)&LayerType) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
