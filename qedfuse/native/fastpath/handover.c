/* The way from a request to a Python method, and what must be done before and after. */

#include "handover.h"
#include "counts.h"
#include "handles.h"
#include "reply.h"

#include <errno.h>

enum method { READ, OPEN, FSYNC, FALLOCATE, SEEK, METHODS };

static const char *const texts[METHODS] = {
    [READ] = "read", [OPEN] = "open", [FSYNC] = "fsync", [FALLOCATE] = "fallocate", [SEEK] = "seek"};
static PyObject *names[METHODS];
static PyObject *handlers;

bool hand_prepare(void)
{
    for (int i = 0; i < METHODS; i++) {
        names[i] = PyUnicode_InternFromString(texts[i]);
        if (!names[i])
            return false;
    }
    return true;
}

void hand_to(PyObject *object)
{
    Py_XSETREF(handlers, Py_XNewRef(object));
}

/* method(request, fh, numbers...); in place of fh, OPEN has the file's number. NULL: an exception. */
static PyObject *call(enum method method, int fd, const struct fuse_in_header *in, uint64_t fh, const uint64_t *numbers,
                      unsigned many)
{
    PyObject *args[6] = {handlers, request_new(fd, in), PyLong_FromUnsignedLongLong(fh)};
    for (unsigned i = 0; i < many; i++)
        args[3 + i] = PyLong_FromUnsignedLongLong(numbers[i]);
    bool complete = true;
    for (unsigned i = 1; i < 3 + many; i++)
        complete &= args[i] != NULL;
    PyObject *result = complete ? PyObject_VectorcallMethod(names[method], args, 3 + many, NULL) : NULL;
    for (unsigned i = 1; i < 3 + many; i++)
        Py_XDECREF(args[i]);
    return result;
}

static enum outcome hand(struct burst *burst, enum method method, const struct fuse_in_header *in, uint64_t fh,
                         const uint64_t *numbers, unsigned many)
{
    if (!handlers || (method != OPEN && !handle_find(fh)))
        return PASS;
    take_gil(burst);
    tell_writes(burst);
    PyObject *result = call(method, burst->fd, in, fh, numbers, many);
    bool done = result == Py_True;
    if (!result) {
        PyErr_WriteUnraisable(handlers);
        reply(burst->fd, in->unique, -EIO, 0);
    }
    Py_XDECREF(result);
    burst_renew(burst);
    release_gil(burst);
    count.handed++;
    return done ? DONE : HANDED;
}

enum outcome hand_read(struct burst *burst, const struct fuse_in_header *in, const struct fuse_read_in *arg,
                       bool to_end)
{
    return hand(burst, READ, in, arg->fh, (uint64_t[]){arg->offset, arg->size, to_end}, 3);
}

enum outcome hand_open(struct burst *burst, const struct fuse_in_header *in, const struct fuse_open_in *arg)
{
    enum outcome outcome = hand(burst, OPEN, in, in->nodeid, (uint64_t[]){arg->flags}, 1);
    count.opens += outcome != PASS;
    return outcome;
}

enum outcome hand_fsync(struct burst *burst, const struct fuse_in_header *in, const struct fuse_fsync_in *arg)
{
    enum outcome outcome = hand(burst, FSYNC, in, arg->fh, NULL, 0);
    count.syncs += outcome != PASS;
    return outcome;
}

enum outcome hand_fallocate(struct burst *burst, const struct fuse_in_header *in, const struct fuse_fallocate_in *arg)
{
    return hand(burst, FALLOCATE, in, arg->fh, (uint64_t[]){arg->offset, arg->length, arg->mode}, 3);
}

enum outcome hand_seek(struct burst *burst, const struct fuse_in_header *in, const struct fuse_lseek_in *arg)
{
    return hand(burst, SEEK, in, arg->fh, (uint64_t[]){arg->offset, arg->whence}, 2);
}
