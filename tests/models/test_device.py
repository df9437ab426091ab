"""What a CPU process does with memory it frees."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from models.device import keep_freed_memory

FAULTS = """
import resource, sys, torch
from models.device import keep_freed_memory

kept = sys.argv[1] == "keep" and keep_freed_memory(torch.device("cpu"))

def work():
    for megabytes in (3, 24, 80):
        torch.zeros(megabytes * 2**18)

for _ in range(20):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of ten rounds of the same work."""
    command = [sys.executable, "-c", FAULTS, how]
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=plain | environment
    )
    kept, faults = done.stdout.split()
    return kept == "1", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again() -> None:
    given, faults = run("as it comes")
    assert not given
    kept, kept_faults = run("keep")
    assert kept
    # 107 MB are 27,392 pages of 4 kB a round, some hundred where the system makes them huge.
    assert faults > 400
    assert kept_faults < 100


def test_a_choice_in_the_environment_is_left_alone() -> None:
    kept, _ = run("keep", MALLOC_TRIM_THRESHOLD_="0")
    assert not kept


def test_an_accelerator_changes_nothing() -> None:
    assert not keep_freed_memory(torch.device("cuda"))
