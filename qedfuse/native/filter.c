/*
 * The fast path: a request filter in front of pyfuse3. Here are the requests; layer.c knows where an image's bytes
 * are, transfer.c reads and writes them, receive.c takes requests from the kernel.
 *
 * How it gets there. This module defines `fuse_session_receive_buf`, the libfuse function by which pyfuse3 takes a
 * request from the kernel. It is loaded with RTLD_GLOBAL before pyfuse3, so the dynamic linker binds pyfuse3's call to
 * it. `bind` looks the real function up behind pyfuse3's own library, which finds exactly the libfuse that pyfuse3
 * uses. If a linker does not do us the favour, the function below is never called (`counters()["calls"]` stays 0) and
 * everything works as if this file did not exist.
 *
 * What it does. It reads requests from the session's descriptor. READs, WRITEs that overwrite allocated clusters, and
 * most WRITEs into new ones it answers at once and goes on to the next request (a *burst*); FALLOCATE and LSEEK, for
 * which pyfuse3 has no handlers, it hands to a Python callable; the first request that is anything else ends the burst
 * and is returned to pyfuse3 untouched. At the end of a burst without such a request it returns -EINTR, upon which
 * pyfuse3 waits for the descriptor as it always does. The GIL is released but for the moments when Python is asked or
 * told something.
 *
 * What it never does: choose clusters, bring a table to the file, wait for a disk to read, report an error. Whatever
 * is not plainly fine (a table page that is not in memory, an entry that points nowhere, data that is not in the
 * host's page cache, a failed or short read or write) goes to Python, whose behaviour is the reference: it does the
 * request again from its start and owns the outcome. A write that failed half-way and is done again is the same write.
 *
 * New clusters. Python offers a run of them, all of which read as zeroes and lie inside the file, whenever nobody
 * holds a lock on a range (image.py, `state`). They are taken from the front: data first, with what the layers below
 * have around it, then the entries in the page in memory. Python is told how many were taken and which pages have
 * changed, before it runs again (`note_written`), so for allocator.py and commit.py it is as if Python had done it. A
 * cluster whose write failed is told of as lost: what is in it must not show up in anything else.
 *
 * Why the mapping cannot change under it. The tables have one place, the page pool of pages.py; this file reads the
 * entries there, by way of an index (page number -> address) that pages.py keeps up to date. Python changes tables,
 * and the pool moves pages, only on the thread that runs trio, and this function is called by pyfuse3 on that thread:
 * until it returns, nothing else runs there, whoever has the GIL. The worker threads that may run meanwhile make
 * system calls on the host files (a slow read, a commit's fdatasync, a punch) and touch no table. So what is done here
 * is atomic for the engine, just as the engine's own `_nowait` functions are, and is right for the same reasons.
 * Numbers that live in Python objects (image size, end of the file, whether it may be written) are fetched once in a
 * burst, before the first request to an image is looked at. That something was written is told to Python before the
 * function returns, hence before any flush or sync can begin.
 *
 * How long it stays: at most BURST_REQUESTS requests or BURST_NS, a fraction of that while Python is known to have
 * requests of its own to work on; then trio's other tasks have their turn. When the queue becomes empty the next
 * request is awaited (receive.c) by polling for SPIN_NS: a lone reader, who asks again when it is answered, is served
 * without a trip through the event loop. After a spin in vain ever more chances to spin are let pass, so that it costs
 * little where it does not pay off. Then it sleeps for WAIT_NS at most, which costs nothing and is still quicker than
 * the event loop. Neither happens while Python has requests to work on; an idle mount does neither, as there is nothing
 * to answer before.
 *
 * Sources: linux/fuse.h (wire format), preadv2(2), QEMU docs/interop/qed_spec (tables).
 */

#include "receive.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

enum {
    BURST_NS = 2000 * 1000,
    BUSY_BURST_NS = 250 * 1000, /* while Python works on requests, too */
};

/* -- what Python can see of us -------------------------------------------------------------------------------------- */

static struct {
    uint64_t calls;  /* of the function below: 0 means not bound */
    uint64_t reads;  /* answered here */
    uint64_t writes; /* answered here */
    uint64_t passed; /* to pyfuse3, of any kind */
    uint64_t missed; /* of these, reads and writes that failed for the host's page cache or the host */
    uint64_t handed; /* to Python, past pyfuse3 */
} count;

static bool enabled;       /* false: every request is passed */
static bool spinning = true; /* may poll, and sleep, for the next request */
static unsigned in_python; /* requests that Python is working on */
static uint64_t bursts;    /* numbers them */
static bool sync_asked;    /* the request that was passed last is a WRITE to be durable when it is answered */
static PyObject *hand_over; /* callable(session_fd, opcode, unique, nodeid, fh, offset, length, mode) or NULL */

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

/* The Python callable replies, now or later. */
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
    bool done = result == Py_True;
    if (!result) {
        PyErr_WriteUnraisable(hand_over);
        reply(burst->fd, in->unique, -EIO, 0);
    }
    Py_XDECREF(result);
    burst->number = ++bursts; /* numbers that live in Python may have changed */
    release_gil(burst);
    count.handed++;
    return done ? DONE : HANDED;
}

/* `size` bytes of request, which stay as they are. */
static enum outcome answer(struct burst *burst, void *request, size_t size)
{
    struct fuse_in_header *in = request;
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
    if (in->opcode == FUSE_FSYNC && size == sizeof(struct fuse_fsync_in))
        return hand(burst, in, ((struct fuse_fsync_in *)arg)->fh, 0, 0, 0);
    if (in->opcode == FUSE_LSEEK && size == sizeof(struct fuse_lseek_in)) {
        struct fuse_lseek_in *lseek = arg;
        return hand(burst, in, lseek->fh, lseek->offset, 0, lseek->whence);
    }
    return PASS;
}

/* -- bursts ------------------------------------------------------------------------------------------------------------- */

/* Is the request a WRITE that must be durable when it is answered? If nobody can see it, it may be one. */
static bool asks_for_sync(const struct burst *burst, size_t size)
{
    const struct fuse_in_header *in = burst->request;
    if (!in)
        return true;
    const struct fuse_write_in *write = (const void *)(in + 1);
    return in->opcode == FUSE_WRITE && size >= sizeof *in + sizeof *write && write->flags & O_DSYNC;
}

static int do_burst(struct burst *burst, struct fuse_session *session, struct fuse_buf *buf)
{
    int64_t start = now();
    bool busy = in_python > 0;
    int64_t limit = start + (busy ? BUSY_BURST_NS : BURST_NS);
    int result = receive(burst, session, buf);
    for (int requests = 1; result > 0; requests++) {
        enum outcome outcome = burst->request ? answer(burst, burst->request, (size_t)result) : PASS;
        if (outcome == PASS || outcome == MISS) {
            count.passed++;
            count.missed += outcome == MISS;
            sync_asked = asks_for_sync(burst, (size_t)result);
            pass(burst, buf, (size_t)result);
            break;
        }
        result = -EINTR;
        if (outcome == HANDED || requests == BURST_REQUESTS || now() >= limit)
            break;
        result = spinning && !busy ? await_and_receive(burst, session, buf) : receive(burst, session, buf);
    }
    return result;
}

/* In front of libfuse's function of this name; called by pyfuse3, with the GIL, on the thread that runs trio. */
EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf);

EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
    static int prepared = -1;
    Dl_info caller; /* `bind` has failed: who calls knows libfuse, and all goes on as without us */
    if (!libfuse.receive_buf && dladdr(__builtin_return_address(0), &caller))
        find_libfuse(caller.dli_fname);
    if (!libfuse.receive_buf)
        return -ENOSYS;
    count.calls++;
    struct burst burst = {.number = ++bursts, .fd = libfuse.session_fd(session)};
    if (burst.fd != prepared) {
        /* A request may be withdrawn between poll and read: the read must not wait for the next one. */
        int flags = fcntl(burst.fd, F_GETFL);
        if (flags >= 0)
            fcntl(burst.fd, F_SETFL, flags | O_NONBLOCK);
        prepared = burst.fd;
    }
    if (!enabled) {
        int result = receive_by_libfuse(&burst, session, buf);
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
    find_libfuse(path);
    if (!libfuse.receive_buf || !memory_prepare()) {
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

static PyObject *get_sync_asked(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(sync_asked);
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
                         (unsigned long long)count.handed, "spins", (unsigned long long)pace.spins, "spun",
                         (unsigned long long)pace.spun);
}

static PyMethodDef methods[] = {
    {"bind", bind_library, METH_VARARGS, "bind(path): find libfuse's functions behind pyfuse3's library."},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "configure(enabled, spin=True, hand_over=None)"},
    {"attach", attach, METH_VARARGS, "attach(fh, layer, writable): answer requests for this handle."},
    {"detach", detach, METH_O, "detach(fh): no longer."},
    {"enter", enter, METH_NOARGS, "enter(): Python begins to work on a request."},
    {"leave", leave, METH_NOARGS, "leave(): it has replied, or will in a moment."},
    {"sync_asked", get_sync_asked, METH_NOARGS,
     "sync_asked(): whether the request passed last is a write that must be durable when it is answered."},
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
