"""The target's tokenizer inside a GGUF file.

llama.cpp takes a draft model only with the target's vocabulary: the same kind, the same id for a
beginning or end it adds by itself, and the same text for every id from 5 on. So the block is
copied from the target's own GGUF where there is one, and otherwise written from its Hugging Face
tokenizer. There only byte-level BPE can be expressed: SentencePiece needs scores that
tokenizer.json lacks.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter, SpecialVocab, TokenType
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"(?i:{CONTRACTIONS})|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"(?i:{CONTRACTIONS})|{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""Regular expressions that split text before BPE, and what llama.cpp calls them."""
INSTEAD = (
    "give the GGUF that you serve the target with, exporter.target_gguf=<file>, and its tokenizer "
    "is copied"
)


def copy_tokenizer(writer: GGUFWriter, gguf: Path, vocab_size: int) -> None:
    """Every tokenizer key of another GGUF file, chat template included."""
    fields = GGUFReader(gguf).fields
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ValueError(
            f"'{gguf}' has no tokenizer.ggml.tokens, expected the GGUF of a language model, "
            "because its tokenizer goes into the drafter; give the file that serves the target."
        )
    if len(tokens.data) != vocab_size:
        raise ValueError(
            f"'{gguf}' has {len(tokens.data):,} tokens and the target {vocab_size:,} rows in its "
            "vocabulary head, expected as many, because a drafter's ids are the target's; give the "
            "GGUF of this very target."
        )
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=kind)


def write_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """A Hugging Face tokenizer. Raises ValueError for one that llama.cpp has no name for."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        described = json.loads(file.read_text()) if file.is_file() else {}
        pre = pre_tokenizer(described)
        texts, kinds = _tokens(described, vocab_size)
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # Said explicitly, because llama.cpp's default depends on the pre-tokenizer.
    ids: Any = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "eos": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of how tokenizer.json splits text before BPE."""
    model = described.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"The target's tokenizer is of type {model.get('type') or 'unknown'}"
            f"{' with byte fallback (SentencePiece)' if model.get('byte_fallback') else ''}, "
            "expected byte-level BPE, because that is what a GGUF can be given from a "
            "tokenizer.json alone; "
            f"{INSTEAD}."
        )
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    digits = kinds[0] == "Digits" and steps[0].get("individual_digits")
    if kinds == ["Digits", "ByteLevel"] and digits and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        known = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if known is not None:
            return known
    raise ValueError(
        f"The target's tokenizer splits text by {kinds}, expected a way that is known by name here "
        "(GPT-2's, SmolLM's, Llama 3's or Qwen2's), because a GGUF holds the name and not the "
        f"rule; {INSTEAD}."
    )


def _tokens(described: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every id; ids that the tokenizer leaves out are unused."""
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for text, i in described["model"]["vocab"].items():
        texts[i], kinds[i] = text, int(TokenType.NORMAL)
    for added in described.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        texts[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return texts, kinds
