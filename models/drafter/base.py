"""The drafter contract: one function seen from training, from decoding and from serving.

Notation (used in every family's file)
    x_t     token at position t (0-based)
    f_t     the target's last hidden state after its final norm
    p_t     the target's distribution of x_{t+1}, softmax(W f_t)
    h^l_t   the target's residual stream after l layers
    p, q    target and draft distribution, everywhere

The index rule, stated once. When drafting starts at position t the token x_{t+1} is already known
(the target has just produced it). At depth k (0-based) a drafter predicts x_{t+2+k}, having read
features at positions <= t and tokens at positions <= t+1+k. Its teacher is p_{t+1+k}. The
prediction counts in the loss only where token t+2+k is a token to learn: mask_t = learn[t+2+k].

A `Depth` says `shift` = 1+k for that: the state at index t is taught by p_{t+shift}, its label is
x_{t+shift+1}, and it has read tokens <= t+shift. In a recurrent family (a small language model) all
depths have shift 0 and the *last* one serves every k: the state for (t, k) is then the one at index
t+1+k. Depths before the last are other exits of the same network, trained beside it.

Shape legend: B sequences, T positions, N rows or tree nodes, K depths, d hidden size,
V target vocabulary, D draft vocabulary.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from models.head import Head
from models.target import Features, Target
from models.tree import Children, Frontier, Policy, Tree

if TYPE_CHECKING:
    from models.acceptance import AcceptanceHead
    from models.cache import GrowingCache
    from models.split import SharedLayers

__all__ = ["Children", "Depth", "Drafter", "Frontier", "Policy", "Tree", "served_depth"]


@dataclass(frozen=True)
class Depth:
    """One depth of the training view: states before the vocabulary head, and that head.

    Logits are never made here, so that a loss can project in chunks. `positions_BN` is None when
    the states cover positions 0..T-1 in order; otherwise it gives the position t of each state
    (sampled anchors). `mask_BN` removes states beyond the rule above (valid prefix, dropped
    anchors), `weight_BN` (no gradient) weighs those that remain. `feature_BNd` is an optional
    prediction of f_{t+shift}.
    """

    states_BNd: Tensor
    head: Head
    shift: int
    positions_BN: Tensor | None = None
    mask_BN: Tensor | None = None
    weight_BN: Tensor | None = None
    feature_BNd: Tensor | None = None


def served_depth(depths: Sequence[Depth], k: int) -> int:
    """Which of a drafter's depths predicts draft k (0-based).

    Depth k, or the last one for families that go on with it. A recurrent family (shift 0) is served
    by its last depth alone; the ones before it are earlier exits.
    """
    last = len(depths) - 1
    return last if depths[last].shift == 0 else min(k, last)


class Drafter(nn.Module, PyTorchModelHubMixin, ABC):
    """Base of every family: `unroll` trains it, `start / extend / step` draft with it.

    A family implements four methods and `__init__` with keyword-only, JSON-able arguments, which
    become its `config.json`. Nothing that can be read from the target is stored: embeddings and
    frozen heads are reached through `bind`.

    `draft_vocab_size=None` drafts over the target's whole vocabulary. Otherwise the buffer
    `draft_ids_D` holds the D target ids (ascending) that may be drafted.
    """

    draft_ids_D: Tensor | None
    feature_layers: tuple[int, ...] = ()
    """Inner layers h^l this drafter reads, beside f_t."""
    computed_layers: tuple[int, ...] = ()
    """Of `feature_layers`, those it computes itself while drafting, with the target's first layers:
    h^l_u follows from the tokens <= u alone, so the index rule counts it as those tokens."""
    reads_features: bool = True
    """False for a drafter that reads tokens only: it can draft, and be sampled from, without the
    target (training on its own text)."""
    exit_costs: tuple[float, ...] = ()
    """What a draft from each exit costs, first to last, as the share of the target's weights that
    it reads. Empty for a drafter that has one way of drafting."""
    leave_at: int | None = None
    """The exit (0-based) that drafts come from in this round, set by `Policy.begin`."""

    @property
    def reads_history(self) -> bool:
        """Whether a state in `unroll` depends on earlier positions than its own.

        A family that says False lets training leave out prompt positions; it promises that no shift
        exceeds `num_depths`.
        """
        return True

    def __init__(
        self, *, hidden_size: int, vocab_size: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__()
        if draft_vocab_size is not None and not 0 < draft_vocab_size <= vocab_size:
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size} must lie between 1 and the target's "
                f"vocabulary of {vocab_size}, because drafted ids are a subset of its ids; give a "
                "smaller number, or null for the whole vocabulary."
            )
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self._bound: list[Target] = []
        self._acceptance: list[AcceptanceHead] = []
        ids = None if draft_vocab_size is None else torch.arange(draft_vocab_size)
        self.register_buffer("draft_ids_D", ids)

    # --- what a family implements -------------------------------------------------------------

    @property
    @abstractmethod
    def num_depths(self) -> int:
        """How many `Depth`s `unroll` yields."""

    @property
    def state_size(self) -> int:
        """Width of the states, the target's unless a family is narrower."""
        return self.hidden_size

    @property
    def max_depth(self) -> int | None:
        """Longest draft this family can make; None when there is no limit."""
        return self.num_depths

    @property
    def measured_depths(self) -> int:
        """How many depths validation looks at: more than are trained, where `unroll_to` goes on."""
        return self.num_depths

    @abstractmethod
    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        """Training view: every position and depth at once, true tokens fed (teacher forcing).

        Sequences are right-padded, so causal layers need no padding mask.
        """

    def unroll_to(self, features: Features, tokens_BT: Tensor, depths: int) -> Iterator[Depth]:
        """`unroll`, carried on to `depths` depths by families that draft deeper than they train.

        For measuring and tests. Others yield what they have, whose last may serve all later depths
        (see `served_depth`).
        """
        return self.unroll(features, tokens_BT)

    def unroll_taught(
        self, features: Features, tokens_BT: Tensor, depths: int, taught_BT: Tensor | None
    ) -> Iterator[Depth]:
        """`unroll_to` for who looks at taught states alone: at t, of shift s, iff taught[t+s].

        Families that can leave the work of others out, and give them any state. None: all states.
        """
        return self.unroll_to(features, tokens_BT, depths)

    @abstractmethod
    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Any:
        """Read N newly verified positions: features of t-N+1..t and tokens x_{t-N+2}..x_{t+1}.

        Tokens run one ahead of features: the last one is the root of the next draft.
        """

    @abstractmethod
    def step(self, state: Any, depth: int, frontier: Frontier) -> tuple[Any, Tensor]:
        """States `[N, d]` that predict the children of the frontier's nodes, at depth k."""

    @abstractmethod
    def head(self, depth: int) -> Head:
        """The vocabulary head of depth k."""

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        """Copy from the target what the recipe starts from. `bind` and `set_vocab` come first.

        `calibration` are token sequences of the training split, for recipes that first look at what
        the target does on text (importance of its layers or channels).
        """

    def start_from(self, earlier: "Drafter") -> None:
        """Begin with the weights of another drafter of this family. `bind` comes first."""
        self.load_state_dict(earlier.state_dict())

    def initial_state(self) -> Any:
        """The decoding state before anything was read. None unless a family keeps more."""
        return None

    # --- shared -------------------------------------------------------------------------------

    def start(self, features: Features, tokens_1T: Tensor) -> Any:
        """Read a prompt: features of positions 0..T-2 and tokens x_0..x_{T-1} (one more)."""
        return self.extend(self.initial_state(), features, tokens_1T[:, 1:])

    def start_shared(
        self, features: Features, tokens_1T: Tensor, cache: "GrowingCache"
    ) -> tuple[Any, "SharedLayers"]:
        """`start` on the target's own cache, for a drafter with `computed_layers`.

        Drafting then appends keys and values of the target's first layers to it, and
        `SharedLayers.verify` takes the place of the target's forward over the tree.
        """
        raise NotImplementedError(
            f"{type(self).__name__} computes layers of the target itself (computed_layers), so it "
            "has to say how it shares the target's cache: implement start_shared."
        )

    def bind(self, target: Target) -> "Drafter":
        """Give access to the target's embedding and head, without owning them."""
        if (target.hidden_size, target.vocab_size) != (self.hidden_size, self.vocab_size):
            raise ValueError(
                f"This drafter was made for a target with hidden size {self.hidden_size} and "
                f"{self.vocab_size} tokens; '{target.name}' has {target.hidden_size} and "
                f"{target.vocab_size}. A drafter only works with the target it was trained for: "
                "load that one, or train a new drafter."
            )
        self._bound = [target]
        for depth in range(self.num_depths):
            self.head(depth).bind(target, self.draft_ids_D)
        return self

    @property
    def target(self) -> Target:
        """The target given to `bind`."""
        assert self._bound, "bind(target) comes before this"
        return self._bound[0]

    @property
    def acceptance(self) -> "AcceptanceHead | None":
        """The acceptance head that was trained for this drafter, if one was. It is saved and loaded
        with it, but is no sub-module: the drafter's own weights and dtype stay as they are."""
        return self._acceptance[0] if self._acceptance else None

    def set_acceptance(self, head: "AcceptanceHead | None") -> None:
        """Give it a head. (A method: assigning a module would make it a sub-module.)"""
        self._acceptance = [] if head is None else [head]

    def set_vocab(self, draft_ids_D: Tensor) -> None:
        """Choose the target ids that may be drafted (sorted; must match `draft_vocab_size`)."""
        assert self.draft_ids_D is not None and draft_ids_D.shape == self.draft_ids_D.shape
        self.draft_ids_D.copy_(draft_ids_D.sort().values)

    def _save_pretrained(self, save_directory: Path) -> None:
        """config.json = the class and its constructor's arguments; weights as safetensors."""
        family = type(self)
        config = {"_target_": f"{family.__module__}.{family.__qualname__}"}
        config |= self._hub_mixin_config or {}  # type: ignore[operator]
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_model(self, str(save_directory / "model.safetensors"))
        if self.acceptance is not None:
            self.acceptance.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> "Drafter":
        """Load strictly, from safetensors only (the mixin would fall back to pickle)."""
        hub = {k: kwargs.pop(k, None) for k in ("revision", "cache_dir", "token")}
        hub |= {k: kwargs.pop(k, False) for k in ("force_download", "local_files_only")}
        for unused in ("map_location", "strict"):
            kwargs.pop(unused, None)
        drafter = cls(**kwargs)
        file = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(repo_id=model_id, filename=file.name, **hub))
        load_model(drafter, str(file), strict=True)
        return drafter.eval()

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's frozen token embedding, in the drafter's dtype."""
        return self.target.embed(tokens).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters())

    def to_target_ids(self, draft_tokens: Tensor) -> Tensor:
        """Draft-vocabulary ids -> target ids."""
        return draft_tokens if self.draft_ids_D is None else self.draft_ids_D[draft_tokens]

    def full_distribution(self, q_ND: Tensor) -> Tensor:
        """Scatter a draft distribution into the target's vocabulary (0 outside)."""
        if self.draft_ids_D is None:
            return q_ND
        full = q_ND.new_zeros(*q_ND.shape[:-1], self.vocab_size)
        return full.index_copy_(-1, self.draft_ids_D, q_ND)

    @torch.no_grad()
    def propose(self, state: Any, root: Tensor, policy: Policy) -> Tree:
        """Grow a draft tree from the known token `root` (= x_{t+1}), depth by depth.

        The drafting `state` is not changed: path memory of the tree lives only in this loop.
        """
        self.leave_at = None
        policy.begin(self)
        tokens = [root.reshape(1)]
        device = root.device
        parents = [torch.full((1,), -1, dtype=torch.long, device=device)]
        depths = [torch.zeros(1, dtype=torch.long, device=device)]
        draws = [torch.ones(1, device=device)]
        q_rows: list[Tensor] = []
        replacement, stepped = True, []
        nodes_N = torch.zeros(1, dtype=torch.long, device=device)  # node index of each frontier row
        frontier = Frontier(tokens[0], torch.zeros(1, dtype=torch.long, device=device))
        count, depth, limit = 1, 0, self.max_depth
        while limit is None or depth < limit:
            state, states_Nd = self.step(state, depth, frontier)
            stepped.append(nodes_N)
            policy.look(states_Nd)
            children = policy.grow(depth, frontier, self.head(depth)(states_Nd), self)
            if children is None:
                break
            tokens.append(children.tokens_M)
            parents.append(nodes_N[children.parents_M])
            depths.append(torch.full_like(children.tokens_M, depth + 1))
            draws.append(children.draws_M)
            if children.q_MV is not None:
                q_rows.append(children.q_MV)
            replacement = replacement and children.replacement
            new_M = torch.arange(count, count + len(children.tokens_M), device=device)
            count += len(children.tokens_M)
            keep = children.expand_M
            if not bool(keep.any()):
                break
            frontier = Frontier(children.tokens_M[keep], children.parents_M[keep])
            nodes_N = new_M[keep]
            depth += 1
        q_NV = None
        if q_rows:
            q_NV = torch.cat([q_rows[0].new_zeros(1, q_rows[0].shape[-1]), *q_rows])
        tree = Tree(
            torch.cat(tokens),
            torch.cat(parents),
            torch.cat(depths),
            torch.cat(draws),
            q_NV,
            replacement,
            torch.cat(stepped) if stepped else nodes_N[:0],
        )
        return policy.finish(tree)
