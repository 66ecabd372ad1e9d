/*
 * The inner loop of a check: a map of an image file's clusters, in which chunks of L2 entries are marked.
 *
 * A check looks at every entry of every table, 16 million of them for a full image of 1 TiB, in whatever order the
 * guest happened to write. Here that takes a few nanoseconds each, about a tenth of a millisecond a chunk: the GIL is
 * kept.
 *
 * Entries come from a file that is not to be trusted. An entry is used as an index only after it was found to be a
 * cluster that can be marked, and the only memory that it then leads to is the map's own.
 *
 * Memory: one bit for every cluster, in parts that exist once something in them is marked. How many there may be is the
 * caller's to say; what would need more is refused with OverflowError.
 *
 * Source: QEMU docs/interop/qed_spec (entries are little-endian; 0 is unallocated, 1 a cluster of zeroes).
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

enum {
    WORD_BITS = 6,
    WORD = 1 << WORD_BITS,
    PART_BITS = 26, /* clusters in a part, as a power of two: 8 MiB of memory */
    RECENT = 16,    /* parts that a loop finds without a search */
    BLOCK = 256,    /* entries that are handled together */
    ZERO = 1,       /* the largest entry that is no offset */
};

struct part {
    uint64_t number; /* its first cluster, shifted by PART_BITS */
    uint64_t *words; /* cluster c: bit c % 64 of word c / 64 */
};

typedef struct {
    PyObject_HEAD
    unsigned long long clusters; /* smaller numbers can be marked */
    unsigned long long marked;
    uint64_t start;        /* where data and tables may begin */
    unsigned cluster_bits; /* log2 of bytes */
    size_t part_words;     /* of every part; fewer than 2^PART_BITS bits if the file has fewer clusters */
    struct part *parts;    /* ascending */
    size_t used, most;
} Bitmap;

/* -- parts --------------------------------------------------------------------------------------------------------- */

/* The first part with this number or a larger one. */
static size_t part_place(const Bitmap *self, uint64_t number)
{
    size_t low = 0, high = self->used;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (self->parts[middle].number < number)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The words of a part, made if need be. NULL and an exception if that cannot be. */
static uint64_t *part_words(Bitmap *self, uint64_t number)
{
    size_t place = part_place(self, number);
    if (place < self->used && self->parts[place].number == number)
        return self->parts[place].words;
    if (self->used >= self->most) {
        PyErr_SetString(PyExc_OverflowError, "too many parts");
        return NULL;
    }
    struct part *parts = PyMem_RawRealloc(self->parts, (self->used + 1) * sizeof *parts);
    if (parts)
        self->parts = parts;
    uint64_t *words = parts ? PyMem_RawCalloc(self->part_words, sizeof *words) : NULL;
    if (!words) {
        PyErr_NoMemory();
        return NULL;
    }
    memmove(parts + place + 1, parts + place, (self->used - place) * sizeof *parts);
    parts[place] = (struct part){number, words};
    self->used++;
    return words;
}

/* The word with the bit of a cluster, which must be one of the map's. NULL and an exception if there can be none.
 * `recent` has RECENT places, empty at first: where the order of clusters is random, searching would take most of the
 * time. */
static inline uint64_t *find_word(Bitmap *self, struct part *recent, uint64_t cluster)
{
    uint64_t number = cluster >> PART_BITS;
    struct part *part = &recent[number % RECENT];
    if (part->number != number || !part->words) {
        uint64_t *words = part_words(self, number);
        if (!words)
            return NULL;
        *part = (struct part){number, words};
    }
    return &part->words[(cluster & ((1 << PART_BITS) - 1)) >> WORD_BITS];
}

/* Sets a bit. Returns whether it was set before. */
static inline bool set(uint64_t *word, unsigned bit)
{
    uint64_t before = *word;
    *word = before | UINT64_C(1) << bit;
    return before >> bit & 1;
}

/* -- marking ------------------------------------------------------------------------------------------------------- */

static PyObject *bitmap_mark(PyObject *object, PyObject *args)
{
    Bitmap *self = (Bitmap *)object;
    unsigned long long first, number, again = 0;
    if (!PyArg_ParseTuple(args, "KK:mark", &first, &number))
        return NULL;
    if (first > self->clusters || number > self->clusters - first) {
        PyErr_SetString(PyExc_ValueError, "not in the map");
        return NULL;
    }
    struct part recent[RECENT] = {{0, NULL}};
    for (uint64_t cluster = first; cluster < first + number; cluster++) {
        uint64_t *word = find_word(self, recent, cluster);
        if (!word)
            return NULL;
        bool before = set(word, cluster % WORD);
        again += before;
        self->marked += !before;
    }
    return PyLong_FromUnsignedLongLong(again);
}

static bool append(PyObject *list, Py_ssize_t position)
{
    PyObject *number = PyLong_FromSsize_t(position);
    bool done = number && PyList_Append(list, number) == 0;
    Py_XDECREF(number);
    return done;
}

/* What marking entries has found so far; see cluster_map.Marks. */
struct marks {
    Py_ssize_t allocated, fragmented;
    uint64_t last;
    PyObject *invalid, *again; /* lists */
};

/* Marks entries `start` to `end` of a chunk, at most BLOCK. Returns false and an exception if that cannot be.
 *
 * In two passes: in a large map and in random order each entry costs a trip to memory. The first pass asks for all that
 * the second needs, so that these trips overlap; as one loop it is two or three times slower. */
static bool mark_block(Bitmap *self, struct part *recent, struct marks *marks, const char *chunk, Py_ssize_t start,
                       Py_ssize_t end)
{
    struct {
        uint64_t *word;
        unsigned bit, position;
    } valid[BLOCK];
    const uint64_t size = UINT64_C(1) << self->cluster_bits;
    struct marks found = *marks;
    unsigned number = 0;
    for (Py_ssize_t position = start; position < end; position++) {
        uint64_t entry;
        memcpy(&entry, chunk + position * (Py_ssize_t)sizeof entry, sizeof entry);
        entry = le64toh(entry);
        if (entry <= ZERO)
            continue;
        found.allocated++;
        found.fragmented += found.last && entry != found.last + size;
        found.last = entry;
        uint64_t cluster = entry >> self->cluster_bits;
        if (entry & (size - 1) || cluster < self->start || cluster >= self->clusters) {
            if (!append(found.invalid, position))
                return false;
            continue;
        }
        uint64_t *word = find_word(self, recent, cluster);
        if (!word)
            return false;
        __builtin_prefetch(word, 1);
        valid[number].word = word;
        valid[number].bit = cluster % WORD;
        valid[number++].position = (unsigned)(position - start);
    }
    self->marked += number;
    for (unsigned i = 0; i < number; i++) {
        if (!set(valid[i].word, valid[i].bit))
            continue;
        self->marked--;
        if (!append(found.again, start + valid[i].position))
            return false;
    }
    *marks = found;
    return true;
}

static PyObject *bitmap_mark_entries(PyObject *object, PyObject *args)
{
    Py_buffer chunk;
    unsigned long long last = 0;
    if (!PyArg_ParseTuple(args, "y*|K:mark_entries", &chunk, &last))
        return NULL;
    struct marks marks = {.last = last, .invalid = PyList_New(0), .again = PyList_New(0)};
    struct part recent[RECENT] = {{0, NULL}};
    Py_ssize_t number = chunk.len / (Py_ssize_t)sizeof(uint64_t);
    bool done = marks.invalid && marks.again;
    for (Py_ssize_t start = 0; done && start < number; start += BLOCK)
        done = mark_block((Bitmap *)object, recent, &marks, chunk.buf, start,
                          number - start < BLOCK ? number : start + BLOCK);
    PyObject *result = NULL;
    if (done)
        result = Py_BuildValue("nnKOO", marks.allocated, marks.fragmented, (unsigned long long)marks.last,
                               marks.invalid, marks.again);
    Py_XDECREF(marks.invalid);
    Py_XDECREF(marks.again);
    PyBuffer_Release(&chunk);
    return result;
}

/* -- looking ------------------------------------------------------------------------------------------------------- */

/* The first cluster at or behind `cluster` that is marked, or not marked; the number of clusters if there is none. */
static uint64_t find(const Bitmap *self, uint64_t cluster, bool marked)
{
    for (size_t place = part_place(self, cluster >> PART_BITS); cluster < self->clusters; place++) {
        uint64_t base = place < self->used ? self->parts[place].number << PART_BITS : self->clusters;
        if (cluster < base) {
            if (!marked)
                return cluster;
            cluster = base;
            if (place == self->used)
                break;
        }
        const uint64_t *words = self->parts[place].words;
        uint64_t skip = UINT64_MAX << (cluster & (WORD - 1));
        for (size_t i = (cluster - base) >> WORD_BITS; i < self->part_words; i++, skip = UINT64_MAX) {
            uint64_t word = (marked ? words[i] : ~words[i]) & skip;
            if (word) {
                cluster = base + (i << WORD_BITS) + (unsigned)__builtin_ctzll(word);
                return cluster < self->clusters ? cluster : self->clusters;
            }
        }
        cluster = base + (UINT64_C(1) << PART_BITS);
    }
    return self->clusters;
}

static PyObject *bitmap_find(PyObject *object, PyObject *argument, bool marked)
{
    unsigned long long cluster = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(find((Bitmap *)object, cluster, marked));
}

static PyObject *bitmap_next_marked(PyObject *object, PyObject *cluster)
{
    return bitmap_find(object, cluster, true);
}

static PyObject *bitmap_next_free(PyObject *object, PyObject *cluster)
{
    return bitmap_find(object, cluster, false);
}

/* The cluster behind the last one below `before` that is marked, or not marked; 0 if there is none. */
static uint64_t find_end(const Bitmap *self, uint64_t before, bool marked)
{
    if (before > self->clusters)
        before = self->clusters;
    while (before) {
        uint64_t last = before - 1, number = last >> PART_BITS;
        size_t place = part_place(self, number);
        if (place == self->used || self->parts[place].number != number) { /* nothing is marked in this part */
            if (!marked)
                return before;
            if (!place)
                return 0;
            before = (self->parts[place - 1].number + 1) << PART_BITS;
            continue;
        }
        const uint64_t base = number << PART_BITS, *words = self->parts[place].words;
        uint64_t keep = UINT64_MAX >> (WORD - 1 - last % WORD);
        for (size_t i = ((last - base) >> WORD_BITS) + 1; i-- > 0; keep = UINT64_MAX) {
            uint64_t word = (marked ? words[i] : ~words[i]) & keep;
            if (word)
                return base + ((i + 1) << WORD_BITS) - (unsigned)__builtin_clzll(word);
        }
        before = base;
    }
    return 0;
}

static PyObject *bitmap_find_end(PyObject *object, PyObject *args, bool marked)
{
    const Bitmap *self = (Bitmap *)object;
    unsigned long long before = self->clusters;
    if (!PyArg_ParseTuple(args, "|K", &before))
        return NULL;
    return PyLong_FromUnsignedLongLong(find_end(self, before, marked));
}

static PyObject *bitmap_end_of_marked(PyObject *object, PyObject *args)
{
    return bitmap_find_end(object, args, true);
}

static PyObject *bitmap_end_of_free(PyObject *object, PyObject *args)
{
    return bitmap_find_end(object, args, false);
}

/* How many clusters below this one are marked. */
static PyObject *bitmap_marked_below(PyObject *object, PyObject *argument)
{
    const Bitmap *self = (Bitmap *)object;
    unsigned long long end = PyLong_AsUnsignedLongLong(argument), number = 0;
    if (PyErr_Occurred())
        return NULL;
    for (size_t place = 0; place < self->used; place++) {
        uint64_t base = self->parts[place].number << PART_BITS;
        const uint64_t *words = self->parts[place].words;
        for (size_t i = 0; i < self->part_words && base + (i << WORD_BITS) < end; i++) {
            uint64_t left = end - base - (i << WORD_BITS);
            number += (unsigned)__builtin_popcountll(left < WORD ? words[i] & ((UINT64_C(1) << left) - 1) : words[i]);
        }
    }
    return PyLong_FromUnsignedLongLong(number);
}

/* Where in a chunk of L2 entries those are that refer to marked clusters. */
static PyObject *bitmap_find_entries(PyObject *object, PyObject *argument)
{
    const Bitmap *self = (Bitmap *)object;
    Py_buffer chunk;
    if (PyObject_GetBuffer(argument, &chunk, PyBUF_SIMPLE))
        return NULL;
    PyObject *found = PyList_New(0);
    const uint64_t offset_mask = (UINT64_C(1) << self->cluster_bits) - 1;
    const struct part *part = NULL;
    for (Py_ssize_t position = 0; found && position < chunk.len / (Py_ssize_t)sizeof(uint64_t); position++) {
        uint64_t entry;
        memcpy(&entry, (const char *)chunk.buf + position * (Py_ssize_t)sizeof entry, sizeof entry);
        entry = le64toh(entry);
        uint64_t cluster = entry >> self->cluster_bits, number = cluster >> PART_BITS;
        if (entry <= ZERO || entry & offset_mask || cluster >= self->clusters)
            continue;
        if (!part || part->number != number) {
            size_t place = part_place(self, number);
            if (place == self->used || self->parts[place].number != number)
                continue;
            part = &self->parts[place];
        }
        uint64_t word = part->words[(cluster & ((1 << PART_BITS) - 1)) >> WORD_BITS];
        if (word >> cluster % WORD & 1 && !append(found, position))
            Py_CLEAR(found);
    }
    PyBuffer_Release(&chunk);
    return found;
}

/* -- the type and the module --------------------------------------------------------------------------------------- */

static PyObject *bitmap_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"clusters", "start", "cluster_bits", "parts", NULL};
    unsigned long long clusters, start, most;
    unsigned cluster_bits;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "KKIK:Bitmap", names, &clusters, &start, &cluster_bits, &most))
        return NULL;
    if (cluster_bits > 63 || clusters > UINT64_MAX >> cluster_bits || most > PY_SSIZE_T_MAX / sizeof(struct part)) {
        PyErr_SetString(PyExc_ValueError, "not a file's clusters");
        return NULL;
    }
    Bitmap *self = (Bitmap *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    uint64_t in_part = clusters < 1 << PART_BITS ? clusters : 1 << PART_BITS;
    self->clusters = clusters;
    self->start = start;
    self->cluster_bits = cluster_bits;
    self->part_words = (in_part + (1 << WORD_BITS) - 1) >> WORD_BITS;
    self->most = most;
    return (PyObject *)self;
}

static void bitmap_dealloc(PyObject *object)
{
    Bitmap *self = (Bitmap *)object;
    while (self->used)
        PyMem_RawFree(self->parts[--self->used].words);
    PyMem_RawFree(self->parts);
    Py_TYPE(object)->tp_free(object);
}

static PyMethodDef bitmap_methods[] = {
    {"mark", bitmap_mark, METH_VARARGS, "mark(first, number) -> how many of a run were marked before."},
    {"mark_entries", bitmap_mark_entries, METH_VARARGS,
     "mark_entries(chunk, last=0) -> (allocated, fragmented, last, invalid, again), see cluster_map.Marks."},
    {"next_marked", bitmap_next_marked, METH_O,
     "next_marked(cluster) -> the first marked cluster from this one on, or the number of clusters."},
    {"next_free", bitmap_next_free, METH_O,
     "next_free(cluster) -> the first unmarked cluster from this one on, or the number of clusters."},
    {"end_of_marked", bitmap_end_of_marked, METH_VARARGS,
     "end_of_marked(before=clusters) -> the cluster behind the last marked one below `before`; 0: there is none."},
    {"end_of_free", bitmap_end_of_free, METH_VARARGS,
     "end_of_free(before=clusters) -> the cluster behind the last unmarked one below `before`; 0: there is none."},
    {"marked_below", bitmap_marked_below, METH_O,
     "marked_below(cluster) -> how many clusters below this one are marked."},
    {"find_entries", bitmap_find_entries, METH_O,
     "find_entries(chunk) -> positions of the L2 entries that refer to marked clusters, ascending."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef bitmap_members[] = {
    {"clusters", T_ULONGLONG, offsetof(Bitmap, clusters), READONLY, "The file's clusters."},
    {"marked", T_ULONGLONG, offsetof(Bitmap, marked), READONLY, "How many of them are marked."},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject BitmapType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse.native._clustermap.Bitmap",
    .tp_doc = "Bitmap(clusters, start, cluster_bits, parts): nothing is marked.",
    .tp_basicsize = sizeof(Bitmap),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = bitmap_new,
    .tp_dealloc = bitmap_dealloc,
    .tp_methods = bitmap_methods,
    .tp_members = bitmap_members,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qedfuse.native._clustermap",
    .m_doc = "A map of a file's clusters. Used by qedfuse.qed.cluster_map and qedfuse.check.compaction only.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__clustermap(void)
{
    if (PyType_Ready(&BitmapType) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddObjectRef(module, "Bitmap", (PyObject *)&BitmapType) < 0 ||
                   PyModule_AddIntConstant(module, "ENTRY_SIZE", sizeof(uint64_t)) < 0 ||
                   PyModule_AddIntConstant(module, "ZERO_CLUSTER", ZERO) < 0 ||
                   PyModule_AddIntConstant(module, "PART_CLUSTERS", 1L << PART_BITS) < 0))
        Py_CLEAR(module);
    return module;
}
