/* The wire format of what goes to the kernel: replies, and the notification that Python needs. */

#include "reply.h"
#include "counts.h"
#include "memory.h"

#include <errno.h>
#include <stddef.h>
#include <structmember.h>
#include <sys/uio.h>
#include <unistd.h>

void reply(int fd, uint64_t unique, int error, size_t size)
{
    struct fuse_out_header *out = (struct fuse_out_header *)reply_memory - 1;
    *out = (struct fuse_out_header){.len = (uint32_t)(sizeof *out + size), .error = error, .unique = unique};
    while (write(fd, out, out->len) < 0 && errno == EINTR)
        ;
}

/* -- from Python --------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    int fd; /* the session's */
    unsigned long long unique, node;
} Request;

PyObject *request_new(int fd, const struct fuse_in_header *in)
{
    Request *self = (Request *)RequestType.tp_alloc(&RequestType, 0);
    if (self) {
        self->fd = fd;
        self->unique = in->unique;
        self->node = in->nodeid;
    }
    return (PyObject *)self;
}

/* A message without or with data. Returns None, or NULL and an exception. */
static PyObject *sent(ssize_t done)
{
    if (done < 0 && errno != ENOENT && errno != ENODEV)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static ssize_t send_message(int fd, int error, uint64_t unique, const void *data, size_t size)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + size), .error = error, .unique = unique};
    struct iovec iov[] = {{&out, sizeof out}, {(void *)data, size}};
    ssize_t done;
    do
        done = writev(fd, iov, 2);
    while (done < 0 && errno == EINTR);
    return done;
}

static PyObject *request_reply(PyObject *object, PyObject *args)
{
    const Request *self = (const Request *)object;
    int error = 0;
    if (!PyArg_ParseTuple(args, "|i:reply", &error))
        return NULL;
    return sent(send_message(self->fd, -error, self->unique, NULL, 0));
}

static PyObject *request_reply_data(PyObject *object, PyObject *argument)
{
    const Request *self = (const Request *)object;
    Py_buffer data;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE))
        return NULL;
    count.reads++;
    ssize_t done;
    Py_BEGIN_ALLOW_THREADS
    done = send_message(self->fd, 0, self->unique, data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS
    PyObject *result = sent(done);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *request_reply_offset(PyObject *object, PyObject *argument)
{
    const Request *self = (const Request *)object;
    struct fuse_lseek_out found = {.offset = PyLong_AsUnsignedLongLong(argument)};
    if (PyErr_Occurred())
        return NULL;
    return sent(send_message(self->fd, 0, self->unique, &found, sizeof found));
}

/* False: the kernel does not want it any more, and will not tell of a release either. */
static PyObject *request_reply_open(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"", "direct", "keep_cache", NULL};
    const Request *self = (const Request *)object;
    struct fuse_open_out opened = {0};
    unsigned long long handle;
    int direct, keep_cache;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "K$pp:reply_open", names, &handle, &direct, &keep_cache))
        return NULL;
    opened.fh = handle;
    opened.open_flags = (direct ? FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES : 0U) |
                        (keep_cache ? FOPEN_KEEP_CACHE : 0U);
    if (send_message(self->fd, 0, self->unique, &opened, sizeof opened) >= 0)
        Py_RETURN_TRUE;
    if (errno != ENOENT && errno != ENODEV)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_FALSE;
}

static PyObject *request_invalidate(PyObject *object, PyObject *args)
{
    const Request *self = (const Request *)object;
    long long offset, size;
    if (!PyArg_ParseTuple(args, "LL:invalidate", &offset, &size))
        return NULL;
    struct fuse_notify_inval_inode_out range = {.ino = self->node, .off = offset, .len = size};
    ssize_t done;
    Py_BEGIN_ALLOW_THREADS
    done = send_message(self->fd, FUSE_NOTIFY_INVAL_INODE, 0, &range, sizeof range);
    Py_END_ALLOW_THREADS
    if (done < 0 && errno != ENOENT) /* the kernel has forgotten the file: it has nothing */
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyMethodDef request_methods[] = {
    {"reply", request_reply, METH_VARARGS, "reply(error=0): it is done, or has failed with this errno."},
    {"reply_data", request_reply_data, METH_O, "reply_data(bytes): to a READ."},
    {"reply_offset", request_reply_offset, METH_O, "reply_offset(offset): to an LSEEK."},
    {"reply_open", (PyCFunction)(void (*)(void))request_reply_open, METH_VARARGS | METH_KEYWORDS,
     "reply_open(fh, *, direct, keep_cache) -> whether the kernel has taken the handle. direct: past its cache, with "
     "writers in parallel."},
    {"invalidate", request_invalidate, METH_VARARGS,
     "invalidate(offset, size): have the kernel write what it has for a range (size 0: to the end) of the request's "
     "file, and forget it. No reply. Waits for these writes to be answered."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef request_members[] = {
    {"node", T_ULONGLONG, offsetof(Request, node), READONLY, "The file's number."},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject RequestType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse.native._fastpath.Request",
    .tp_doc = "A request of the kernel, to be answered by one of the replies, once.",
    .tp_basicsize = sizeof(Request),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_methods = request_methods,
    .tp_members = request_members,
};
