"""Vocabulary heads: states -> draft logits, position by position, for any drafter."""

import importlib
from typing import Any

from models.head.base import Head


def build_head(spec: dict[str, Any], *, hidden_size: int, vocab_size: int) -> Head:
    """Make the head that `spec` names: {"_target_": "models.head.<file>.<Class>", **arguments}.

    The spec is plain data, so that it can be stored in a drafter's config.json. Because it may come
    from a downloaded folder, only classes of `models.head` are accepted.
    """
    arguments = dict(spec)
    path = str(arguments.pop("_target_", ""))
    module, _, name = path.rpartition(".")
    if not module.startswith("models.head."):
        raise ValueError(
            f"A drafter's head must name a class under 'models.head.', got '{path}': a config file "
            "may not import anything else. Use one of the files in conf/head/."
        )
    head_class = getattr(importlib.import_module(module), name)
    return head_class(hidden_size=hidden_size, vocab_size=vocab_size, **arguments)


__all__ = ["Head", "build_head"]
