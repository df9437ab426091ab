"""The frozen target: loading, features, embedding and vocabulary head.

Shape legend: B sequences, T positions, d hidden size, V vocabulary.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from models.device import pick_device, pick_dtype
from models.packaged import convert_packaged_gguf

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class Features:
    """What a drafter may read of the target.

    `final_BTd` is f_t: the last hidden state *after* the final norm, so that p_t = softmax(W f_t)
    predicts x_{t+1}. `layers` maps k to the residual stream after k decoder layers (Hugging Face's
    `hidden_states[k]`; k = 0 is the embedding), for 0 <= k <= number of layers. The last of them is
    what the final norm reads (in Hugging Face's list, f stands in its place).
    """

    final_BTd: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, index: Any) -> "Features":
        """Index every feature with the same (batch, position) index."""
        return Features(self.final_BTd[index], {k: v[index] for k, v in self.layers.items()})

    def to(self, dtype: torch.dtype) -> "Features":
        return Features(self.final_BTd.to(dtype), {k: v.to(dtype) for k, v in self.layers.items()})


class Target:
    """A frozen causal language model and its tokenizer.

    Not an `nn.Module`, on purpose: a drafter or a LightningModule may hold one without it entering
    the optimizer, a checkpoint or a `state_dict`.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.config: Any = model.config.get_text_config()
        self._check_projection()

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary head, which may exceed the tokenizer's length (padding rows)."""
        return self.head_weight_Vd.shape[0]

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head_weight_Vd(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @property
    def embedding_weight_Vd(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def layer_shape(self) -> dict[str, Any]:
        """Plain numbers a drafter needs to build a decoder layer like the target's."""
        c = self.config
        rope = dict(getattr(c, "rope_parameters", None) or {})
        # Where layers differ in it (sliding windows), those that attend to everything.
        rope = rope.get("full_attention") or rope
        heads = c.num_attention_heads
        return {
            "num_heads": heads,
            "num_kv_heads": getattr(c, "num_key_value_heads", None) or heads,
            "head_dim": getattr(c, "head_dim", None) or c.hidden_size // heads,
            "intermediate_size": c.intermediate_size,
            "max_positions": c.max_position_embeddings,
            "rms_norm_eps": getattr(c, "rms_norm_eps", None) or 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **rope},
        }

    @property
    def plain_config(self) -> dict[str, Any]:
        """The language model's config as JSON data, for drafters of the target's architecture."""
        return plain_config(self.config)

    @property
    def num_parameters(self) -> int:
        """Parameters of the target, tied matrices counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: the tokenizer's EOS and the generation config's."""
        generation = getattr(self.model, "generation_config", None)
        ids: set[int] = set()
        for eos in (self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
            if eos is not None:
                ids |= {int(i) for i in (eos if isinstance(eos, (list, tuple)) else [eos])}
        return tuple(sorted(ids))

    def embed(self, tokens: Tensor) -> Tensor:
        """E(x): token embeddings, `[..., d]`."""
        return self.model.get_input_embeddings()(tokens)

    def project(self, features: Tensor) -> Tensor:
        """Logits W f of final features, `[..., d]` -> `[..., V]`, with the target's soft cap."""
        logits = self.model.get_output_embeddings()(features)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def forward(
        self,
        tokens_BT: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Run the decoder stack without its vocabulary head.

        `attention_mask` is a `[B, keys]` padding mask or a `[B, 1, T, keys]` additive mask (0 where
        visible, -inf elsewhere). With a `cache` the keys and values of these tokens are appended.
        """
        decoder = self.model.get_decoder()
        last: list[Any] = []
        hooks = []
        if self.num_layers in layers:
            stack = self._decoder_layers(decoder)
            hooks.append(stack[-1].register_forward_hook(lambda *given: last.append(given[-1])))
        try:
            out = decoder(
                input_ids=tokens_BT,
                attention_mask=attention_mask,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=any(k < self.num_layers for k in layers),
            )
        finally:
            for hook in hooks:
                hook.remove()
        inner = {k: out.hidden_states[k] for k in layers if k < self.num_layers}
        for made in last:
            inner[self.num_layers] = made[0] if isinstance(made, tuple) else made
        return Features(out.last_hidden_state, inner)

    @property
    def layers(self) -> nn.ModuleList:
        """All decoder layers."""
        return self._decoder_layers(self.model.get_decoder())

    def _decoder_layers(self, decoder: nn.Module) -> nn.ModuleList:
        """The list of all decoder layers."""
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise ValueError(
            f"The decoder layers of the target '{self.name}' ({type(decoder).__name__}) were not "
            f"found: expected a list of {self.num_layers} modules in it. Its stream before the "
            "final norm cannot be read; use a drafter that does not ask for it."
        )

    def fingerprint(self) -> str:
        """16 hex digits that change when the weights change.

        A strided sample of every tensor, rounded to bf16, so that the same checkpoint loaded in
        fp32 and in bf16 has one fingerprint.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 512)].to(torch.bfloat16).view(torch.int16)
            digest.update(name.encode() + str(tuple(weight.shape)).encode())
            digest.update(sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def template_hash(self) -> str:
        """16 hex digits of the chat template (of an empty string when there is none)."""
        template = self.tokenizer.chat_template or ""
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def _check_projection(self) -> None:
        """`project(forward(x))` must be the model's own logits: some models scale in between."""
        tokens = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        ours = self.project(self.forward(tokens).final_BTd).float()
        theirs = self.model(input_ids=tokens).logits.float()
        if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2):
            raise ValueError(
                f"The target '{self.name}' changes its logits between the last hidden state and "
                f"the output by more than a soft cap (largest difference "
                f"{(ours - theirs).abs().max():.3g}); its vocabulary head cannot be reused by a "
                "drafter as it is. Use a target whose logits are a linear map of the last hidden "
                "state, or add its scaling to Target.project."
            )


def load_target(
    *,
    name: str,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> Target:
    """Load a frozen target.

    `name` is a Hub id, a local folder, or `package:<module>` for the GGUF inside an installed
    Python package, which is dequantised once into the local cache as safetensors (bf16).
    `adapter` is a PEFT adapter (folder or Hub id), merged into the weights: the target is then the
    fine-tuned model, with a fingerprint of its own.

    Raises ValueError when the folder or package does not exist.
    """
    source = resolve_name(name)
    where = pick_device(device)
    kwargs: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=pick_dtype(dtype, where), attn_implementation=attn_implementation, **kwargs
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model = model.to(where)
    commit = getattr(model.config, "_commit_hash", None)
    return Target(model=model, tokenizer=tokenizer, name=name, revision=revision or commit)


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers config as JSON data, nothing left out but the place it was read from: drafters
    keep it, and a published one should not tell anybody's folders."""
    data = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in data.items() if key != "_name_or_path"}


def resolve_name(name: str) -> str:
    """The folder or Hub id that transformers can load for a target's `name`."""
    if name.startswith(PACKAGE_PREFIX):
        return str(convert_packaged_gguf(name.removeprefix(PACKAGE_PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"target.name='{name}' looks like a folder, but there is none at {path.absolute()}. "
            "Give an existing folder, a Hub id (owner/name), or package:<module> for an embedded "
            "model."
        )
    return name
