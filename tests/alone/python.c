/* SPDX-License-Identifier: MIT */
/* What python.h declares, and the functions that stand in for Python's. An object is its text, and is
 * never freed. */
#include "python.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

char python_error[1000];
bool warnings_are_errors;

typedef struct {
    PyObject_HEAD char text[1000];
} object_t;

static object_t import_error, runtime_warning;
PyObject *PyExc_ImportError = (PyObject *)&import_error,
         *PyExc_RuntimeWarning = (PyObject *)&runtime_warning;
PyObject _Py_NoneStruct;

static PyObject *object_of(const char *text)
{
    static object_t objects[8];
    static int next;
    object_t *o = &objects[next++ % 8];
    o->ob_base.ob_refcnt = 1000;
    snprintf(o->text, sizeof o->text, "%s", text);
    return (PyObject *)o;
}

PyObject *PyUnicode_FromString(const char *text) { return object_of(text); }

int PyUnicode_FSConverter(PyObject *path, void *out)
{
    if (((object_t *)path)->text[0] == 0) {
        snprintf(python_error, sizeof python_error, "no path");
        return 0;
    }
    *(PyObject **)out = object_of(((object_t *)path)->text);
    return 1;
}

char *PyBytes_AsString(PyObject *bytes) { return ((object_t *)bytes)->text; }

PyObject *PyLong_FromLong(long number)
{
    char text[32];
    snprintf(text, sizeof text, "%ld", number);
    return object_of(text);
}

long PyLong_AsLong(PyObject *number)
{
    char *end;
    const long value = strtol(((object_t *)number)->text, &end, 10);
    if (*end)
        snprintf(python_error, sizeof python_error, "no number");
    return *end ? -1 : value;
}

PyObject *PyErr_Occurred(void) { return python_error[0] ? PyExc_ImportError : NULL; }

PyObject *PyErr_Format(PyObject *kind, const char *format, ...)
{
    va_list arguments;
    (void)kind;
    va_start(arguments, format);
    vsnprintf(python_error, sizeof python_error, format, arguments);
    va_end(arguments);
    return NULL;
}

int PyErr_WarnFormat(PyObject *kind, Py_ssize_t level, const char *format, ...)
{
    va_list arguments;
    (void)kind, (void)level;
    va_start(arguments, format);
    if (warnings_are_errors)
        vsnprintf(python_error, sizeof python_error, format, arguments);
    va_end(arguments);
    return warnings_are_errors ? -1 : 0;
}

PyObject *PyErr_NoMemory(void) { return PyErr_Format(NULL, "no memory"); }

void _Py_Dealloc(PyObject *object) { (void)object; }

static PyModuleDef *module;

PyObject *PyModule_Create2(PyModuleDef *definition, int version)
{
    (void)version;
    module = definition;
    return object_of("module");
}

bool import_extension(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    PyObject *(*init)(void) = NULL;
    python_error[0] = 0;
    if (library) /* as POSIX has it, for ISO C knows no way from an object to a function */
        *(void **)&init = dlsym(library, "PyInit__C");
    if (!init) {
        PyErr_Format(NULL, "%s", dlerror());
        return false;
    }
    watch_allocations(*(void **)&init);
    return init() != NULL;
}

const char *call_module(const char *function, const char *argument)
{
    python_error[0] = 0;
    for (PyMethodDef *m = module->m_methods; m->ml_name; m++)
        if (strcmp(m->ml_name, function) == 0) {
            PyObject *r = m->ml_meth(NULL, argument ? object_of(argument) : Py_None);
            return !r ? "" : r == Py_None ? "None" : ((object_t *)r)->text;
        }
    abort();
}
