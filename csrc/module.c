/* SPDX-License-Identifier: MIT */
/* The extension module hex._C: the schemas of torch.ops.hex, which function serves which device,
 * and two facts for Python. Fakes, batching rules and autograd are registered in hex/ops.py.
 *
 * eps and tau are tensors, never numbers: a number that changes every step would recompile a
 * compiled graph, and one read from a tensor would wait for the device. No str and no optional in a
 * schema: torch leaks the one and frees the other only from 2.13 on. */
#include <Python.h>
#include <stdlib.h>

#include "device.h"
#include "ops.h"

static const char *const schemas[] = {
    "forward(Tensor z0, Tensor z1, Tensor negatives, Tensor eps, Tensor tau, int mode, int "
    "reduction, int variant, "
    "float beta, float tau_plus) -> (Tensor loss, Tensor stats)",
    "backward(Tensor grad, Tensor z0, Tensor z1, Tensor negatives, Tensor tau, Tensor stats, int "
    "mode, int reduction, "
    "float beta, int needs) -> (Tensor dz0, Tensor dz1, Tensor dnegatives, Tensor dtau)",
    "threshold(Tensor z0, Tensor z1, Tensor negatives, int mode, float quantile, bool "
    "over_negatives) -> Tensor",
    "row_range(Tensor z0, Tensor z1, Tensor negatives, int mode) -> (Tensor low, Tensor high)",
};

static const struct {
    const char *name;
    void (*kernel)(StableIValue *, uint64_t, uint64_t);
} cpu_kernels[] = {
    /* those with a CUDA kernel first */
    {"forward", hex_forward_boxed},
    {"backward", hex_backward_boxed},
    {"threshold", hex_threshold_boxed},
    {"row_range", hex_row_range_boxed},
};

#define CUDA_KERNELS 4

/* The library handles live as long as the process: deleting one would take its registrations back.
 */
static TorchLibraryHandle definitions, cpu;

static bool register_operators(void)
{
    if (aoti_torch_library_init_def("hex", __FILE__, __LINE__, &definitions) ||
        aoti_torch_library_init_impl("hex", "CPU", __FILE__, __LINE__, &cpu))
        return false;
    for (size_t i = 0; i < sizeof schemas / sizeof *schemas; i++)
        if (aoti_torch_library_def(definitions, schemas[i]))
            return false;
    for (size_t i = 0; i < sizeof cpu_kernels / sizeof *cpu_kernels; i++)
        if (torch_library_impl(cpu, cpu_kernels[i].name, cpu_kernels[i].kernel, HEX_TORCH_ABI))
            return false;
    return true;
}

/* The CUDA core, if it can be had, and its operators with it. */
static PyObject *load_cuda(PyObject *self, PyObject *path)
{
    static TorchLibraryHandle library;
    PyObject *bytes = NULL;
    (void)self;
    if (path != Py_None && !PyUnicode_FSConverter(path, &bytes))
        return NULL;
    const char *problem = hex_load_cuda(bytes ? PyBytes_AsString(bytes) : NULL);
    Py_XDECREF(bytes);
    if (problem)
        return PyUnicode_FromString(problem);
    if (bytes && !hex_cuda_is_emulated() && !library) {
        bool done = !aoti_torch_library_init_impl("hex", "CUDA", __FILE__, __LINE__, &library);
        for (size_t i = 0; done && i < CUDA_KERNELS; i++)
            done = !torch_library_impl(library, cpu_kernels[i].name, cpu_kernels[i].kernel,
                                       HEX_TORCH_ABI);
        if (!done)
            return PyUnicode_FromString("its operators could not be registered with torch");
    }
    Py_RETURN_NONE;
}

static const char *isa;

static PyObject *get_isa(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(isa);
}

static PyMethodDef methods[] = {
    {"isa", get_isa, METH_NOARGS,
     "isa() -> str\n\nThe level of the CPU kernels in use: base, avx2 or avx512."},
    {"load_cuda", load_cuda, METH_O,
     "load_cuda(path) -> str | None\n\nTakes hex/_cuda.so into use; or says what is in the way."},
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
    const char *missing = hex_missing_symbol(), *wanted = getenv("HEX_ISA"), *problem;
    if (missing)
        return PyErr_Format(
            PyExc_ImportError,
            "hex-ssl needs torch >= 2.10: the torch that is loaded has no symbol %s", missing);
    isa = hex_cpu_select(wanted, &problem);
    if (!isa)
        return PyErr_Format(PyExc_ImportError, "HEX_ISA=%s: %s", wanted, problem);
    if (problem &&
        PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "HEX_ISA=%s: %s; using %s", wanted, problem, isa))
        return NULL;
    if (!hex_watch_forks())
        return PyErr_NoMemory();
    if (!register_operators())
        return PyErr_Format(PyExc_ImportError,
                            "hex-ssl could not register its operators with torch");
    return PyModule_Create(&module);
}
