/*
 * The sidecar: a process that lives for one call, and sets the times or the size of a mount's file from outside the
 * daemon that serves it. Used by kernel_times.py and oversize.py, which tell why.
 *
 * `set_times` takes times in nanoseconds since the epoch. `cut` takes a limit in bytes: for a larger file it asks for
 * one byte more than that. Both take the mount's device number (st_dev) and touch nothing else that is at the path by
 * now (ENODEV). They return the size in bytes that the kernel believed in just before the change; any writer may have
 * changed it since. They raise OSError: what a system call said, ECANCELED if the sidecar was killed. They wait,
 * without the GIL, until the daemon has answered, perhaps for ever: the caller needs a thread that it can abandon.
 *
 * A thread of the daemon must not do it: once the request has been taken, not even SIGKILL interrupts a thread that
 * waits for the answer. If the daemon is killed meanwhile, its threads share the descriptor of /dev/fuse, which is what
 * the kernel waits for to be closed before it gives that thread an error: neither ever comes.
 *
 * So a child does it, made like vfork(2)'s: it shares the daemon's memory, so it costs neither memory nor the time to
 * copy page tables. The thread that made it is suspended until it ends, in a wait that SIGKILL ends; then the daemon's
 * last descriptor is closed, and the child has its error.
 *
 * It begins with the daemon's table of descriptors, not with a copy, and leaves it for one of its own, in which there
 * are none. A copy would keep open for a moment what the daemon closes meanwhile: an image's locks would last longer
 * than the daemon has it open, and whoever opens it next would be refused.
 *
 * It makes system calls only. Signals are blocked in it: a handler would run in the daemon's memory.
 *
 * Source: clone(2), Linux fs/fuse/dev.c (request_wait_answer), utimensat(2) (AT_EMPTY_PATH: Linux 5.8), close_range(2)
 * (CLOSE_RANGE_UNSHARE: Linux 5.9).
 */

#define _GNU_SOURCE /* clone */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

/* What the child has opened: it has no other descriptors, and truncate(2) takes none of O_PATH. */
#define FIRST_FD "/proc/self/fd/0"

struct errand {
    const char *path;
    unsigned long long device;
    enum { TIMES, SIZE } what;
    struct timespec times[2];
    unsigned long long limit;
    /* what came of it */
    volatile bool done;
    volatile int error;
    volatile unsigned long long size;
};

/* Returns an errno. Only the mount itself may be touched, not what is at the path now: it may have been unmounted. */
static int run(struct errand *errand)
{
    struct statx status;
    if (syscall(SYS_close_range, 0U, ~0U, CLOSE_RANGE_UNSHARE))
        return errno;
    int fd = open(errand->path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_SIZE, &status))
        return errno;
    if (makedev(status.stx_dev_major, status.stx_dev_minor) != errand->device)
        return ENODEV;
    errand->size = status.stx_size;
    if (errand->what == TIMES)
        return utimensat(fd, "", errand->times, AT_EMPTY_PATH) ? errno : 0;
    if (errand->size <= errand->limit)
        return 0;
    return truncate(FIRST_FD, errand->limit + 1) ? errno : 0;
}

static int child_main(void *errand_)
{
    struct errand *errand = errand_;
    errand->error = run(errand);
    errand->done = true;
    return 0;
}

/* Returns an errno: of making the child. */
static int send_out(struct errand *errand)
{
    _Alignas(16) char stack[16384];
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t child = clone(child_main, stack + sizeof stack, CLONE_VM | CLONE_VFORK | CLONE_FILES | SIGCHLD, errand);
    int error = child < 0 ? errno : 0;
    if (child > 0)
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
            ;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* Have it done, for the file at `path`, a bytes object, which is given up. */
static PyObject *do_errand(struct errand *errand, PyObject *path)
{
    int error;
    errand->path = PyBytes_AS_STRING(path);
    Py_BEGIN_ALLOW_THREADS
    error = send_out(errand);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (!error && !errand->done)
        error = ECANCELED; /* it was killed */
    if (!error)
        error = errand->error;
    if (!error)
        return PyLong_FromUnsignedLongLong(errand->size);
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *set_times(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct errand errand = {.what = TIMES};
    long long times[2];
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&KLL:set_times", PyUnicode_FSConverter, &path, &errand.device, &times[0], &times[1]))
        return NULL;
    for (int i = 0; i < 2; i++) { /* tv_nsec is never negative, tv_sec may be */
        errand.times[i].tv_sec = times[i] / 1000000000 - (times[i] % 1000000000 < 0);
        errand.times[i].tv_nsec = (times[i] % 1000000000 + 1000000000) % 1000000000;
    }
    return do_errand(&errand, path);
}

static PyObject *cut(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct errand errand = {.what = SIZE};
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&KK:cut", PyUnicode_FSConverter, &path, &errand.device, &errand.limit))
        return NULL;
    return do_errand(&errand, path);
}

static PyMethodDef methods[] = {
    {"set_times", set_times, METH_VARARGS,
     "set_times(mountpoint, device, atime_ns, mtime_ns) -> size in bytes that the kernel believes in"},
    {"cut", cut, METH_VARARGS,
     "cut(path, device, limit) -> size in bytes that the kernel believed in; one over the limit is cut to limit + 1"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse.native._sidecar",
    .m_doc = "Setting times and sizes in a mount from outside its daemon.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__sidecar(void)
{
    return PyModule_Create(&definition);
}
