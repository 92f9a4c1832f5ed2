# SPDX-License-Identifier: MIT
"""The part of test_errors.py's table that is about tensors which cannot be read, numbers outside
the range of float64, and arguments of the tracker, the presets and the CLIP loss.

torch itself reads past the end of a storage that was resized, asks a nested tensor in vain for its
shape, and takes no meta tensor to another device: so each is refused by name, before torch sees it.
"""

import warnings

import torch

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    ThresholdTracker,
    batch_threshold,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    info_nce,
)
from hex.open_clip import HEXClipLoss
from hex.presets import authors_mix, authors_threshold

Z, X, ONES = torch.ones(4, 3), torch.ones(4, 2, 3), torch.ones(4, dtype=torch.int64)
ONE = torch.ones(())


def freed(z):
    z = z.clone()
    z.untyped_storage().resize_(0)
    return z


def shrunk(z):
    """A view of every other column, of whose last number the first byte alone is there."""
    wide = torch.stack([z, z], -1).flatten(-2)[..., ::2]
    wide.untyped_storage().resize_((2 * z.numel() - 2) * z.element_size() + 1)
    return wide


def nested(z):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a prototype
        return torch.nested.as_nested_tensor([z, z])


STORAGE = (
    "{}: got a storage of 0 bytes, wanted at least {} for its shape (was it freed or resized?)"
)
NESTED = "{}: got a nested tensor, wanted a dense tensor"
SPARSE = "{}: got layout torch.sparse_coo, wanted a dense tensor"
META = "{}: got device meta, wanted that of the embeddings, cpu"
FLOATING = "{}: got {}, wanted torch.float64, float32, bfloat16 or float16"
adaptive = ThresholdTracker.adaptive

ERRORS = (
    # (call, type, text)
    *(
        (lambda call=call, z=z: call(freed(z)), ValueError, STORAGE.format(name, z.nbytes))
        for name, z, call in (
            ("z0", Z, lambda z: hex_loss(z, Z, eps=0)),
            ("z1", Z, lambda z: info_nce(Z, z)),
            ("z1", Z.T.contiguous().T, lambda z: HEXLoss()(Z, z)),
            ("negatives", X, lambda z: batch_threshold(Z, Z, z)),
            ("features", X, lambda z: hex_sup_con(z, eps=0)),
            ("logits", Z, lambda z: hex_cross_entropy(z, ONES, eps=0, temperature=1)),
            ("target", ONES.bool(), lambda z: HEXCrossEntropyLoss(1)(Z, z)),
            ("labels", ONES.int(), lambda z: HEXSupConLoss()(Z, z)),
            ("groups", ONES, lambda z: HEXLoss()(Z, Z, groups=z)),
            ("groups[1]", ONES, lambda z: HEXLoss()(Z, Z, Z, groups=(ONES, z))),
            ("mask", torch.eye(4), lambda z: HEXSupConLoss()(X, mask=z)),
            ("ignored", torch.eye(4) > 0, lambda z: HEXLoss()(Z, Z, ignored=z)),
            ("guide", X, lambda z: HEXSupConLoss()(X, guide=z)),
            ("guide: g1", Z, lambda z: HEXLoss()(Z, Z, guide=(Z, z))),
            ("eps", torch.ones(8), lambda z: hex_loss(Z, Z, eps=z)),
            ("temperature", ONE, lambda z: hex_loss(Z, Z, eps=0, temperature=z)),
            ("logit_scale", ONE, lambda z: HEXClipLoss()(Z, Z, z)),
            ("logit_bias", ONE, lambda z: HEXClipLoss()(Z, Z, 10.0, z)),
            ("candidate", ONE, lambda z: adaptive().update(z, store=True)),
            ("_extra_state", Z, lambda z: adaptive().set_extra_state(z)),
        )
    ),
    (
        lambda: info_nce(shrunk(Z), Z),
        ValueError,
        "z0: got a storage of 89 bytes, wanted at least 92 for its shape (was it freed or "
        "resized?)",
    ),
    *(
        (lambda call=call, z=z: call(nested(z)), TypeError, NESTED.format(name))
        for name, z, call in (
            ("z0", Z, lambda z: hex_loss(z, z, eps=0)),
            ("features", X, lambda z: HEXSupConLoss()(z)),
            ("labels", ONES, lambda z: HEXSupConLoss()(Z, z)),
            ("mask", Z, lambda z: HEXSupConLoss()(X, mask=z)),
            ("ignored", Z > 0, lambda z: HEXSupConLoss()(X, ignored=z)),
            ("eps", torch.ones(8), lambda z: hex_loss(Z, Z, eps=z)),
            ("temperature", torch.ones(1), lambda z: HEXLoss(z)),
        )
    ),
    *(
        (lambda call=call: call(ONE.to_sparse()), TypeError, SPARSE.format(name))
        for name, call in (
            ("eps", lambda z: hex_loss(Z, Z, eps=z)),
            ("temperature", lambda z: HEXLoss()(Z, Z, temperature=z)),
            ("logit_scale", lambda z: HEXClipLoss()(Z, Z, z)),
            ("base", lambda z: authors_mix("barlow", ONE, z)),
        )
    ),
    *(
        (lambda call=call, z=z: call(z.to("meta")), ValueError, META.format(name))
        for name, z, call in (
            ("eps", ONE, lambda z: hex_loss(Z, Z, eps=z)),
            ("temperature", ONE, lambda z: HEXLoss(z)(Z, Z)),
            ("labels", ONES, lambda z: HEXSupConLoss()(Z, z)),
            ("groups", ONES, lambda z: HEXLoss()(Z, Z, groups=z)),
            ("mask", torch.eye(4), lambda z: HEXSupConLoss()(X, mask=z)),
            ("ignored", torch.eye(4) > 0, lambda z: hex_loss(Z, Z, eps=0, ignored=z)),
            ("logit_scale", ONE, lambda z: HEXClipLoss()(Z, Z, z)),
            ("logit_bias", ONE, lambda z: HEXClipLoss()(Z, Z, 10.0, z)),
        )
    ),
    (
        lambda: info_nce(Z, torch.nn.UninitializedParameter()),
        TypeError,
        "z1: got UninitializedParameter, wanted a tensor that has a shape",
    ),
    (
        lambda: HEXLoss().to("meta")(Z, Z),
        ValueError,
        "threshold: got a state on device meta, wanted the batch's device, cpu; call "
        "to_empty(device=...) on the loss and reset_parameters() on its threshold",
    ),
    # candidates, and a threshold by the positive
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z),
        ValueError,
        "candidates, candidate_labels: got no labels, wanted both or neither",
    ),
    (
        lambda: hex_sup_con(Z, ONES, candidate_labels=ONES, eps=0),
        ValueError,
        "candidates, candidate_labels: got the labels alone, wanted both or neither",
    ),
    (
        lambda: HEXSupConLoss()(X, candidates=Z, candidate_labels=ONES),
        ValueError,
        "labels: got None, wanted (B,) or (N,) integers with candidates",
    ),
    (
        lambda: HEXSupConLoss()(Z, mask=torch.eye(4), candidates=Z, candidate_labels=ONES),
        ValueError,
        "labels: got a mask, wanted (B,) or (N,) integers with candidates",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z.int(), candidate_labels=ONES),
        TypeError,
        FLOATING.format("candidates", "torch.int32"),
    ),
    (
        lambda: HEXSupConLoss()(X, ONES, candidates=Z.T, candidate_labels=ONES),
        ValueError,
        "candidates: got shape (3, 4), wanted (M, 3)",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=X, candidate_labels=ONES),
        ValueError,
        "candidates: got shape (4, 2, 3), wanted (M, 3)",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z.to("meta"), candidate_labels=ONES),
        ValueError,
        "candidates: got device meta, wanted that of features, cpu",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z, candidate_labels=ONES[:3]),
        ValueError,
        "candidate_labels: got shape (3,), wanted (4,)",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES[:3], candidates=Z, candidate_labels=ONES),
        ValueError,
        "labels: got shape (3,), wanted (4,)",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z, candidate_labels=ONES, groups=ONES),
        ValueError,
        "groups: got Tensor, wanted (groups, candidate_groups) with candidates",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z, candidate_labels=ONES, guide=Z),
        ValueError,
        "guide: got Tensor, wanted a tuple (guide, candidate_guide) with candidates",
    ),
    (
        lambda: HEXSupConLoss()(X, ONES, candidates=Z, candidate_labels=ONES, guide=(X, Z[:3])),
        ValueError,
        "guide[1]: got shape (3, 3), wanted (4, 3)",
    ),
    (
        lambda: HEXSupConLoss()(X, ONES, candidates=Z, candidate_labels=ONES, guide=(Z, Z)),
        ValueError,
        "guide[0]: got shape (4, 3), wanted that of features, (4, 2, 3), except for the last axis",
    ),
    (
        lambda: HEXSupConLoss()(Z, ONES, candidates=Z, candidate_labels=ONES, guide=(ONES, Z)),
        TypeError,
        "guide[0]: got torch.int64, wanted torch.float64, float32, bfloat16 or float16; labels go "
        "to HEXSupConLoss, logits and a target to HEXCrossEntropyLoss",
    ),
    (
        lambda: HEXSupConLoss(threshold=ThresholdTracker.by_positive()),
        ValueError,
        "threshold: got by_positive in a loss that allows several positives, wanted a loss of one, "
        "such as HEXLoss; or hex_sup_con with an eps for each row",
    ),
    (
        lambda: ThresholdTracker.by_positive(torch.inf),
        ValueError,
        "margin: got inf, wanted a finite number",
    ),
    # numbers outside the range of float64
    *(
        (call, ValueError, f"{name}: got int beyond the range of float64, wanted one in it")
        for name, call in (
            ("beta", lambda: HEXLoss(beta=10**400)),
            ("temperature", lambda: info_nce(Z, Z, temperature=10**400)),
            ("eps", lambda: hex_loss(Z, Z, eps=-(10**400))),
            ("threshold", lambda: HEXLoss(threshold=-(10**5000))),
        )
    ),
    (
        lambda: adaptive(warmup_epochs=10**5000),
        ValueError,
        "warmup_epochs: got int, wanted an integer >= 0 and < 2^53",
    ),
    (
        lambda: authors_threshold("cosine", epochs=2**21),
        ValueError,
        "epochs: got 2097152, wanted at most 1048576 with compounded=True, for which the factors "
        "of all epochs are multiplied",
    ),
    # values that have no short text
    (
        lambda: HEXLoss(variant=Z),
        ValueError,
        "variant: got Tensor, wanted one of 'paper', 'released', 'excluded'",
    ),
    (
        lambda: HEXLoss(gather_distributed=True)(Z, Z, rows=[ONE, 3]),
        TypeError,
        "rows: got [Tensor, 3], wanted a tuple of ints, the number of images of each rank",
    ),
    (
        lambda: HEXLoss(gather_distributed=True)(Z, Z, rows="4" * 99),
        TypeError,
        f"rows: got '{'4' * 75}..., wanted a tuple of ints, the number of images of each rank",
    ),
    # tracker, presets and the CLIP loss
    (
        lambda: adaptive().update(0.5, store=True),
        TypeError,
        "candidate: got float, wanted a torch.Tensor",
    ),
    (
        lambda: adaptive().update(ONE.to(torch.complex64), store=True),
        TypeError,
        FLOATING.format("candidate", "torch.complex64"),
    ),
    (
        lambda: adaptive().update(ONE[None], store=True),
        ValueError,
        "candidate: got shape (1,), wanted ()",
    ),
    (lambda: adaptive().update(ONE, store=1), TypeError, "store: got int, wanted a bool"),
    (
        lambda: adaptive().update(ONE, store=True, anchors=8.0),
        TypeError,
        "anchors: got float, wanted an integer",
    ),
    (
        lambda: adaptive().set_extra_state(Z.to(torch.complex64)),
        ValueError,
        "_extra_state: got torch.complex64, wanted a tensor of real numbers",
    ),
    (
        lambda: adaptive().set_extra_state(Z.to("meta")),
        ValueError,
        "_extra_state: got device meta, wanted a tensor of real numbers",
    ),
    (
        lambda: adaptive().set_extra_state(torch.tensor([[1, torch.nan, 1]])),
        ValueError,
        "_extra_state: got epoch nan, wanted a finite number",
    ),
    (
        lambda: authors_mix("barlow", ONE.to(torch.float8_e5m2), ONE),
        TypeError,
        FLOATING.format("hex_loss", "torch.float8_e5m2"),
    ),
    (
        lambda: authors_mix("barlow", ONE, torch.ones(4)),
        ValueError,
        "base: got shape (4,), wanted ()",
    ),
    (
        lambda: HEXClipLoss()(Z, Z, 10.0, "0"),
        TypeError,
        "logit_bias: got str, wanted None, a number or a tensor",
    ),
    (
        lambda: HEXClipLoss()(Z, Z, 10.0, torch.ones(4)),
        ValueError,
        "logit_bias: got shape (4,), wanted a single element",
    ),
    (
        lambda: HEXClipLoss()(Z, Z, 5e-324),
        ValueError,
        "logit_scale: got 5e-324, wanted a number with a finite inverse",
    ),
    (
        lambda: HEXClipLoss()(Z, Z, 10.0, None, 1),
        TypeError,
        "output_dict: got int, wanted a bool",
    ),
)
