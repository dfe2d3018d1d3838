/* Names of KV blocks, as `dynamo_core.kv.hashing` explains them, in one pass. */

#include <Python.h>

#include <stdint.h>
#include <string.h>

#define MAX_DEPTH 0xFFFFu

/* A key is the sum of its chain, written with the first byte first: dictionaries look at the other end. */
static uint64_t sum_from(uint64_t key)
{
    uint8_t bytes[8];
    uint64_t sum = 0;
    memcpy(bytes, &key, 8);
    for (unsigned i = 0; i < 8; i++) sum = sum << 8 | bytes[i];
    return sum;
}

static void write_key(char *out, uint64_t sum)
{
    for (unsigned i = 0; i < 8; i++) out[i] = (char)(sum >> (56 - 8 * i));
}

/* A buffer need not lie where the processor likes numbers to be. */
static uint64_t number_at(const char *numbers, size_t i)
{
    uint64_t number;
    memcpy(&number, numbers + 8 * i, 8);
    return number;
}

static int open_numbers(PyObject *object, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_CONTIG_RO | PyBUF_FORMAT) < 0) return 0;
    const char *format = view->format ? view->format : "B";
    const int one = 1;
    const char native = *(const char *)&one ? '<' : '>';
    if (*format == '@' || *format == '=' || *format == '^' || *format == native) format++;
    if (view->ndim == 1 && view->itemsize == 8 && strlen(format) == 1 && strchr("QL", *format)) return 1;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_TypeError, "expected a contiguous array of uint64");
    return 0;
}

static PyObject *named(const Py_buffer *tokens, const Py_buffer *per_token, const Py_buffer *per_depth, uint64_t sum)
{
    const size_t width = (size_t)per_token->shape[0], deep = (size_t)per_depth->shape[0], depth = sum & MAX_DEPTH;
    if (!width || deep > MAX_DEPTH || depth > deep) return PyErr_Format(PyExc_ValueError, "there is no block at depth %zu of %zu", depth, deep);
    size_t count = (size_t)tokens->shape[0] / width;
    if (count > deep - depth) count = deep - depth;
    PyObject *keys = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)count * 8);
    if (!keys) return NULL;
    char *out = PyByteArray_AsString(keys);
    const char *token = tokens->buf;
    for (size_t block = 0; block < count; block++, token += 8 * width) {
        uint64_t x = 0;
        for (size_t k = 0; k < width; k++) x += number_at(per_token->buf, k) * number_at(token, k);
        sum += (number_at(per_depth->buf, depth + block) * x & ~(uint64_t)MAX_DEPTH) + 1;
        write_key(out + 8 * block, sum);
    }
    return keys;
}

static PyObject *name_blocks(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    Py_buffer views[3];
    PyObject *keys = NULL;
    int opened = 0;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected tokens, per_token, per_depth and parent, got %zd arguments", count);
    const uint64_t parent = PyLong_AsUnsignedLongLong(args[3]);
    if (parent == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    while (opened < 3 && open_numbers(args[opened], views + opened)) opened++;
    if (opened == 3) keys = named(views, views + 1, views + 2, sum_from(parent));
    while (opened) PyBuffer_Release(views + --opened);
    return keys;
}

static PyMethodDef functions[] = {
    {"name_blocks", (PyCFunction)(void (*)(void))name_blocks, METH_FASTCALL,
     "name_blocks(tokens, per_token, per_depth, parent, /): a key for each full block of tokens, 8 bytes each in this machine's order."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, .m_name = "dynamo_kv_native._names", .m_size = 0, .m_methods = functions};

PyMODINIT_FUNC PyInit__names(void) { return PyModuleDef_Init(&module_def); }
