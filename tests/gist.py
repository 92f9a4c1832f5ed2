# SPDX-License-Identifier: MIT
"""GISTEmbedLoss of sentence-transformers, for the tests that compare with it.

Its two models hand on the embeddings that they are given, so that no network, no file and no text
is needed, and the numbers may be float64.
"""

import pytest
from torch import Tensor, nn

TAU = 0.2


class Given(nn.Module):
    """A model's only module: its embeddings are among the features already."""

    def __init__(self, key: str, tokenizer) -> None:
        super().__init__()
        self.key, self.tokenizer, self.max_seq_length = key, tokenizer, 8

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": features[self.key]}


def gist(margin_strategy: str, margin: float, temperature: float = TAU, **contrast: bool):
    """loss(embeddings, embeddings of the guide), each a list of columns: anchors, positives and
    maybe negatives."""
    package = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    losses = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses", exc_type=ImportError
    )
    tokenizers = pytest.importorskip("tokenizers", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a")
    models = (
        package.SentenceTransformer(modules=[Given(key, fast)], device="cpu")
        for key in ("own", "guide")
    )
    loss = losses.GISTEmbedLoss(*models, temperature, margin_strategy, margin, **contrast)

    def value(own: list[Tensor], guide: list[Tensor]) -> Tensor:
        columns = [{"own": a, "guide": g} for a, g in zip(own, guide, strict=True)]
        return loss(columns, None)

    return value
