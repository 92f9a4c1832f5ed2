/* SPDX-License-Identifier: MIT */
/* The extension module hex._C: registers the operators of ops.c with torch, and has two facts for
 * Python. Fakes, batching rules and autograd are registered in hex/ops.py. */
#include <Python.h>
#include <stdlib.h>

#include "device.h"
#include "ops.h"

/* These handles live as long as the process: deleting one would take its registrations back. */
static TorchLibraryHandle definitions, cpu;

static bool register_kernels(TorchLibraryHandle library)
{
    for (int i = 0; i < HEX_OPERATORS; i++)
        if (torch_library_impl(library, hex_operators[i].name, hex_operators[i].kernel,
                               HEX_TORCH_ABI))
            return false;
    return true;
}

static bool register_operators(void)
{
    if (aoti_torch_library_init_def("hex", __FILE__, __LINE__, &definitions) ||
        aoti_torch_library_init_impl("hex", "CPU", __FILE__, __LINE__, &cpu))
        return false;
    for (int i = 0; i < HEX_OPERATORS; i++)
        if (aoti_torch_library_def(definitions, hex_operators[i].schema))
            return false;
    return register_kernels(cpu);
}

/* The CUDA core, if it can be had, and its operators with it. */
static PyObject *load_cuda(PyObject *self, PyObject *path)
{
    static TorchLibraryHandle library; /* as those above */
    static bool registered;
    PyObject *bytes = NULL;
    (void)self;
    if (path != Py_None && !PyUnicode_FSConverter(path, &bytes))
        return NULL;
    const char *problem = hex_load_cuda(bytes ? PyBytes_AsString(bytes) : NULL);
    Py_XDECREF(bytes);
    if (problem)
        return PyUnicode_FromString(problem);
    if (bytes && !hex_cuda_is_emulated() && !registered) {
        registered = !aoti_torch_library_init_impl("hex", "CUDA", __FILE__, __LINE__, &library) &&
                     register_kernels(library);
        if (!registered)
            return PyUnicode_FromString("its operators could not be registered with torch");
    }
    Py_RETURN_NONE;
}

static PyObject *probe_cuda(PyObject *self, PyObject *index)
{
    const long device = PyLong_AsLong(index);
    (void)self;
    if (device == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromLong(hex_probe_cuda((int)device));
}

static const char *isa, *isa_problem;

static PyObject *get_isa(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(isa);
}

static PyObject *get_isa_problem(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    if (isa_problem)
        return PyUnicode_FromString(isa_problem);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"isa", get_isa, METH_NOARGS,
     "isa() -> str\n\nThe level of the CPU kernels in use: base, neon, avx2, avx512, "
     "avx512_bf16 or avx512_amx."},
    {"isa_problem", get_isa_problem, METH_NOARGS,
     "isa_problem() -> str | None\n\nWhy it is not the level that HEX_ISA asks for."},
    {"load_cuda", load_cuda, METH_O,
     "load_cuda(path) -> str | None\n\nTakes hex/_cuda.so into use; or says what is in the way."},
    {"probe_cuda", probe_cuda, METH_O,
     "probe_cuda(index) -> int\n\n0, or the CUDA error that keeps hex/_cuda.so from a device."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "hex._C",
    .m_doc = "Kernels of hex-ssl; importing this registers torch.ops.hex.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__C(void)
{
    const char *missing = hex_missing_symbol(), *wanted = getenv("HEX_ISA");
    if (missing)
        return PyErr_Format(
            PyExc_ImportError,
            "hex-ssl needs torch >= 2.10: the torch that is loaded has no symbol %s", missing);
    isa = hex_cpu_select(wanted, &isa_problem);
    if (!isa)
        return PyErr_Format(PyExc_ImportError, "HEX_ISA: got '%s', %s", wanted, isa_problem);
    if (isa_problem && PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "HEX_ISA=%s: %s; using %s", wanted,
                                        isa_problem, isa))
        return NULL;
    if (!hex_watch_forks())
        return PyErr_NoMemory();
    if (!register_operators())
        return PyErr_Format(PyExc_ImportError,
                            "hex-ssl could not register its operators with torch");
    return PyModule_Create(&module);
}
