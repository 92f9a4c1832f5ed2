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
    "float beta, float tau_plus, bool keep) -> (Tensor loss, Tensor stats, Tensor kept)",
    "adaptive(Tensor z0, Tensor z1, Tensor negatives, Tensor state, Tensor tau, int mode, int "
    "reduction, int variant, float beta, float tau_plus, float quantile, bool over_negatives, "
    "float momentum, bool monotonic, bool lagged, int warmup_epochs, float warmup_threshold, "
    "bool keep) -> (Tensor loss, Tensor stats, Tensor eps, Tensor new_state, Tensor kept)",
    "backward(Tensor grad, Tensor z0, Tensor z1, Tensor negatives, Tensor tau, Tensor stats, "
    "Tensor "
    "kept, int mode, int reduction, "
    "float beta, int needs) -> (Tensor dz0, Tensor dz1, Tensor dnegatives, Tensor dtau)",
    "threshold(Tensor z0, Tensor z1, Tensor negatives, int mode, float quantile, bool "
    "over_negatives) -> Tensor",
    "row_range(Tensor z0, Tensor z1, Tensor negatives, int mode) -> (Tensor low, Tensor high)",
    "labelled_forward(Tensor x, Tensor y, Tensor ids, Tensor candidate_ids, Tensor mask, Tensor "
    "groups, Tensor candidate_groups, Tensor guide, Tensor candidate_guide, Tensor eps, Tensor "
    "tau, int pairing, int reduction, int variant, int positives, float beta, float tau_plus) -> "
    "(Tensor loss, Tensor stats)",
    "labelled_backward(Tensor grad, Tensor x, Tensor y, Tensor ids, Tensor candidate_ids, Tensor "
    "mask, Tensor groups, Tensor candidate_groups, Tensor guide, Tensor candidate_guide, Tensor "
    "tau, Tensor stats, int pairing, int reduction, float beta, int needs) -> (Tensor dx, Tensor "
    "dy, Tensor dtau)",
    "labelled_threshold(Tensor x, Tensor y, Tensor ids, Tensor candidate_ids, Tensor mask, int "
    "pairing, float quantile, bool over_negatives) -> Tensor",
    "labelled_row_range(Tensor x, Tensor y, Tensor ids, Tensor candidate_ids, Tensor mask, int "
    "pairing) -> (Tensor low, Tensor high)",
    "logits_forward(Tensor logits, Tensor target, Tensor score, Tensor eps, Tensor tau, bool "
    "given, int reduction, int variant, float beta, float tau_plus) -> (Tensor loss, Tensor stats)",
    "logits_backward(Tensor grad, Tensor logits, Tensor target, Tensor score, Tensor tau, Tensor "
    "stats, int reduction, float beta, int needs) -> (Tensor dlogits, Tensor dtau)",
    "logits_threshold(Tensor logits, Tensor target, Tensor tau, float quantile, bool "
    "over_negatives, bool self_column) -> Tensor",
    "logits_row_range(Tensor logits, Tensor target, Tensor tau, bool self_column) -> (Tensor low, "
    "Tensor high)",
};

static const struct {
    const char *name;
    void (*kernel)(StableIValue *, uint64_t, uint64_t);
    bool cuda; /* on CUDA too, with hex/_cuda.so; hex/ops.py has the same names */
} kernels[] = {
    {"forward", hex_forward_boxed, true},
    {"backward", hex_backward_boxed, true},
    {"threshold", hex_threshold_boxed, true},
    {"row_range", hex_row_range_boxed, true},
    {"adaptive", hex_adaptive_boxed, true},
    {"labelled_forward", hex_labelled_forward_boxed, false},
    {"labelled_backward", hex_labelled_backward_boxed, false},
    {"labelled_threshold", hex_labelled_threshold_boxed, false},
    {"labelled_row_range", hex_labelled_row_range_boxed, false},
    {"logits_forward", hex_logits_forward_boxed, false},
    {"logits_backward", hex_logits_backward_boxed, false},
    {"logits_threshold", hex_logits_threshold_boxed, false},
    {"logits_row_range", hex_logits_row_range_boxed, false},
};

/* The library handles live as long as the process: deleting one would take its registrations back.
 */
static TorchLibraryHandle definitions, cpu;

static bool register_kernels(TorchLibraryHandle library, bool cuda_only)
{
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if ((kernels[i].cuda || !cuda_only) &&
            torch_library_impl(library, kernels[i].name, kernels[i].kernel, HEX_TORCH_ABI))
            return false;
    return true;
}

static bool register_operators(void)
{
    if (aoti_torch_library_init_def("hex", __FILE__, __LINE__, &definitions) ||
        aoti_torch_library_init_impl("hex", "CPU", __FILE__, __LINE__, &cpu))
        return false;
    for (size_t i = 0; i < sizeof schemas / sizeof *schemas; i++)
        if (aoti_torch_library_def(definitions, schemas[i]))
            return false;
    return register_kernels(cpu, false);
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
        if (!done || !register_kernels(library, true))
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
     "isa() -> str\n\nThe level of the CPU kernels in use: base, avx2, avx512 or avx512_bf16."},
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
        return PyErr_Format(PyExc_ImportError, "HEX_ISA=%s: %s", wanted, isa_problem);
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
