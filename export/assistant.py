"""A small language model as a plain transformers folder that loads anywhere without our code.

What `AutoModelForCausalLM.from_pretrained` expects, and nothing else:
    config.json                        the inner model's own config; tie_word_embeddings where the
                                       head and the embedding are one matrix
    model.safetensors                  model.embed_tokens, model.layers.*, model.norm, lm_head
    tokenizer files, chat template     the target's
    generation_config.json             how it drafts: num_assistant_tokens, constant schedule,
                                       confidence threshold 0 (transformers' own 0.4 cuts drafts)
Borrowed matrices of the target are written out. A head over a reduced vocabulary becomes full width
(export/outside.py). The proof reads the folder back with transformers alone.

Shape legend: N states, d hidden size, D draft vocabulary, V target vocabulary, T positions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from export.base import HERE, THERE, Exporter, Precision, Reader
from export.outside import ADVICE, MASS, outside_mass
from export.plain import MAX_TOKENS, PlainModel, embedding_of, head_of, logits_of
from export.tensors import tensor_problems
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.head.frozen import FrozenHead
from models.head.own import OwnHead
from models.head.tied import TiedHead
from models.target import PACKAGE_PREFIX, Target

LOGITS = 1e-3
"""Largest difference of two logits, relative to the largest logit, in fp32."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class AssistantExporter(Exporter):
    """A drafter that is a language model, for `generate(assistant_model=...)` and other engines.

    `gamma` is the number of tokens drafted a round, best the one `python -m decode` found fastest.
    """

    name = "assistant"
    engine = "transformers assisted generation"
    library = "transformers"
    writes_text = True
    served_by = ("transformers", "vllm")

    def __init__(self, *, gamma: int = 4, dtype: Precision | None = None) -> None:
        super().__init__(dtype=dtype)
        if gamma < 1:
            raise ValueError(
                f"exporter.gamma={gamma} drafts a round were asked for, expected 1 or more, "
                "because the folder tells transformers how many to draft; give the gamma that "
                "`python -m decode` found best."
            )
        self.gamma = gamma

    def refuse(self, drafter: Drafter) -> None:
        if not isinstance(drafter, CausalLm):
            raise ValueError(
                f"A transformers assistant is a language model of its own, and "
                f"{type(drafter).__name__} reads the target's states; train drafter=causal_lm for "
                "it."
            )
        head = drafter.head(0)
        if isinstance(head, OwnHead) and head.linear.bias is not None:
            raise ValueError(
                "This drafter's vocabulary head has a bias and a plain language model's has none; "
                "train with drafter.head.bias=false."
            )
        if not isinstance(head, (OwnHead, FrozenHead, TiedHead)):
            raise ValueError(
                f"A plain language model's vocabulary head is one matrix, and this drafter has a "
                f"{type(head).__name__}; train with head@drafter.head=own, frozen or tied."
            )

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        self.refuse(drafter)
        assert isinstance(drafter, CausalLm)
        embedding_Vd = embedding_of(drafter)
        head_Vd = head_of(drafter, embedding_Vd, texts)
        tied = torch.equal(head_Vd, embedding_Vd)
        config = type(drafter.inner.config).from_dict(drafter.inner.config.to_dict())
        config.tie_word_embeddings = tied
        config.vocab_size = drafter.vocab_size
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, key, getattr(drafter.target.config, key, None))
        if getattr(config, "final_logit_softcapping", None) is not None:
            config.final_logit_softcapping = None  # our heads are linear
        model: Any = AutoModelForCausalLM.from_config(config, dtype=drafter.dtype)
        decoder = model.get_decoder()
        table = decoder.get_input_embeddings()
        name = next(name for name, module in decoder.named_modules() if module is table)
        weights = {**drafter.inner.state_dict(), f"{name}.weight": embedding_Vd}
        decoder.load_state_dict(weights, strict=True)
        lm_head = model.get_output_embeddings()
        if not tied:
            lm_head.weight.data.copy_(head_Vd)
        if lm_head.bias is not None:  # some architectures have one; our heads do not
            lm_head.bias.data.zero_()
        model.generation_config = self._knobs(drafter)
        model.save_pretrained(folder)
        drafter.target.tokenizer.save_pretrained(folder)

    def _knobs(self, drafter: Drafter) -> GenerationConfig:
        """How transformers drafts with this folder, and where a text ends."""
        kept = drafter.target.model.generation_config
        return GenerationConfig(
            bos_token_id=kept.bos_token_id,
            eos_token_id=list(drafter.target.eos_ids) or None,
            pad_token_id=kept.pad_token_id,
            num_assistant_tokens=self.gamma,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )

    def read(self, folder: Path, target: Target) -> Reader:
        return PlainModel(folder, target.device)

    @torch.inference_mode()
    def compare(
        self, folder: Path, *, drafter: Drafter, target: Target, texts: Sequence[Tensor]
    ) -> dict[str, float]:
        """Logits at every position of the texts, and what lies outside the draft vocabulary."""
        model = PlainModel(folder, target.device).model
        ids_D = drafter.draft_ids_D
        difference = largest = mass = 0.0
        positions = 0
        for text_T in texts:
            tokens_1T = text_T[:MAX_TOKENS].to(target.device)[None]
            want_TD = logits_of(drafter, tokens_1T)
            got_TV = model(input_ids=tokens_1T).logits[0]
            got_TD = got_TV if ids_D is None else got_TV[:, ids_D]
            difference = max(difference, float((got_TD - want_TD).abs().max()))
            largest = max(largest, float(want_TD.abs().max()))
            positions += len(want_TD)
            if ids_D is not None:
                mass = max(mass, float(outside_mass(got_TV, ids_D).max()))
                self._insist_on_argmax(got_TV, got_TD, ids_D)
        if difference > LOGITS * largest:
            raise ValueError(
                f"The export's logits differ from the trained drafter's by up to {difference:.3g} "
                f"over {positions:,} positions of validation text, expected less than "
                f"{LOGITS * largest:.3g} in fp32, because transformers would draft other tokens; "
                "nothing was exported. The exporter for this format is wrong or the run's files "
                "changed since training."
            )
        if mass >= MASS:
            raise ValueError(
                f"Up to {mass:.2g} of the export's probability lies outside the draft vocabulary "
                f"on validation text, expected less than {MASS:g}, because a plain language model "
                f"has rows for all tokens and no bias to switch some off; {ADVICE}."
            )
        figures = {"positions": positions, "largest_logit_difference": difference}
        return figures if ids_D is None else {**figures, "largest_outside_mass": mass}

    def _insist_on_argmax(self, got_TV: Tensor, got_TD: Tensor, ids_D: Tensor) -> None:
        if not torch.equal(got_TV.argmax(-1), ids_D[got_TD.argmax(-1)]):
            raise ValueError(
                "The export's best token lies outside the draft vocabulary at some position of "
                f"validation text, expected nowhere; nothing was exported: {ADVICE}."
            )

    def chain_length(self, drafter: Drafter) -> int:
        return self.gamma

    def usage(self, *, target: str, depths: int) -> str:
        served = THERE if target.startswith(PACKAGE_PREFIX) else target
        config = {"method": "draft_model", "model": HERE, "num_speculative_tokens": self.gamma}
        return f"""A plain language model with the target's tokenizer. With transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{served}")
target = AutoModelForCausalLM.from_pretrained("{served}")
drafter = AutoModelForCausalLM.from_pretrained("{HERE}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
out = target.generate(**inputs, assistant_model=drafter, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(out[0]))
```

`generation_config.json` asks for {self.gamma} drafts a round, a constant schedule and no confidence
threshold (transformers would stop drafts at 0.4). One sequence at a time.

Other engines take a plain model as drafter, for example vLLM:

```bash
vllm serve {served} --speculative-config '{json.dumps(config)}'
```"""


def problems(folder: Path) -> list[str]:
    """What is wrong with a folder in this format: what would not load, or draft otherwise."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(t.shape) for name, t in empty.state_dict().items()}
    if config.tie_word_embeddings:
        expected = {k: shape for k, shape in expected.items() if not k.startswith("lm_head.")}
    found = tensor_problems(folder, expected)
    found += [f"{name} is missing" for name in TOKENIZER if not (folder / name).is_file()]
    knobs = _generation(folder)
    if int(knobs.get("num_assistant_tokens", 0)) < 1:
        found.append("generation_config.json has no num_assistant_tokens of 1 or more")
    if knobs.get("num_assistant_tokens_schedule") != "constant":
        found.append("generation_config.json does not draft at a constant length")
    if knobs.get("assistant_confidence_threshold") != 0.0:
        found.append("generation_config.json lets a confidence threshold cut drafts")
    return found


def is_mine(folder: Path) -> bool:
    """Whether this is a causal language model that says how it drafts."""
    named = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    return str(named[0]).endswith("ForCausalLM") and "num_assistant_tokens" in _generation(folder)


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}
