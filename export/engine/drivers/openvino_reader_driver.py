"""Drafts of an OpenVINO IR, computed by OpenVINO itself, one chain a line.

    openvino_reader_driver.py <folder>      then a line of JSON per chain on the standard input:
    {"tokens": [x_0..x_{T-1}], "features": file or null, "drafts": n}

and a line with the n drafted ids for each. `features` is an .npy file [T-1, 3d] of the layers that
EAGLE-3 reads, lowest first; its IR takes them as they are, and after the first draft its own
output stands in their place. OpenVINO GenAI cuts the graph in two for that (the product C in front,
the layer behind it), and so does this.
"""

import json
import sys
from pathlib import Path

import numpy as np
from openvino import Core, Model, Output, Type  # type: ignore
from openvino import opset13 as ops  # type: ignore

HINTS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Ir:
    """The IR with its cache, read row by row."""

    def __init__(self, folder: Path) -> None:
        core = Core()
        model = core.read_model(folder / "openvino_model.xml")
        self.combine = None
        if any("hidden_states" in given.names for given in model.inputs):
            self.combine = _cut(model)
        self.request = core.compile_model(model, "CPU", HINTS).create_infer_request()
        self.d2t = None
        if self.combine is not None:
            self.d2t = _constant(next(o for o in model.outputs if "d2t" in o.names))

    def draft(self, tokens: list[int], features: np.ndarray | None, drafts: int) -> list[int]:
        """Greedy, from a fresh cache."""
        self.request.reset_state()
        self.seen = 0
        given = None
        rows = tokens
        if self.combine is not None:
            assert features is not None
            rows, given = tokens[1:], features.astype(np.float32) @ self.combine.T
        drafted: list[int] = []
        while True:
            best, given = self._read(rows, given)
            drafted.append(best)
            if len(drafted) == drafts:
                return drafted
            rows = [best]

    def _read(self, rows: list[int], given: np.ndarray | None) -> tuple[int, np.ndarray | None]:
        """The best token after the last row, and what the next row reads."""
        end = self.seen + len(rows)
        named = {
            "input_ids": np.array([rows], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self.seen, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        if given is not None:
            named["given"] = given[None]
        out = self.request.infer(named)
        self.seen = end
        best = int(out["logits"][0, -1].argmax())
        if self.combine is None:
            return best, None
        assert self.d2t is not None
        best += int(self.d2t[best])
        return best, out["state"][0, -1:].copy()


def _cut(model: Model) -> np.ndarray:
    """Replace the product C h by an input, and show the layer's output; C."""
    features = next(p for p in model.get_parameters() if "hidden_states" in p.output(0).names)
    product = next(iter(features.output(0).get_target_inputs())).get_node()
    matrix = _constant(product.input_value(1))
    given = ops.parameter([1, -1, matrix.shape[0]], Type.f32, name="given")
    given.output(0).set_names({"given"})
    for reader in product.output(0).get_target_inputs():
        reader.replace_source_output(given.output(0))
    layer = [n for n in model.get_ordered_ops() if n.get_type_name() == "Add"]
    last = next(n for n in layer if n.get_friendly_name().endswith("midlayer/aten::add/Add_1"))
    last.output(0).set_names({"state"})
    model.add_parameters([given])
    model.remove_parameter(features)
    model.add_results([ops.result(last.output(0))])
    model.validate_nodes_and_infer_types()
    return matrix


def _constant(output: Output) -> np.ndarray:
    """The values behind an output, whatever conversion stands before them."""
    node = output.get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return np.array(node.data)


def main() -> None:
    """Answer until the input ends."""
    model = Ir(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        features = None if asked["features"] is None else np.load(asked["features"])
        drafted = model.draft(asked["tokens"], features, asked["drafts"])
        sys.stdout.write(json.dumps(drafted) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
