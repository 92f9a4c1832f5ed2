# SPDX-License-Identifier: MIT
"""What the example scripts share: data, augmentation, encoders, training, evaluation and more."""
