"""What a user does one after the other, in one process whose HF_ENDPOINT is a server of ours."""

import json
import sys

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from omegaconf import OmegaConf

from scripts.upload import upload

settings = json.loads(sys.argv[1])
cfg = OmegaConf.merge(OmegaConf.load("conf/upload.yaml"), settings)
cfg.dry_run = True
assert upload(cfg) is None  # type: ignore[arg-type]
cfg.dry_run = False
try:
    upload(cfg)  # type: ignore[arg-type]
except HfHubHTTPError as error:
    print("interrupted:", error.response.status_code)  # noqa: T201
print("commit:", upload(cfg))  # type: ignore[arg-type]  # noqa: T201
print("again:", upload(cfg))  # type: ignore[arg-type]  # noqa: T201
print("downloaded:", snapshot_download(cfg.repo, cache_dir=sys.argv[2]))  # noqa: T201
