"""An OpenAI-compatible server of a target: a real one, whose answers the target computes.

    python -m tests.data_prep.serving target=<folder> port=8000

It speaks the part of the protocol that vLLM and SGLang share, and fails where a test asks it to.
"""

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from data_prep.generate import Generator, Request
from models.target import Target, load_target

NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_k": -1,
}
"""What a server would otherwise take from its model's generation_config."""

Fault = str | int | None
"""An HTTP status; "hang up"; or a way to answer wrongly: "no ids", "other prompt", "cut", ..."""


class Serving:
    """`fault(n)` says what goes wrong with completion number n (from 0). `asked` are all bodies."""

    def __init__(
        self,
        target: Target,
        *,
        port: int = 0,
        names: tuple[str, ...] = ("tiny",),
        room: int = 512,
        key: str | None = None,
        fault: Callable[[int], Fault] = lambda _: None,
    ) -> None:
        self.target, self.names, self.room, self.key, self.fault = target, names, room, key, fault
        self.generator = Generator(target=target)
        self.asked: list[dict[str, Any]] = []
        self.most = self._now = 0  # requests at a time
        self.answering = threading.Lock()
        self._counting = threading.Lock()
        self._sockets: set[socket.socket] = set()
        serving = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            serving: "Serving"

            def setup(self) -> None:
                super().setup()
                serving._sockets.add(self.connection)

            def finish(self) -> None:
                serving._sockets.discard(self.connection)
                with contextlib.suppress(OSError):
                    super().finish()

            def do_GET(self) -> None:
                serving.get(self)

            def do_POST(self) -> None:
                serving.post(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client or this server hung up

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    @contextmanager
    def running(self) -> Iterator["Serving"]:
        thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.die()
            thread.join()

    def die(self) -> None:
        """All at once, with requests in flight."""
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            cards = [
                {"id": n, "owned_by": "tinyserve", "max_model_len": self.room} for n in self.names
            ]
            self._send(handler, 200, {"object": "list", "data": cards})
        elif handler.path == "/version":
            self._send(handler, 200, {"version": "1.0"})
        else:
            self._send(handler, 404, {"detail": "Not Found"})

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return self._send(handler, 401, {"error": "unauthorized"})
        with self._counting:
            number = len(self.asked)
            self.asked.append(body)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            fault = self.fault(number)
            if fault == "hang up":
                handler.close_connection = True
                return handler.connection.shutdown(socket.SHUT_RDWR)
            if isinstance(fault, int):
                return self._send(handler, fault, {"error": {"message": f"injected {fault}"}})
            self._send(handler, 200, self._complete(body, fault))
        finally:
            with self._counting:
                self._now -= 1

    def _complete(self, body: dict[str, Any], fault: Fault) -> dict[str, Any]:
        assert {k: body[k] for k in NEUTRAL} == NEUTRAL
        assert body["stop_token_ids"] == list(self.target.eos_ids)
        request = Request(
            "x",
            body["prompt"],
            body["max_tokens"],
            body["temperature"],
            body["top_p"],
            body["seed"],
        )
        with self.answering:
            (answer,) = self.generator.answer_batch([request])
        tokens = answer.tokens
        reason = "stop" if answer.finish_reason == "eos" else "length"
        if fault == "cut":
            tokens, reason = tokens[:-1], "length"
        if fault == "stop word":
            tokens, reason = [t for t in tokens if t not in self.target.eos_ids][:3], "stop"
        if fault == "abort":
            reason = "abort"
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice["text"] = self.target.tokenizer.decode(tokens)
        if body.get("return_token_ids") and fault != "no ids":
            seen = body["prompt"][1:] if fault == "other prompt" else body["prompt"]
            choice |= {"token_ids": tokens, "prompt_token_ids": seen}
        if body.get("logprobs") is not None and fault != "no logprobs":
            choice["logprobs"] = {"token_logprobs": self._logprobs(body["prompt"], tokens)}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
        return {"object": "text_completion", "choices": [choice], "usage": usage}

    @torch.inference_mode()
    def _logprobs(self, prompt: list[int], tokens: list[int]) -> list[float]:
        logits = self.target.model(input_ids=torch.tensor([prompt + tokens])).logits[0]
        logp = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        return logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        with contextlib.suppress(OSError):
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)


if __name__ == "__main__":
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    served = load_target(name=settings["target"], dtype="float32", device="cpu")
    Serving(served, port=int(settings["port"])).http.serve_forever()
