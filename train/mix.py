"""A second dataset beside the first: 9 : 1 answers and plain text (Direct Alignment, 2403.00858).

Fine-tuning on one kind of text makes a small drafter forget the others; a little of its
pretraining text in every epoch is the usual cure.
"""

from collections.abc import Sequence

from torch import Tensor

from conf.console import say
from data_prep.conversation import spread
from data_prep.folder import DatasetFolder
from data_prep.pipeline import Dataset
from data_prep.shards import Example, ShardReader
from data_prep.signal import SignalRows
from models.target import Features, Target


class Mix:
    """`share` of the tokens to learn come from `dataset`, drawn evenly over it.

    With a share s and N tokens to learn in the first dataset, examples of the second are taken
    until they hold about N s / (1 - s) tokens; when it has fewer, all of it is used and that is
    said. Validation stays on the first dataset.
    """

    def __init__(self, *, dataset: Dataset, share: float) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(
                f"mix.share={share} should lie between 0 and 1, because it is the part of the "
                "tokens to learn that comes from mix.dataset; give e.g. 0.1, or mix=null for none."
            )
        self.dataset, self.share = dataset, share
        self.folder: DatasetFolder | None = None

    def prepare(self, target: Target) -> None:
        """Make the dataset when it is missing."""
        self.folder = self.dataset.prepare(target)

    def reader(self, main: ShardReader) -> "MixedReader":
        """The training examples of both."""
        assert self.folder is not None, "prepare comes before reader"
        extra = self.folder.reader("train")
        here, there = (r.manifest["splits"]["train"]["learned"] for r in (main, extra))
        wanted = here * self.share / (1.0 - self.share)
        count = len(extra) if wanted >= there else max(1, round(len(extra) * wanted / there))
        kept = {example.id for example in spread([extra[i] for i in range(len(extra))], count)}
        chosen = [i for i in range(len(extra)) if extra[i].id in kept]
        learned = sum(int(extra[i].learn.sum()) for i in chosen)
        short = f", all it has (mix.share={self.share} asks for {wanted:,.0f})"
        say(
            f"Mixed in: {learned:,} tokens to learn of dataset '{self.dataset.name}'"
            f"{short if wanted > there else ''} beside {here:,}."
        )
        return MixedReader(main, extra, chosen)


class MixedReader:
    """All examples of `main`, then the chosen ones of `extra`, by index."""

    def __init__(self, main: ShardReader, extra: ShardReader, chosen: Sequence[int]) -> None:
        self.main, self.extra, self.chosen = main, extra, list(chosen)
        self.folder = main.folder

    def __len__(self) -> int:
        return len(self.main) + len(self.chosen)

    def __getitem__(self, index: int, /) -> Example:
        reader, place = self._find(index)
        return reader[place]

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Inner layers that both have feature shards of; None when one has no feature shards."""
        ours, theirs = self.main.layers, self.extra.layers
        if ours is None or theirs is None:
            return None
        return tuple(k for k in ours if k in theirs)

    def features(self, index: int, layers: Sequence[int] = (), /) -> tuple[Features, Tensor] | None:
        """As ShardReader.features, of whichever dataset the example is from."""
        reader, place = self._find(index)
        return reader.features(place, layers)

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that both datasets have."""
        return tuple(name for name in self.main.signals if name in self.extra.signals)

    def signal(self, index: int, name: str, /) -> SignalRows:
        """As ShardReader.signal, of whichever dataset the example is from."""
        reader, place = self._find(index)
        return reader.signal(place, name)

    def _find(self, index: int) -> tuple[ShardReader, int]:
        if index < len(self.main):
            return self.main, index
        return self.extra, self.chosen[index - len(self.main)]
