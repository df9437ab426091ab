"""Validate a drafter's OpenVINO IR: what OpenVINO GenAI would refuse or misread in silence.

The IR is XML with offsets into one file of weights; both are read without OpenVINO.
"""

import json
from pathlib import Path
from xml.etree import ElementTree

MODEL = "openvino_model.xml"
PLAIN = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
FILES = ("config.json", "openvino_tokenizer.xml", "openvino_detokenizer.xml")
IDS = "eagle_aux_hidden_state_layer_ids"


def is_mine(folder: Path) -> bool:
    """Whether the folder holds an IR."""
    return (folder / MODEL).is_file()


def problems(folder: Path) -> list[str]:
    """What is wrong, one clause each."""
    try:
        root = ElementTree.parse(folder / MODEL).getroot()
    except ElementTree.ParseError as error:
        return [f"{MODEL} is no XML ({error})"]
    found = [f"{name} is missing" for name in FILES if not (folder / name).is_file()]
    found += _weight_problems(folder, root)
    layers = root.findall("./layers/layer")
    inputs = {layer.get("name") for layer in layers if layer.get("type") == "Parameter"}
    found += [f"the IR has no input '{name}'" for name in sorted(PLAIN - inputs)]
    info = {entry.tag: entry.get("value") for entry in root.findall("./rt_info/*")}
    if "hidden_states" in inputs:
        found += _eagle3_problems(folder, info)
    elif inputs - PLAIN:
        found.append(f"the IR has inputs of no draft model: {sorted(inputs - PLAIN, key=str)}")
    return found


def _weight_problems(folder: Path, root: ElementTree.Element) -> list[str]:
    """Constants beyond the end of the file, and weights in several precisions."""
    file = folder / MODEL.replace(".xml", ".bin")
    if not file.is_file():
        return [f"{file.name} is missing"]
    size, found, precisions = file.stat().st_size, [], set()
    for layer in root.findall("./layers/layer[@type='Const']"):
        data = layer.find("data")
        if data is None or data.get("offset") is None:
            continue
        end = int(data.get("offset", 0)) + int(data.get("size", 0))
        if end > size:
            found.append(
                f"'{layer.get('name')}' ends at byte {end:,} and {file.name} at {size:,}: the file "
                "was cut off"
            )
        shape = (data.get("shape") or "").split(",")
        if (layer.get("name") or "").startswith("self.model") and len(shape) == 2:
            precisions.add(data.get("element_type"))
    if len(precisions) > 1:
        found.append(
            f"weights are in several precisions ({', '.join(sorted(map(str, precisions)))})"
        )
    return found


def _eagle3_problems(folder: Path, info: dict[str, str | None]) -> list[str]:
    found = []
    if (info.get("eagle3_mode") or "").lower() not in ("true", "1"):
        found.append("the IR does not say eagle3_mode, so it is taken for a draft model")
    listed = info.get("hidden_layers_list")
    if listed is None:
        return [
            *found,
            "the IR has no hidden_layers_list: OpenVINO then reads the outputs of layers 2, L/2 "
            "and L-3, each one layer too late",
        ]
    try:
        outputs = [int(k) for k in listed.split()]
    except ValueError:
        return [*found, f"hidden_layers_list is '{listed}', expected three numbers like '1 14 26'"]
    if len(outputs) != 3 or outputs != sorted(outputs) or outputs[0] < 0:
        found.append(f"hidden_layers_list is '{listed}', expected three ascending layers")
    config = folder / "config.json"
    before = json.loads(config.read_text()).get(IDS) if config.is_file() else None
    if before is not None and [k - 1 for k in before] != outputs:
        found.append(
            f"hidden_layers_list is '{listed}' and {IDS} in config.json {before}, expected one "
            "less there each (the index of the layer whose output it is)"
        )
    return found
