/*
 * The sidecar: a process that lives for one call, and sets the time or the size of a mount's file from outside the
 * daemon that serves it. Used by kernel_times.py and oversize.py, which tell why.
 *
 * `set_time` takes a time of change: seconds since the epoch, and nanoseconds. A later one stands if the kernel has
 * given it, to what it has not written yet: with that, the image gets a later one still. One that is ahead of the clock
 * is not of that kind. `cut` takes a limit in bytes: for a larger file it asks for one byte more than that. Both take
 * the mount's device number (st_dev) and the file's number (st_ino), and touch nothing else that is at the path by now
 * (ENODEV, ESTALE). They return the size in bytes that the kernel believed in just before the change; any writer may
 * have changed it since. They raise OSError: what a system call said, ECANCELED if the sidecar was killed. They wait,
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
 * are none. A copy would keep open what the daemon closes until the child has its turn on a processor. (The kernel may
 * still copy some for the moment that this takes; an image's locks do not depend on it, see image_lock.py.)
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
    unsigned long long device, inode;
    enum { TIME, SIZE } what;
    struct timespec times[2]; /* of the last read, which stays, and of change */
    unsigned long long limit;
    /* what came of it */
    volatile bool done;
    volatile int error;
    volatile unsigned long long size;
};

static bool is_before(const struct timespec *one, const struct timespec *other)
{
    return one->tv_sec != other->tv_sec ? one->tv_sec < other->tv_sec : one->tv_nsec < other->tv_nsec;
}

/* Whether the file has a time that the kernel has given it, later than the one that is to be set. */
static bool is_later(const struct statx_timestamp *found, const struct timespec *wanted)
{
    struct timespec time = {.tv_sec = found->tv_sec, .tv_nsec = found->tv_nsec}, clock;
    return is_before(wanted, &time) && !clock_gettime(CLOCK_REALTIME, &clock) && !is_before(&clock, &time);
}

/* Returns an errno. Only the mount itself may be touched, not what is at the path now: it may have been unmounted. */
static int run(struct errand *errand)
{
    struct statx status;
    if (syscall(SYS_close_range, 0U, ~0U, CLOSE_RANGE_UNSHARE))
        return errno;
    int fd = open(errand->path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_SIZE | STATX_INO | STATX_MTIME, &status))
        return errno;
    if (makedev(status.stx_dev_major, status.stx_dev_minor) != errand->device)
        return ENODEV;
    if (status.stx_ino != errand->inode)
        return ESTALE;
    errand->size = status.stx_size;
    if (errand->what == TIME) {
        bool stands = is_later(&status.stx_mtime, &errand->times[1]);
        return !stands && utimensat(fd, "", errand->times, AT_EMPTY_PATH) ? errno : 0;
    }
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

static PyObject *set_time(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct errand errand = {.what = TIME, .times = {{.tv_nsec = UTIME_OMIT}}};
    long long seconds;
    long nanoseconds;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&KKLl:set_time", PyUnicode_FSConverter, &path, &errand.device, &errand.inode,
                          &seconds, &nanoseconds))
        return NULL;
    errand.times[1] = (struct timespec){.tv_sec = seconds, .tv_nsec = nanoseconds};
    return do_errand(&errand, path);
}

static PyObject *cut(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct errand errand = {.what = SIZE};
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&KKK:cut", PyUnicode_FSConverter, &path, &errand.device, &errand.inode,
                          &errand.limit))
        return NULL;
    return do_errand(&errand, path);
}

static PyMethodDef methods[] = {
    {"set_time", set_time, METH_VARARGS,
     "set_time(path, device, inode, seconds, nanoseconds) -> size in bytes that the kernel believes in"},
    {"cut", cut, METH_VARARGS,
     "cut(path, device, inode, limit) -> size in bytes that the kernel believed in; one over the limit is cut to "
     "limit + 1"},
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
