# SPDX-License-Identifier: MIT
"""Imports torchvision, even where its build does not match torch's.

PyPI's torchvision is built for CUDA. Its binary part cannot load beside a torch that is built for
the CPU. Then `import torchvision` fails, because it registers properties of the operators `nms` and
`qnms` of detection models, which were never defined. The examples only use parts of torchvision
that are written in Python, so it is enough to declare the two operators and to import again. (A
call of one of them would still fail.)

Every other failure is passed on. Import from here: `from common.vision import torchvision, v2`.
"""

import importlib

import torch

_declared = []  # keeps the library alive, without which its declarations would vanish


def _import_torchvision():
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
v2 = importlib.import_module("torchvision.transforms.v2")
