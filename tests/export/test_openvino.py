"""The OpenVINO exporter without OpenVINO: what is refused, what the validator finds in an IR.

The IR below is XML and bytes as optimum-intel writes them, reduced to what is validated; the real
ones are in test_engine_openvino.py.
"""

import json
from pathlib import Path

import pytest

from export.check import check_export
from export.openvino import OpenvinoExporter
from models.target import Target
from tests.export.formats.drafters import eagle, eagle3

IDS = "eagle_aux_hidden_state_layer_ids"
PLAIN = ("input_ids", "attention_mask", "position_ids", "beam_idx")


def write_ir(
    folder: Path,
    *,
    inputs: tuple[str, ...] = (*PLAIN, "hidden_states"),
    mode: str | None = "True",
    layers: str | None = "1 14 26",
    kinds: tuple[str, str] = ("f32", "f32"),
    size: int = 32,
) -> None:
    """Two 2 x 2 matrices and the given inputs."""
    parts = [f'<layer id="{i}" name="{n}" type="Parameter"/>' for i, n in enumerate(inputs)]
    for i, kind in enumerate(kinds):
        parts.append(
            f'<layer id="{90 + i}" name="self.model.{i}.weight" type="Const">'
            f'<data element_type="{kind}" shape="2, 2" offset="{16 * i}" size="16"/></layer>'
        )
    info = f'<eagle3_mode value="{mode}"/>' if mode else ""
    info += f'<hidden_layers_list value="{layers}"/>' if layers else ""
    xml = f"<net><layers>{''.join(parts)}</layers><rt_info>{info}</rt_info></net>"
    (folder / "openvino_model.xml").write_text(xml)
    (folder / "openvino_model.bin").write_bytes(bytes(size))
    for name in ("openvino_tokenizer.xml", "openvino_detokenizer.xml"):
        (folder / name).write_text("<net/>")
    (folder / "config.json").write_text(json.dumps({IDS: [2, 15, 27]}))


def test_whole_folders_pass(tmp_path: Path) -> None:
    write_ir(tmp_path)
    assert check_export(tmp_path) == "openvino"
    write_ir(tmp_path, inputs=PLAIN, mode=None, layers=None)
    assert check_export(tmp_path) == "openvino"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"layers": None}, "no hidden_layers_list: OpenVINO then reads .* one layer too late"),
        (
            {"layers": "2 15 27"},
            r"hidden_layers_list is '2 15 27' and .*\[2, 15, 27\], expected one",
        ),
        ({"layers": "26 14 1"}, "expected three ascending layers"),
        ({"layers": "[1, 14, 26]"}, "expected three numbers like '1 14 26'"),
        ({"mode": None}, "does not say eagle3_mode"),
        ({"inputs": ("input_ids", "hidden_states")}, "no input 'beam_idx'"),
        ({"inputs": (*PLAIN, "images")}, r"inputs of no draft model: \['images'\]"),
        ({"size": 31}, "ends at byte 32 and openvino_model.bin at 31"),
        ({"kinds": ("f32", "f16")}, r"several precisions \(f16, f32\)"),
    ],
)
def test_the_validator_names_each_fault(
    tmp_path: Path, settings: dict[str, object], complaint: str
) -> None:
    write_ir(tmp_path, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=complaint):
        check_export(tmp_path)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    write_ir(tmp_path)
    (tmp_path / "openvino_tokenizer.xml").unlink()
    with pytest.raises(ValueError, match=r"openvino_tokenizer.xml is missing"):
        check_export(tmp_path)
    (tmp_path / "openvino_model.xml").write_text("<net><layers>")
    with pytest.raises(ValueError, match="is no XML"):
        check_export(tmp_path)


def test_what_it_cannot_serve_is_refused(target: Target) -> None:
    exporter = OpenvinoExporter()
    exporter.refuse(eagle3(target))
    with pytest.raises(ValueError, match=r"OpenVINO GenAI cannot serve Eagle: it has EAGLE-3"):
        exporter.refuse(eagle(target))
    with pytest.raises(ValueError, match=r"drafter\.norm_output=true"):
        exporter.refuse(eagle3(target, norm_output=True))
    with pytest.raises(ValueError, match=r"drafter\.norm_before_residual=true"):
        exporter.refuse(eagle3(target, norm_before_residual=True))
    with pytest.raises(ValueError, match=r"dtype=bfloat16.*float32 or float16"):
        OpenvinoExporter(dtype="bfloat16")


def test_half_precision_becomes_the_one_there_is(target: Target) -> None:
    drafter = eagle3(target).bfloat16()
    assert str(OpenvinoExporter().cast(drafter).dtype) == "torch.float16"
    assert str(OpenvinoExporter().cast(eagle3(target)).dtype) == "torch.float32"
