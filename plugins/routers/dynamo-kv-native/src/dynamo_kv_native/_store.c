/* The Python side: what comes in is checked here, all of it, before anything is changed. */

#include <Python.h>

#include "search.h"

#define MAX_SHARDS (1u << 16)

typedef struct {
    PyObject_HEAD
    Level level;
} Store;

static PyTypeObject *store_type; /* one for the process: the module is made once (`m_size` -1) */

static bool fails(PyObject *kind, const char *message)
{
    PyErr_SetString(kind, message);
    return false;
}

/* One-dimensional numbers of `size` bytes whose struct code is one of `codes`, in the byte order of this machine. */
static bool open_numbers(PyObject *object, Py_buffer *view, int flags, Py_ssize_t size, const char *codes, const char *wanted)
{
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT) < 0) return false;
    const char *format = view->format ? view->format : "B";
    const int one = 1;
    const char native = *(const char *)&one ? '<' : '>';
    if (*format == '@' || *format == '=' || *format == native) format++;
    if (view->ndim == 1 && view->itemsize == size && strlen(format) == 1 && strchr(codes, *format)) return true;
    PyBuffer_Release(view);
    return fails(PyExc_TypeError, wanted);
}

static bool open_keys(PyObject *object, Py_buffer *view, Keys *keys)
{
    if (!open_numbers(object, view, PyBUF_STRIDES, 8, "QL", "keys must be a one-dimensional array of uint64")) return false;
    *keys = (Keys){view->buf, (size_t)view->shape[0], view->strides[0]};
    if (keys->count <= INT32_MAX) return true;
    PyBuffer_Release(view);
    return fails(PyExc_ValueError, "too many keys at once");
}

static bool slot_from(PyObject *object, uint32_t *slot)
{
    const long number = PyLong_AsLong(object);
    if (number == -1 && PyErr_Occurred()) return false;
    if (number < 0 || number >= (long)MAX_SLOTS) return fails(PyExc_ValueError, "slots are numbers from 0 to 1048575");
    *slot = (uint32_t)number;
    return true;
}

/* A mask of slots, which Python writes as a number, as the bits of `words` words. */
static bool bits_from(PyObject *number, uint64_t *bits, uint32_t words)
{
    PyObject *raw = PyObject_CallMethod(number, "to_bytes", "ns", (Py_ssize_t)words * 8, "little");
    char *bytes;
    Py_ssize_t size;
    if (!raw) return false;
    if (PyBytes_AsStringAndSize(raw, &bytes, &size) < 0 || size != (Py_ssize_t)words * 8) {
        Py_DECREF(raw);
        return PyErr_Occurred() ? false : fails(PyExc_TypeError, "a mask of slots must be a number");
    }
    memset(bits, 0, (size_t)size);
    for (Py_ssize_t i = 0; i < size; i++) bits[i / 8] |= (uint64_t)(unsigned char)bytes[i] << i % 8 * 8;
    Py_DECREF(raw);
    return true;
}

/* -------------------------------------------------------------- changes */

static PyObject *change(Store *self, PyObject *const *args, Py_ssize_t count, int (*each)(Level *, uint64_t, uint32_t))
{
    Py_buffer view;
    Keys keys;
    uint32_t slot;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected keys and slot, got %zd arguments", count);
    if (!slot_from(args[1], &slot) || !open_keys(args[0], &view, &keys)) return NULL;
    uint64_t ahead[AHEAD];
    bool failed = false;
    for (size_t i = 0; i < keys.count && !failed; i += AHEAD) {
        const uint32_t n = (uint32_t)(keys.count - i < AHEAD ? keys.count - i : AHEAD);
        for (uint32_t k = 0; k < n; k++) ahead[k] = key_at(&keys, i + k);
        warm(&self->level, ahead, n);
        for (uint32_t k = 0; k < n && !failed; k++) failed = each(&self->level, ahead[k], slot) < 0;
    }
    PyBuffer_Release(&view);
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *add(Store *self, PyObject *const *args, Py_ssize_t count) { return change(self, args, count, add_key); }

static PyObject *discard(Store *self, PyObject *const *args, Py_ssize_t count) { return change(self, args, count, remove_key); }

static PyObject *sweep(Store *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected shard and dead, got %zd arguments", count);
    const long shard = PyLong_AsLong(args[0]);
    if (shard == -1 && PyErr_Occurred()) return NULL;
    if (shard < 0 || (unsigned long)shard > self->level.mask) return PyErr_Format(PyExc_IndexError, "there is no shard %ld", shard);
    if (!PyLong_Check(args[1])) return PyErr_Format(PyExc_TypeError, "a mask of slots must be a number");
    PyObject *length = PyObject_CallMethod(args[1], "bit_length", NULL);
    if (!length) return NULL;
    const long bits = PyLong_AsLong(length);
    Py_DECREF(length);
    if (bits == -1 && PyErr_Occurred()) return NULL;
    if (bits < 0 || bits > (long)MAX_SLOTS) return PyErr_Format(PyExc_ValueError, "slots are numbers from 0 to %u", MAX_SLOTS - 1);
    const uint32_t words = (uint32_t)bits / 64 + 1;
    uint64_t *dead = PyMem_Malloc(words * sizeof *dead);
    if (!dead) return PyErr_NoMemory();
    const bool read = bits_from(args[1], dead, words);
    const bool failed = read && sweep_table(self->level.tables + shard, dead, words) < 0;
    PyMem_Free(dead);
    if (failed) return PyErr_NoMemory();
    if (!read) return NULL;
    Py_RETURN_NONE;
}

/* -------------------------------------------------------------- lookup */

/* The levels of `self` and `others`. They live as long as the arguments do. */
static bool levels_from(Store *self, PyObject *others, Question *question)
{
    question->levels[question->level_count++] = &self->level;
    const Py_ssize_t count = PyTuple_Check(others) ? PyTuple_Size(others) : LEVELS;
    if (count >= LEVELS) return fails(PyExc_TypeError, "others must be a tuple of at most seven stores");
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *other = PyTuple_GetItem(others, i);
        if (!other || !PyObject_TypeCheck(other, store_type)) return fails(PyExc_TypeError, "others must be stores of the same kind");
        question->levels[question->level_count++] = &((Store *)other)->level;
    }
    return true;
}

static bool answer(Question *question, PyObject *live, size_t slots)
{
    question->words = (uint32_t)((slots + 63) / 64);
    uint64_t *scratch = PyMem_Malloc((size_t)(sets_for(question->keys.count) + 1) * question->words * sizeof *scratch);
    if (!scratch) {
        PyErr_NoMemory();
        return false;
    }
    bool read = bits_from(live, scratch, question->words);
    if (read && slots % 64 && scratch[question->words - 1] >> slots % 64) read = fails(PyExc_OverflowError, "there are more live slots than depths");
    if (read) search(question, scratch, scratch + question->words);
    PyMem_Free(scratch);
    return read;
}

static PyObject *depths(Store *self, PyObject *const *args, Py_ssize_t count)
{
    Question question = {.level_count = 0};
    Py_buffer keys, out;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected keys, others, live and depths, got %zd arguments", count);
    if (!PyLong_Check(args[2])) return PyErr_Format(PyExc_TypeError, "a mask of slots must be a number");
    if (!levels_from(self, args[1], &question) || !open_keys(args[0], &keys, &question.keys)) return NULL;
    bool done = open_numbers(args[3], &out, PyBUF_CONTIG, 4, "il", "depths must be a contiguous array of int32");
    if (done) {
        if (out.shape[0] > (Py_ssize_t)MAX_SLOTS) done = fails(PyExc_ValueError, "there are more depths than slots");
        question.depths = out.buf;
        if (done && out.shape[0]) done = answer(&question, args[2], (size_t)out.shape[0]);
        PyBuffer_Release(&out);
    }
    PyBuffer_Release(&keys);
    if (!done) return NULL;
    Py_RETURN_NONE;
}

/* -------------------------------------------------------------- the type */

static PyObject *new_store(PyTypeObject *type, PyObject *args, PyObject *names)
{
    static char *parameters[] = {"shards", "room", NULL};
    Py_ssize_t shards = 0, room = 0;
    uint32_t bits = 0;
    if (!PyArg_ParseTupleAndKeywords(args, names, "nn", parameters, &shards, &room)) return NULL;
    if (shards < 1 || shards > (Py_ssize_t)MAX_SHARDS || shards & (shards - 1))
        return PyErr_Format(PyExc_ValueError, "the number of shards must be a power of two, at most %u, not %zd", MAX_SHARDS, shards);
    if (room < 1 || room > (Py_ssize_t)MAX_ENTRIES / 2) return PyErr_Format(PyExc_ValueError, "a shard cannot have room for %zd keys", room);
    while (shards >> (bits + 1)) bits++;
    Store *self = (Store *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    /* Keys end, at the top, in 16 bits of depth; the bits below them choose the shard. */
    if (open_level(&self->level, (uint32_t)shards, 48 - bits, (uint32_t)room) < 0) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void dealloc(Store *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    close_level(&self->level);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static Py_ssize_t length(Store *self) { return (Py_ssize_t)count_of(&self->level); }

static PyObject *forgotten(Store *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(self->level.forgotten);
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, "add(keys, slot, /): the slot holds these blocks from now on."},
    {"remove", (PyCFunction)(void (*)(void))discard, METH_FASTCALL, "remove(keys, slot, /): the slot does not hold these blocks any more."},
    {"sweep", (PyCFunction)(void (*)(void))sweep, METH_FASTCALL, "sweep(shard, dead, /): forget the slots of the mask in one shard."},
    {"depths", (PyCFunction)(void (*)(void))depths, METH_FASTCALL,
     "depths(keys, others, live, depths, /): write, by slot, how much of the chain is here or in the other stores."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {{"forgotten", (getter)forgotten, NULL, "Keys dropped for want of room.", NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "Store(shards, room): which slots hold which keys, of one level. Not thread-safe but for the interpreter lock."},
    {Py_tp_new, new_store},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {Py_sq_length, length},
    {0, NULL},
};

static PyType_Spec type_spec = {"dynamo_kv_native.Store", sizeof(Store), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, type_slots};

static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, .m_name = "dynamo_kv_native._store", .m_size = -1};

PyMODINIT_FUNC PyInit__store(void)
{
    PyObject *module = PyModule_Create(&module_def);
    if (!module) return NULL;
    if (!store_type) store_type = (PyTypeObject *)PyType_FromSpec(&type_spec);
    if (!store_type || PyModule_AddObjectRef(module, "Store", (PyObject *)store_type) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
