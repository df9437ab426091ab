"""What a rule is told in a test."""

from dataclasses import dataclass


@dataclass
class Told:
    """Given numbers in the place of a drafter's row."""

    depth: int = 0
    best: float = 0.5
    drawn: float = 0.5
    entropy: float = 1.0
    acceptance: float = 0.5
