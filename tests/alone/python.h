/* SPDX-License-Identifier: MIT */
/* A stand-in for the few functions of Python that the extension's module calls. */
#ifndef ALONE_PYTHON_H
#define ALONE_PYTHON_H

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdbool.h>

/* The last exception's text, or "". */
extern char python_error[1000];
/* Whether a warning is an exception. */
extern bool warnings_are_errors;

/* Loads the extension and calls its PyInit; false: that has failed, and python_error says how. */
bool import_extension(const char *path);
/* What a function of the module returns: its text or its number as a text, "None", or "" after an
 * exception. argument: a path, a number as a text, or NULL for None. */
const char *call_module(const char *function, const char *argument);

#endif
