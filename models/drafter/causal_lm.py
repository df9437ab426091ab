"""A small language model as drafter, in any architecture transformers has.

Shape legend: B sequences, T positions, N frontier nodes, d width of the drafter, V target
vocabulary, D draft vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from models.adapters import add_adapters, check_settings, has_adapters, merged_state
from models.drafter.base import Depth, Drafter, Frontier
from models.generator_target import GeneratorTarget
from models.head import Head, build_head
from models.head.frozen import FrozenHead
from models.head.tied import TiedHead
from models.lm_shape import LmStart, build_inner, kept_layers, relisted
from models.lm_state import LmState, Memory, additive, plan_step
from models.lm_weights import load_weights, source_weights, target_weights
from models.pruning import activation_scores, block_importance, cut
from models.target import Features, Target


class CausalLm(Drafter):
    """A causal language model that reads tokens only, with the target's tokenizer.

        y_t = LM(E(x_0), ..., E(x_t)),  logits = U y_t  predict x_{t+1}

    It is recurrent: one `Depth` of shift 0 serves every draft; the state for (t, k) is y_{t+1+k}.
    `inner` is a transformers model without a vocabulary head.

    How it starts (`init`):
      layers  `num_layers` of the target's layers (`keep`: the first, evenly spaced, or the most
              important ones by 1 - cos(h_in, h_out) on text), with its final norm;
      width   the target cut to `width` residual channels, `intermediate_size` and heads by the size
              of activations on text (models/pruning.py); also in depth when `num_layers` is given;
      random  untrained, of the given sizes (the target's where null), for pretraining;
      source  another causal language model with the target's tokenizer (folder or Hub id).

    `embedding`: the target's, frozen and not stored, or the drafter's own, trained. `head`: frozen
    (the target's rows), own (trained) or tied (the own embedding's rows). With an own embedding and
    no frozen head the drafter serves every target with this vocabulary. `lora` = {r, alpha,
    dropout, target_modules} trains adapters (and an own head) instead of the inner model's weights;
    a saved drafter has them merged. `architecture` is the inner model's config, written when a
    drafter is saved; a config leaves it null.
    """

    reads_features = False

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_config: dict[str, Any] | None = None,
        init: Literal["layers", "width", "random", "source"] = "layers",
        num_layers: int | None = None,
        keep: Literal["first", "even", "importance"] = "first",
        width: int | None = None,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        source: str | None = None,
        embedding: Literal["target", "own"] = "target",
        lora: dict[str, Any] | None = None,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        self.begin = LmStart(
            init, num_layers, keep, width, intermediate_size, num_heads, num_kv_heads, source
        )
        self.own_embedding = embedding == "own"
        self.lora = lora
        if lora is not None:
            check_settings(lora)
            if init == "random":
                raise ValueError(
                    "drafter.lora trains a few directions of given weights, but drafter.init="
                    "random has none worth keeping; set drafter.lora=null, or begin from layers."
                )
        if architecture is None:
            assert target_config is not None, "the target's config or an architecture is needed"
            architecture = self.begin.architecture(target_config) | {"vocab_size": vocab_size}
        self.vocab_head = build_head(
            head,
            hidden_size=architecture["hidden_size"],
            vocab_size=draft_vocab_size or vocab_size,
        )
        self._check_width(architecture["hidden_size"])
        self._set_architecture(architecture)

    def _check_width(self, width: int) -> None:
        """A borrowed embedding or head has the target's width; a tied head needs its own."""
        if isinstance(self.vocab_head, TiedHead) and not self.own_embedding:
            raise ValueError(
                "head=tied shares the drafter's own embedding, but drafter.embedding=target has "
                "none; set drafter.embedding=own, or use head@drafter.head=frozen."
            )
        if width != self.hidden_size and self._borrows:
            raise ValueError(
                f"The target's embedding and head have {self.hidden_size} columns, but this "
                f"drafter is {width} wide, so it can borrow neither; set drafter.embedding=own and "
                "head@drafter.head=own or tied, or keep the target's width."
            )

    @property
    def _borrows(self) -> bool:
        """Whether it uses a matrix of the target."""
        return not self.own_embedding or isinstance(self.vocab_head, FrozenHead)

    def _set_architecture(self, architecture: dict[str, Any]) -> None:
        """Build the inner model, with new weights."""
        self.architecture: dict[str, Any] = architecture | {"dtype": None}
        if not isinstance(self.vocab_head, FrozenHead):
            self.architecture["final_logit_softcapping"] = None  # our heads put no cap on logits
        self.inner: Any = build_inner(self.architecture, own_embedding=self.own_embedding)
        self.inner.train(self.training)
        if isinstance(self.vocab_head, TiedHead):
            self.vocab_head.tie(self.inner.get_input_embeddings())

    @property
    def state_size(self) -> int:
        return self.architecture["hidden_size"]

    @property
    def num_depths(self) -> int:
        return 1

    @property
    def max_depth(self) -> None:
        return None

    def head(self, depth: int) -> Head:
        return self.vocab_head

    # --- start -----------------------------------------------------------------------------------

    def bind(self, target: Target) -> Drafter:
        """A drafter that borrows no matrix serves every target with its vocabulary."""
        if self._borrows or target.vocab_size != self.vocab_size:
            return super().bind(target)
        self._bound = [target]
        self.vocab_head.bind(target, self.draft_ids_D)
        return self

    @torch.no_grad()
    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        if self.begin.init == "random":
            return
        if self.begin.source is not None:
            weights = source_weights(self.begin.source, target)
        else:
            kept = self._choose_layers(target, calibration)
            weights = target_weights(target, kept)
            if self.begin.init == "width":
                scores = activation_scores(target, calibration)
                shapes = {"before": target.plain_config, "after": self.architecture}
                weights = cut(weights, scores, kept=kept, **shapes)
        load_weights(self.inner, weights, own_embedding=self.own_embedding)
        rows_Vd = weights.head_Vd
        self.vocab_head.copy_rows(
            rows_Vd if self.draft_ids_D is None else rows_Vd[self.draft_ids_D]
        )
        self._adapt()

    def _choose_layers(self, target: Target, calibration: Sequence[Tensor]) -> Sequence[int]:
        """Which of the target's layers are kept; by importance it is known only now."""
        count, total = self.architecture["num_hidden_layers"], target.num_layers
        if self.begin.keep != "importance" or count == total:
            return kept_layers(self.begin.keep, count, total)
        kept = block_importance(target, calibration).topk(count).indices.sort().values.tolist()
        self._set_architecture(relisted(self.architecture, target.plain_config, kept))
        return kept

    def _adapt(self) -> None:
        if self.lora is not None:
            add_adapters(self.inner, self.lora)

    def start_from(self, earlier: Drafter) -> None:
        """Its weights, with new adapters where this drafter trains adapters."""
        assert isinstance(earlier, CausalLm)
        if has_adapters(self.inner) or earlier.architecture != self.architecture:
            device = next(self.parameters()).device
            self._set_architecture(earlier.architecture)
            self.to(device)
        super().start_from(earlier)
        self._adapt()

    # --- reading ---------------------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """E(x), with the scaling some architectures put on it."""
        if self.own_embedding:
            return self.inner.get_input_embeddings()(tokens)
        return super().embed(tokens)

    def read(
        self,
        tokens_BT: Tensor,
        *,
        attention_mask: Any = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """y of these tokens, `[B, T, d]`; their keys and values are appended to the cache."""
        return self.inner(
            inputs_embeds=self.embed(tokens_BT),
            attention_mask=attention_mask,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        yield Depth(self.read(tokens_BT), self.vocab_head, shift=0)

    def initial_state(self) -> LmState:
        return LmState(Memory())

    def start(self, features: Features, tokens_1T: Tensor) -> LmState:
        """Read x_0..x_{T-2}; the last token is the root and is read with the first draft."""
        memory = self.initial_state().memory
        if tokens_1T.shape[1] > 1:
            self.read(tokens_1T[:, :-1], cache=memory.cache)
        memory.length, memory.unread = tokens_1T.shape[1] - 1, tokens_1T[0, -1:].tolist()
        return LmState(memory)

    def extend(self, state: LmState, features: Features, tokens_1N: Tensor) -> LmState:
        """Nothing is computed here: keys of drafts that were accepted are kept, the rest is read
        with the next root."""
        state.memory.advance(tokens_1N[0].tolist())
        return LmState(state.memory)

    def step(self, state: LmState, depth: int, frontier: Frontier) -> tuple[LmState, Tensor]:
        step = plan_step(state, depth, frontier)
        mask = None
        if step.visible is not None:
            at_K = state.memory.positions(0, step.visible.device)
            at_N = step.positions_1N[0]
            mask = additive(step.visible, at_N, at_K, self.inner.config, self.dtype)
        states_1Nd = self.read(
            step.tokens_1N,
            attention_mask=mask,
            positions_BT=step.positions_1N,
            cache=state.memory.cache,
        )
        # At depth 0 what was unread before the root came along; only the root has children.
        return step.state, states_1Nd[0, -len(frontier.tokens_N) :]

    # --- elsewhere -------------------------------------------------------------------------------

    def as_generator_target(self) -> GeneratorTarget:
        """This drafter in the place of a target, for data_prep.generate.Generator."""
        return GeneratorTarget(self)

    def merged(self) -> "CausalLm":
        """The same function without adapters (itself when it has none)."""
        if not has_adapters(self.inner):
            return self
        plain = type(self)(**self._settings)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("inner.")}
        state |= {f"inner.{k}": v for k, v in merged_state(self.inner).items()}
        plain.load_state_dict(state)
        plain.to(next(self.parameters()).device, self.dtype)
        plain.set_acceptance(self.acceptance)
        if self._bound:
            plain.bind(self.target)
        return plain.train(self.training)

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments that build this drafter without its target and without adapters."""
        given: Any = self._hub_mixin_config
        return given | {"architecture": self.architecture, "target_config": None, "lora": None}

    def _save_pretrained(self, save_directory: Path) -> None:
        plain = self.merged()
        plain._hub_mixin_config = plain._settings  # type: ignore[assignment]
        super(CausalLm, plain)._save_pretrained(save_directory)
