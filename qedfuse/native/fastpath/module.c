/* The Python module. */

#include "filter.h"
#include "await.h"
#include "counts.h"
#include "handover.h"
#include "handles.h"
#include "memory.h"
#include "negotiate.h"
#include "parked_reads.h"
#include "reply.h"
#include "view.h"

#include <linux/falloc.h>

static PyObject *bind_library(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:bind", PyUnicode_FSConverter, &path))
        return NULL;
    find_libfuse(PyBytes_AS_STRING(path));
    Py_DECREF(path);
    if (!libfuse.receive_buf) {
        PyErr_SetString(PyExc_OSError, "libfuse's functions were not found");
        return NULL;
    }
    if (!memory_prepare())
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *configure(PyObject *Py_UNUSED(module), PyObject *args, PyObject *keywords)
{
    static char *names[] = {"enabled", "spin", "maps", "writeback", "handlers", NULL};
    int on, may_spin = 1, maps = 0, gathers = 0;
    PyObject *handlers = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "p|$pppO:configure", names, &on, &may_spin, &maps, &gathers,
                                     &handlers))
        return NULL;
    enabled = on;
    spinning = may_spin;
    wants_direct_maps = on && maps;
    writeback = gathers;
    hand_to(handlers == Py_None ? NULL : handlers);
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

static PyObject *get_direct_maps(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(direct_maps);
}

static PyObject *attach_handle(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long fh;
    Layer *layer;
    int writable;
    if (!PyArg_ParseTuple(args, "KO!p:attach", &fh, &LayerType, &layer, &writable))
        return NULL;
    if (!layer->view) {
        PyErr_SetString(PyExc_TypeError, "the layer of a handle needs a view");
        return NULL;
    }
    if (!attach(fh, layer, writable))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *suspend_handle(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long fh = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (!attach(fh, NULL, false))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *detach_handle(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long fh = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    detach(fh);
    Py_RETURN_NONE;
}

static PyObject *counters(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    const struct {
        const char *name;
        uint64_t number;
    } all[] = {
        {"calls", count.calls},   {"reads", count.reads},   {"writes", count.writes}, {"syncs", count.syncs},
        {"opens", count.opens},   {"passed", count.passed}, {"missed", count.missed}, {"handed", count.handed},
        {"spins", spins.tries},   {"spun", spins.met},      {"waits", disk.tries},    {"waited", disk.met},
    };
    PyObject *result = PyDict_New();
    for (size_t i = 0; result && i < sizeof all / sizeof *all; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(all[i].number);
        if (!number || PyDict_SetItemString(result, all[i].name, number))
            Py_CLEAR(result);
        Py_XDECREF(number);
    }
    return result;
}

static PyMethodDef methods[] = {
    {"bind", bind_library, METH_VARARGS, "bind(path): find libfuse's functions behind pyfuse3's library."},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "configure(enabled, *, spin=True, maps=False, writeback=False, handlers=None): maps: INIT asks for direct_maps; "
     "writeback: the kernel gathers writes; handlers has a method for each kind of request handed over."},
    {"attach", attach_handle, METH_VARARGS, "attach(fh, layer, writable): answer requests for this handle."},
    {"suspend", suspend_handle, METH_O, "suspend(fh): pass its READs and WRITEs to pyfuse3, until attach."},
    {"detach", detach_handle, METH_O, "detach(fh): no longer."},
    {"enter", enter, METH_NOARGS, "enter(): Python begins to work on a request."},
    {"leave", leave, METH_NOARGS, "leave(): it has replied, or will in a moment."},
    {"sync_asked", get_sync_asked, METH_NOARGS,
     "sync_asked(): whether the request passed last is a write that must be durable when it is answered."},
    {"direct_maps", get_direct_maps, METH_NOARGS,
     "direct_maps(): whether files that are open past the kernel's cache can be mapped shared; known after INIT."},
    {"counters", counters, METH_NOARGS, "counters() -> dict of what was done since loading."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse.native._fastpath",
    .m_doc = "A request filter in front of pyfuse3. Used by qedfuse.fuse.fastpath only.",
    .m_size = -1,
    .m_methods = methods,
};

/* What Python knows, too, and compares; and what tests want to know. */
static bool add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } all[] = {
        {"PAGE_SIZE", PAGE},
        {"PAGE_BITS", PAGE_BITS},
        {"PAGE_ENTRIES", PAGE_ENTRIES},
        {"MAX_CLUSTER_SIZE", 1L << MAX_CLUSTER_BITS},
        {"MAX_TABLE_ENTRIES", 1L << MAX_TABLE_BITS},
        {"MAX_DEPTH", MAX_DEPTH},
        {"MAX_IO", MAX_IO},
        {"UNALLOCATED", UNALLOCATED},
        {"ZERO", ZERO},
        {"DATA", DATA},
        {"ABSENT", ABSENT},
        {"UNKNOWN", UNKNOWN},
        {"FALLOC_FL_KEEP_SIZE", FALLOC_FL_KEEP_SIZE},
        {"FALLOC_FL_PUNCH_HOLE", FALLOC_FL_PUNCH_HOLE},
        {"FALLOC_FL_ZERO_RANGE", FALLOC_FL_ZERO_RANGE},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (PyModule_AddIntConstant(module, all[i].name, all[i].value))
            return false;
    return true;
}

PyMODINIT_FUNC PyInit__fastpath(void)
{
    PyTypeObject *const types[] = {&PageIndexType, &LayerType, &RequestType, &SyncerType};
    PyObject *module = view_prepare() && hand_prepare() ? PyModule_Create(&definition) : NULL;
    for (size_t i = 0; module && i < sizeof types / sizeof *types; i++)
        if (PyModule_AddType(module, types[i]))
            Py_CLEAR(module);
    if (module && !add_constants(module))
        Py_CLEAR(module);
    return module;
}
