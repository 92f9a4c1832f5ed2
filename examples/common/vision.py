# SPDX-License-Identifier: MIT
"""torchvision, also where its build and torch's do not match.

PyPI's torchvision is built for CUDA. Beside a torch built for the CPU its binary part cannot load,
and then the very import fails, because it describes the operators `nms` and `qnms` of detection
models to torch, which has not heard of them. Everything used here is Python over torch operators,
so it is enough to declare the two before importing once more. Calling one would still fail.

Every other failure is left as it is. Import from here: `from common.vision import torchvision, v2`.
"""

import importlib

import torch

_declared = []  # a library forgets its declarations when it is collected


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
