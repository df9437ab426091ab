"""A drafter that is right where it is given the states of exactly the layers it names.

Engines show nobody which layers they read, and a trained drafter accepts as much from neighbouring
ones. This one is solved, not trained: its layer does nothing (W_o = W_down = 0), and C is the least
squares solution of

    C_j h_k(t) =      e(x_{t+2})     where k is layer j's own number
    C_j h_k(t) = -4 * e(x_{t+2})     where k is one more or one less

at every position t of known texts, e(x) being the unit vector of token x's row in the head. With
three right layers the next token has the logit 3 and all others 0, with one wrong layer it has -2,
and another token is drafted. So the first draft of a round is accepted if all layers are the right
ones, and refused if one of them is not.

Shape legend: N positions, d hidden size, D draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.drafter.eagle3 import Eagle3
from models.head.own import OwnHead
from models.target import Target

LAYERS = [3, 14, 26]
"""In no regular distance."""
WRONG = -4.0


@torch.no_grad()
def layer_probe(target: Target, texts: Sequence[Tensor], layers: list[int]) -> Eagle3:
    """Right on these texts (token ids, `[T]`), given these layers."""
    ids_D = torch.cat(list(texts)).unique()
    assert len(ids_D) <= target.hidden_size, "one row of C a token"
    drafter = Eagle3(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        feature_layers=layers,
        draft_vocab_size=len(ids_D),
        head={"_target_": "models.head.own.OwnHead"},
    )
    drafter.set_vocab(ids_D)
    drafter.bind(target).init_from(target)
    drafter.layer.self_attn.o_proj.weight.zero_()
    drafter.layer.mlp.down_proj.weight.zero_()
    drafter.norm.weight.fill_(1.0)
    head = drafter.head(0)
    assert isinstance(head, OwnHead)
    head.linear.weight.copy_(torch.eye(*head.linear.weight.shape))
    around = sorted({k + step for k in layers for step in (-1, 0, 1)})
    seen = [target.forward(text[None], layers=tuple(around)) for text in texts]
    next_N = torch.cat([torch.searchsorted(ids_D, text[2:]) for text in texts])
    wanted_Nd = torch.nn.functional.one_hot(next_N, target.hidden_size).double()
    blocks = []
    for layer in layers:
        rows, sides = [], []
        for k in (layer - 1, layer, layer + 1):
            rows.append(torch.cat([s.layers[k][0, :-2] for s in seen]).double())
            sides.append(wanted_Nd if k == layer else WRONG * wanted_Nd)
        solved_dd = torch.linalg.lstsq(torch.cat(rows), torch.cat(sides), driver="gelsd").solution
        blocks.append(solved_dd.T)
    drafter.fc.weight.copy_(torch.cat(blocks, dim=1))
    return drafter.eval()
