"""A Hugging Face Hub on this machine: the addresses, headers and error codes that its library relies on.

Large files are kept under their SHA-256 behind a redirect, small ones under an ordinary ETag, as the real one has it.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

LARGE = (".safetensors", ".pth", ".bin", ".pt")


class LocalHub:
    """What the server serves and what was sent to it.

    Attributes:
        repositories: Repository -> file name -> content; one revision each, ``main``.
        requests: Lines such as ``GET /owner/name/resolve/main/model.safetensors``, in their order.
        private: Repositories that were created so.
        gated: Repositories whose owner has not let us in.
        blobs: SHA-256 -> content that was uploaded and not yet committed.
        corrupt: SHA-256 of files that are sent with a flipped bit.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.corrupt: set[str] = set()
        self.address = ""

    def add(self, repository: str, name: str, content: bytes) -> None:
        self.repositories.setdefault(repository, {})[name] = content

    def commit(self, repository: str) -> str:
        """The hash of a repository's state."""
        return hashlib.sha1(repr(sorted(self.repositories[repository].items())).encode()).hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process whose Hub this is, with caches of its own."""
        return {
            "HF_ENDPOINT": self.address, "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "torch"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.about(*match.groups())
        elif match := re.fullmatch(r"/large/(\w+)", path):
            contents = [content for files in self.hub.repositories.values() for content in files.values()]
            content = next(content for content in contents if hashlib.sha256(content).hexdigest() == match[1])
            if match[1] in self.hub.corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.reply(200, content)
        else:
            self.reply(404)

    def known(self, repository: str, revision: str | None) -> bool:
        """Whether a repository and revision are here; answers itself if not."""
        if repository not in self.hub.repositories:
            self.reply(
                401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
            )
            return False
        if repository in self.hub.gated:
            self.reply(403, headers={"X-Error-Code": "GatedRepo"})
            return False
        if revision not in (None, "main", self.hub.commit(repository)):
            self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def resolve(self, repository: str, revision: str, name: str) -> None:
        if not self.known(repository, revision):
            return
        files, headers = self.hub.repositories[repository], {"X-Repo-Commit": self.hub.commit(repository)}
        if name not in files:
            self.reply(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(LARGE):
            digest = hashlib.sha256(files[name]).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
            storage = self.hub.address.replace("127.0.0.1", "localhost")  # the library takes it for another host
            self.reply(302, headers=headers | {"Location": f"{storage}/large/{digest}"})
        else:
            self.reply(200, files[name], headers | {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'})

    def about(self, repository: str, revision: str | None) -> None:
        if self.known(repository, revision):
            siblings = [{"rfilename": name} for name in self.hub.repositories[repository]]
            about = {
                "id": repository,
                "modelId": repository,
                "private": repository in self.hub.private,
                "downloads": 0,
                "tags": [],
            }
            self.reply(200, about | {"sha": self.hub.commit(repository), "siblings": siblings})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self.chunks()
        if not (self.headers.get("Authorization") or "").startswith("Bearer hf_"):
            self.reply(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+?/.+?)/preupload/main", path):
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": modes})
        elif re.fullmatch(r"/(.+?/.+?)\.git/info/lfs/objects/batch", path):
            objects = [
                wanted | {"actions": {"upload": {"href": f"{self.hub.address}/upload/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})
        elif match := re.fullmatch(r"/api/models/(.+?/.+?)/commit/main", path):
            self.take_commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self.chunks()
        self.hub.blobs[self.path.rpartition("/")[2]] = body
        self.reply(200)

    def create(self, body: dict) -> None:
        repository = f"{body['organization']}/{body['name']}"
        status = 409 if repository in self.hub.repositories else 200
        if status == 200 and (body.get("private") or body.get("visibility") == "private"):
            self.hub.private.add(repository)
        self.hub.repositories.setdefault(repository, {})
        self.reply(status, {"url": f"{self.hub.address}/{repository}", "name": repository})

    def take_commit(self, repository: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.add(repository, value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                content = self.hub.blobs.pop(value["oid"])
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.hub.add(repository, value["path"], content)
        oid = self.hub.commit(repository)
        url = f"{self.hub.address}/{repository}/commit/{oid}"
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def chunks(self) -> bytes:
        """The body of a request that is sent in chunks."""
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def reply(self, status: int, content: bytes | dict = b"", headers: dict[str, str] | None = None) -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """Runs the server as long as the context; afterwards nobody listens at its address."""
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        server.shutdown()


def use(hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `LocalHub.environment` does for a new process, for this one: its library read the variables long ago."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(home / "torch"))
