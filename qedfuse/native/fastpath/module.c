/* The Python module. */

#include "filter.h"
#include "view.h"

static PyObject *bind_library(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:bind", PyUnicode_FSConverter, &path))
        return NULL;
    find_libfuse(PyBytes_AS_STRING(path));
    Py_DECREF(path);
    if (!libfuse.receive_buf || !memory_prepare()) {
        PyErr_SetString(PyExc_OSError, "libfuse's functions were not found");
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
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsK}", "calls", (unsigned long long)count.calls, "reads",
                         (unsigned long long)count.reads, "writes", (unsigned long long)count.writes, "passed",
                         (unsigned long long)count.passed, "missed", (unsigned long long)count.missed, "handed",
                         (unsigned long long)count.handed, "spins", (unsigned long long)spins.tries, "spun",
                         (unsigned long long)spins.met, "waits", (unsigned long long)disk.tries, "waited",
                         (unsigned long long)disk.met);
}

static PyMethodDef methods[] = {
    {"bind", bind_library, METH_VARARGS, "bind(path): find libfuse's functions behind pyfuse3's library."},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "configure(enabled, spin=True, hand_over=None)"},
    {"attach", attach_handle, METH_VARARGS, "attach(fh, layer, writable): answer requests for this handle."},
    {"detach", detach_handle, METH_O, "detach(fh): no longer."},
    {"enter", enter, METH_NOARGS, "enter(): Python begins to work on a request."},
    {"leave", leave, METH_NOARGS, "leave(): it has replied, or will in a moment."},
    {"sync_asked", get_sync_asked, METH_NOARGS,
     "sync_asked(): whether the request passed last is a write that must be durable when it is answered."},
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

PyMODINIT_FUNC PyInit__fastpath(void)
{
    if (!view_prepare() || PyType_Ready(&PageIndexType) < 0 || PyType_Ready(&LayerType) < 0 || PyType_Ready(&SyncerType) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (!module)
        return NULL;
    if (PyModule_AddObjectRef(module, "PageIndex", (PyObject *)&PageIndexType) < 0 ||
        PyModule_AddObjectRef(module, "Layer", (PyObject *)&LayerType) < 0 ||
        PyModule_AddObjectRef(module, "Syncer", (PyObject *)&SyncerType) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
