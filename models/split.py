"""A target run in two parts, and its first layers shared by drafting and verification.

A drafter that begins with the target's own first layers (Kangaroo) has computed them for every
token it extended when the target comes to verify. Verification then needs only what is missing: the
first layers of the leaves, and the other layers of all nodes.

Shape legend: B sequences, T positions, N tree nodes, S stepped nodes, R nodes not stepped,
K keys, d hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from models.cache import GrowingCache, GrowingLayer
from models.lm_exits import pieces
from models.target import Features, Target
from models.tree import Tree


class SplitTarget:
    """A target's decoder as two functions: embedding and layers [0, at), layers [at, L) and norm.

    `deep(shallow(x))` is `Target.forward(x)`, with the same masks, positions and cache; each part
    appends to its own layers of the cache. Raises ValueError for a decoder that computes something
    else when it is run in parts.
    """

    def __init__(self, *, target: Target, at: int) -> None:
        if not 0 < at < target.num_layers:
            raise ValueError(
                f"The target '{target.name}' cannot be split after {at} of its {target.num_layers} "
                "layers, because both parts need at least one; give a number from 1 to "
                f"{target.num_layers - 1} (drafter.shallow_layers)."
            )
        self.target, self.at = target, at
        decoder = target.model.get_decoder()
        try:
            self._shallow, self._deep = pieces(decoder, [at, target.num_layers])
            self._deep.norm = decoder.norm
            self._check()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The target '{target.name}' ({type(decoder).__name__}) cannot be run in two parts "
                f"({error}), because something beside the hidden state passes between its layers "
                "or its modules are named otherwise; use a drafter that does not run the target's "
                "first layers, such as drafter=hydra_heads."
            ) from error

    @property
    def shallow_layers(self) -> list[nn.Module]:
        """The first `at` decoder layers."""
        return list(self._shallow.layers)

    @torch.no_grad()
    def shallow(
        self,
        tokens_BT: Tensor,
        *,
        attention_mask: Any = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """h^at of these tokens, `[B, T, d]`."""
        return self._shallow(
            input_ids=tokens_BT,
            attention_mask=attention_mask,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    @torch.no_grad()
    def deep(
        self,
        hidden_BTd: Tensor,
        *,
        attention_mask: Any = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Features:
        """f of positions whose h^at is given; the features hold both."""
        final_BTd = self._deep(
            inputs_embeds=hidden_BTd,
            attention_mask=attention_mask,
            position_ids=positions_BT,
            past_key_values=None if cache is None else _CacheFrom(cache, self.at),
            use_cache=cache is not None,
        ).last_hidden_state
        return Features(final_BTd, {self.at: hidden_BTd})

    def _check(self) -> None:
        """The parts, one after the other, are the whole."""
        tokens_BT = torch.arange(6, device=self.target.device)[None] % self.target.vocab_size
        whole = self.target.forward(tokens_BT, layers=(self.at,))
        cache = GrowingCache()
        for new in (slice(0, 4), slice(4, 6)):
            hidden_BTd = self.shallow(tokens_BT[:, new], cache=cache)
            ours, theirs = self.deep(hidden_BTd, cache=cache), whole[:, new]
            for found, expected in (
                (hidden_BTd, theirs.layers[self.at]),
                (ours.final_BTd, theirs.final_BTd),
            ):
                error = float((found - expected).float().abs().max())
                if error > 2e-2 * float(expected.float().abs().max()):
                    raise ValueError(f"hidden states differ by {error:.3g} from the whole's")


class _CacheFrom(Cache):
    """A cache as its layers from `first` on see it: where masks and positions ask for its length,
    theirs is the answer (the layers before may be ahead)."""

    def __init__(self, cache: Cache, first: int) -> None:
        super().__init__(layers=cache.layers)
        self._cache, self._first = cache, first

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(max(layer_idx, self._first))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_query_offset(max(layer_idx, self._first))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, max(layer_idx, self._first))


class SharedLayers:
    """The first layers of one text's target, run once for each token by drafter or verifier.

    Between rounds all layers of `cache` hold the verified tokens. While a draft is made (`draft`)
    the first layers run ahead, in the order in which nodes were extended; `verify` completes and
    orders them, and runs the other layers.
    """

    def __init__(self, split: SplitTarget, cache: GrowingCache) -> None:
        self.split, self.cache = split, cache
        self._drafted: list[Tensor] = []

    @property
    def past(self) -> int:
        """Verified tokens in the cache."""
        return self.cache.get_seq_length(self.split.at)

    def begin(self) -> None:
        """Forget a draft that was never verified."""
        for layer in self._layers:
            layer.crop(self.past - layer.get_seq_length())
        self._drafted = []

    def draft(
        self, tokens_1N: Tensor, *, attention_mask: Any = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """h of draft nodes, `[1, N, d]`, for the drafter."""
        hidden_1Nd = self.split.shallow(
            tokens_1N, attention_mask=attention_mask, positions_BT=positions_BT, cache=self.cache
        )
        self._drafted.append(hidden_1Nd)
        return hidden_1Nd

    def verify(
        self, tree: Tree, *, attention_mask: Any = None, positions_BT: Tensor | None = None
    ) -> Features:
        """The target's features at every node of the tree, `[1, N, d]`.

        Mask and positions are those of the whole tree (None for a chain), as for `Target.forward`.
        """
        past, stepped_S = self.past, tree.stepped_S
        assert stepped_S is not None and len(stepped_S) == sum(h.shape[1] for h in self._drafted)
        kept_S = stepped_S >= 0
        hidden_1Sd = torch.cat(self._drafted, dim=1)[:, kept_S]
        if not bool(kept_S.all()):
            # Nodes that a policy has pruned since: nobody looks at them any more.
            self._order(past, kept_S.nonzero()[:, 0])
        stepped_S = stepped_S[kept_S]
        rest_N = torch.ones(len(tree), dtype=torch.bool, device=stepped_S.device)
        rest_N[stepped_S] = False
        rest_R = rest_N.nonzero()[:, 0]
        # The node in each row behind the past.
        rows_N = torch.cat([stepped_S, rest_R])
        if len(rest_R) > 0:
            hidden_1Rd = self.split.shallow(
                tree.tokens_N[rest_R][None],
                attention_mask=_select(attention_mask, rest_R, rows_N, past),
                positions_BT=None if positions_BT is None else positions_BT[:, rest_R],
                cache=self.cache,
            )
            hidden_1Sd = torch.cat([hidden_1Sd, hidden_1Rd], dim=1)
        place_N = rows_N.argsort()
        if not torch.equal(place_N, torch.arange(len(tree), device=place_N.device)):
            hidden_1Sd = hidden_1Sd[:, place_N]
            self._order(past, place_N)
        self._drafted = []
        return self.split.deep(
            hidden_1Sd, attention_mask=attention_mask, positions_BT=positions_BT, cache=self.cache
        )

    @property
    def _layers(self) -> list[GrowingLayer]:
        return self.cache.layers[: self.split.at]  # type: ignore[return-value]

    def _order(self, past: int, rows_N: Tensor) -> None:
        """Behind the past, put the first layers' rows in this order."""
        for layer in self._layers:
            layer.keep(past, past + rows_N)


class FirstLayers(nn.Module):
    """A drafter's use of the target's first layers: a module without parameters, so that its calls
    can be counted (see decode/bandwidth.py) and nothing of the target is stored."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self._split: list[SplitTarget] = []

    def bind(self, target: Target) -> None:
        """Raises ValueError when the target cannot be run in parts."""
        self._split = [SplitTarget(target=target, at=self.layers)]

    @property
    def split(self) -> SplitTarget:
        """The target given to `bind`."""
        assert self._split, "bind(target) comes before this"
        return self._split[0]

    @property
    def weight_bytes(self) -> int:
        """What one call reads of the target's weights."""
        layers = nn.ModuleList(self.split.shallow_layers)
        return sum(p.numel() * p.element_size() for p in layers.parameters())

    def forward(
        self,
        tokens_1N: Tensor,
        *,
        attention_mask: Any = None,
        positions_BT: Tensor | None = None,
        shared: SharedLayers | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """h of these tokens, on the cache of the target (`shared`) or on one of the drafter's."""
        if shared is not None:
            return shared.draft(tokens_1N, attention_mask=attention_mask, positions_BT=positions_BT)
        return self.split.shallow(
            tokens_1N, attention_mask=attention_mask, positions_BT=positions_BT, cache=cache
        )


def _select(mask: Any, rest_R: Tensor, rows_N: Tensor, past: int) -> Any:
    """The mask rows of some nodes, its columns in the order of the cache's rows."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {kind: _select(m, rest_R, rows_N, past) for kind, m in mask.items()}
    columns_K = torch.cat([torch.arange(past, device=rows_N.device), past + rows_N])
    return mask[:, :, rest_R][..., columns_K]
