"""The part of the Hub's HTTP API that huggingface_hub uses to upload and download, on this machine.

POST /api/repos/create                              a repository
POST /api/models/<repo>/preupload/<revision>        which files are large
POST /<repo>.git/info/lfs/objects/batch, PUT /lfs/<sha256>   large files, once each
POST /api/models/<repo>/commit/<revision>           a commit, one JSON a line
GET  /api/models/<repo>/revision/<revision>, HEAD and GET /<repo>/resolve/<revision>/<file>
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """A server with one store; `requests` are (method, path) in order."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.failing_commits = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _send(self, status: int, content: Any = None, **headers: str) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def _any(self) -> None:
                hub.requests.append((self.command, self.path))
                hub.tokens.add(self.headers.get("Authorization"))
                hub.answer(self.command, self.path.partition("?")[0], self._body(), self._send)

            do_GET = do_HEAD = do_POST = do_PUT = _any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo} {self.commits[repo]}".encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes, send: Any) -> None:
        if path == "/api/repos/create":
            return self._create(json.loads(body), send)
        if path == "/api/validate-yaml":
            return send(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            self.blobs[match[1]] = body
            return send(200, {})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body), send)
        if match := re.fullmatch(r"/api/models/(.+)/preupload/\w+", path):
            return self._preupload(self.repos[match[1]], json.loads(body), send)
        if match := re.fullmatch(r"/api/models/(.+)/commit/\w+", path):
            return self._commit(match[1], body, send)
        if match := re.fullmatch(r"/api/models/(.+)/revision/\w+", path):
            files = [{"rfilename": name} for name in self.repos[match[1]]]
            return send(200, {"id": match[1], "sha": self.sha(match[1]), "siblings": files})
        if match := re.fullmatch(r"/api/models/(.+)/tree/\w+", path):
            return send(200, [_described(*file) for file in self.repos[match[1]].items()])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            content = self.repos[match[1]][match[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return send(200, content, ETag=etag, X_Repo_Commit=self.sha(match[1]))
        return send(404, {"error": f"{method} {path} is not answered here"})

    def _create(self, asked: dict[str, Any], send: Any) -> None:
        repo = f"{asked['organization']}/{asked['name']}" if "organization" in asked else None
        repo = repo or asked["name"]
        if repo in self.repos:
            return send(409, {"error": "it exists", "url": f"{self.url}/{repo}"})
        self.repos[repo], self.commits[repo] = {}, 0
        self.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return send(200, {"url": f"{self.url}/{repo}", "name": repo})

    def _preupload(self, files: dict[str, bytes], asked: dict[str, Any], send: Any) -> None:
        answered = []
        for file in asked["files"]:
            large = file["path"].endswith(".safetensors")
            known = files.get(file["path"])
            oid = None
            if known is not None:
                git = hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
                oid = hashlib.sha256(known).hexdigest() if large else git
            mode = "lfs" if large else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            answered.append(entry)
        send(200, {"files": answered})

    def _batch(self, asked: dict[str, Any], send: Any) -> None:
        objects = []
        for wanted in asked["objects"]:
            made: dict[str, Any] = dict(wanted)
            if wanted["oid"] not in self.blobs:
                made["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(made)
        send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes, send: Any) -> None:
        if self.failing_commits:
            self.failing_commits -= 1
            return send(400, {"error": "the connection broke"})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.blobs[value["oid"]]
        self.commits[repo] += 1
        oid = self.sha(repo)
        return send(200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid})


def _described(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.endswith(".safetensors"):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return entry
