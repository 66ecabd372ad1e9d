/* Syncer: a thread that makes fdatasync calls, one at a time, and never needs the GIL. See offload.py. */

#include "layer.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* What the thread works with; it is never freed, as the thread never ends. */
struct work {
    sem_t due;
    int fd;   /* to be synced */
    int done; /* an eventfd: readable when it has been */
    int error;
};

typedef struct {
    PyObject_HEAD
    struct work *work;
    int watched;
} Syncer;

static void *work_on(void *argument)
{
    struct work *work = argument;
    for (;;) {
        while (sem_wait(&work->due))
            ;
        int result;
        do
            result = fdatasync(work->fd);
        while (result && errno == EINTR);
        work->error = result ? errno : 0;
        eventfd_write(work->done, 1);
    }
    return NULL;
}

static PyObject *syncer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"watched", NULL};
    int watched;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "i:Syncer", names, &watched))
        return NULL;
    struct work *work = calloc(1, sizeof *work);
    if (!work)
        return PyErr_NoMemory();
    work->done = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    Syncer *self = work->done >= 0 ? (Syncer *)type->tp_alloc(type, 0) : NULL;
    if (self) {
        self->work = work;
        self->watched = watched;
        sem_init(&work->due, 0, 0);
        pthread_t thread;
        sigset_t all, before; /* signals are Python's business, on its own threads */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int error = pthread_create(&thread, NULL, work_on, work);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (!error) {
            pthread_detach(thread);
            return (PyObject *)self;
        }
        errno = error;
        self->work = NULL;
        Py_DECREF(self);
    }
    PyErr_SetFromErrno(PyExc_OSError);
    if (work->done >= 0)
        close(work->done);
    free(work);
    return NULL;
}

static void syncer_dealloc(PyObject *object)
{
    Py_TYPE(object)->tp_free(object);
}

static PyObject *syncer_attempt(PyObject *object, PyObject *args)
{
    Syncer *self = (Syncer *)object;
    int fd, patience;
    if (!PyArg_ParseTuple(args, "ii:attempt", &fd, &patience))
        return NULL;
    struct pollfd ready[] = {{.fd = self->work->done, .events = POLLIN}, {.fd = self->watched, .events = POLLIN}};
    self->work->fd = fd;
    Py_BEGIN_ALLOW_THREADS
    sem_post(&self->work->due);
    poll(ready, 2, patience);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(ready[0].revents);
}

static PyObject *syncer_finish(PyObject *object, PyObject *Py_UNUSED(none))
{
    Syncer *self = (Syncer *)object;
    eventfd_t count;
    if (eventfd_read(self->work->done, &count))
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromLong(self->work->error);
}

static PyObject *syncer_fileno(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(((Syncer *)object)->work->done);
}

static PyMethodDef syncer_methods[] = {
    {"attempt", syncer_attempt, METH_VARARGS,
     "attempt(fd, milliseconds) -> bool: begin to sync and wait for it, or until `watched` is readable."},
    {"finish", syncer_finish, METH_NOARGS, "finish() -> errno of the sync, 0 if it succeeded. It must be done."},
    {"fileno", syncer_fileno, METH_NOARGS, "fileno(): what becomes readable when it is done."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject SyncerType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse.native._fastpath.Syncer",
    .tp_doc = "Syncer(watched): a thread for fdatasync.",
    .tp_basicsize = sizeof(Syncer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = syncer_new,
    .tp_dealloc = syncer_dealloc,
    .tp_methods = syncer_methods,
};
