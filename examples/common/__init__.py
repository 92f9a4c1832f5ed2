# SPDX-License-Identifier: MIT
"""What the example scripts share: data, augmentation, encoders, training, evaluation and more."""

from common import vision  # noqa: F401  before any library that imports torchvision; see there
