"""A dataset of the Hugging Face Hub (or any folder that `datasets` can load)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_prep.conversation import Conversation, spread
from data_prep.source.base import Source
from data_prep.source.shapes import ShapeError, to_conversation


@dataclass(kw_only=True)
class Hub(Source):
    """Every record of one split. Give a `revision` to be able to make the same data again."""

    dataset: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None
    on_bad: Literal["error", "skip"] = "error"

    def read(self) -> Iterator[Conversation]:
        self.skipped.clear()
        yield from spread(list(self._read_all()), self.limit)
        self.report(self.dataset)

    def _read_all(self) -> Iterator[Conversation]:
        # Imported here: it takes a second, and only this source needs it.
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            rows = datasets.load_dataset(
                self.dataset, self.subset, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(
                f"The Hub dataset '{self.dataset}' (subset {self.subset}, split '{self.split}') "
                f"cannot be loaded: {str(error).splitlines()[0]} Check the name and the network, "
                "or give local files instead."
            ) from error
        name = self.dataset.rstrip("/").split("/")[-1]
        for number, record in enumerate(rows):
            try:
                yield to_conversation(record, id=f"{name}/{number}")
            except ShapeError as error:
                sentence = f"record {number} of the Hub dataset '{self.dataset}' {error}"
                if self.on_bad == "error":
                    raise ValueError(
                        f"{sentence}. Set on_bad: skip on this source to leave such records out "
                        "(each is reported), or convert the dataset to a known shape."
                    ) from error
                self.skipped.append(sentence)
