/* PageIndex: a table level's index of pages, as a Python object. See table_pages.PageWatcher. */

#include "layer.h"

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

PyTypeObject PageIndexType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse.native._fastpath.PageIndex",
    .tp_doc = "Where the pages of one level of tables are in memory.",
    .tp_basicsize = sizeof(PageIndex),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = page_index_dealloc,
    .tp_methods = page_index_methods,
    .tp_as_sequence = &page_index_sequence,
};
