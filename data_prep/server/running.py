"""Servers that are running already, wherever they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from data_prep.server.base import Server
from data_prep.server.replica import base_url
from models.target import Target


@dataclass(kw_only=True)
class Running(Server):
    """Several `urls` share the requests: whoever is free takes the next."""

    urls: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.urls = [base_url(url) for url in self.urls]
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(
                f"server.urls={self.urls} was given; expected at least one address, and each once, "
                "e.g. server.urls=[http://localhost:8000/v1]."
            )

    @contextmanager
    def running(self, target: Target, longest: int) -> Iterator[list[str]]:
        yield self.urls
