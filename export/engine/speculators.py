"""The speculators library, an independent reader of its own format."""

from export.engine.environment import Environment, Pip


class Speculators(Environment):
    """Loads EAGLE-3 exports; no engine, it serves nothing."""

    name = "speculators"
    version = "0.9.0"
    # Without its pins on audio and video libraries, which loading a drafter does not need.
    steps = (
        Pip(("torch==2.13.0",)),
        Pip(("transformers==5.19.0", "loguru<=0.7.3")),
        Pip(("speculators==0.9.0", "hs-connectors==0.9.0"), deps=False),
        Pip(
            (
                "aiohttp",
                "click",
                "datasets",
                "httpx",
                "openai",
                "protobuf",
                "psutil",
                "pydantic",
                "pydantic-settings",
                "rich",
                "safetensors",
                "typer",
            )
        ),
    )
    gigabytes = 1.5
    minutes = 1.0
