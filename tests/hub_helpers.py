"""A stand-in of the Hugging Face Hub on this machine: the routes that huggingface_hub uses to publish and to load."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN = "hf_writes"


@dataclass
class Repository:
    """Commits by their name, each with its files; the newest of each branch."""

    private: bool = False
    gated: str | bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name


class Hub(ThreadingHTTPServer):
    """The stand-in. Whoever has `TOKEN` may write; `refuse` has the status with which a route answers instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuse: dict[str, int] = {}  # part of a path -> status

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Put the files of a folder there, in a commit of their own."""
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(branch, files, "added")


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):
            return self._resolve(body=True)
        _, _, _, owner, name, *rest = urlsplit(self.path).path.split("/")
        self.server.asked.append(("GET", self.path))
        repository = self._repository(f"{owner}/{name}")
        if repository is None:
            return None
        commit = self._commit(repository, unquote(rest[1]) if rest else "main")
        if commit is None:
            return None
        files = [{"rfilename": file, "size": len(held)} for file, held in repository.commits[commit].items()]
        facts = {"id": f"{owner}/{name}", "sha": commit, "private": repository.private, "gated": repository.gated}
        return self._answer(200, facts | {"siblings": files})

    def do_PUT(self) -> None:
        content = self._content()
        if self.path.startswith("/blobs/"):
            self.server.blobs[self.path.rpartition("/")[2]] = content
            return self._answer(200, {})
        _, _, _, owner, name, _ = self.path.split("/")
        settings, repository = json.loads(content), self.server.repositories[f"{owner}/{name}"]
        if "gated" in settings:
            repository.gated = settings["gated"]
        if "visibility" in settings or "private" in settings:
            repository.private = settings.get("visibility") == "private" or settings.get("private") is True
        return self._answer(200, {})

    def do_POST(self) -> None:
        path, content = urlsplit(self.path).path, self._content()
        self.server.asked.append(("POST", path))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._answer(401, {"error": "no"}, said)
        for part, status in self.server.refuse.items():
            if part in path:
                return self._answer(status, {"error": "refused"}, {"X-Error-Message": "refused"})
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(content)["content"].split("---\n")[1])
            errors = [] if front.get("license") else [{"message": "license is missing"}]
            return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            places = [{"upload": {"href": f"{self.server.url}/blobs/{each['oid']}"}} for each in wanted]
            objects = [{**each, "actions": place} for each, place in zip(wanted, places, strict=True)]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        _, _, _, owner, name, what, revision = path.split("/")
        repository = self._repository(f"{owner}/{name}")
        if repository is None:
            return None
        if what == "branch":
            known = unquote(revision) in repository.branches
            repository.branches.setdefault(unquote(revision), repository.branches["main"])
            return self._answer(409 if known else 200, {})
        if what == "preupload":
            paths = [each["path"] for each in json.loads(content)["files"]]
            modes = ["lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in paths]
            found = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
            return self._answer(200, {"files": found})
        return self._take(repository, f"{owner}/{name}", unquote(revision), content)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repositories:
            return self._answer(409, {"error": "You already created it", "url": f"{self.server.url}/{name}"})
        repository = Repository(private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.server.repositories[name] = repository
        return self._answer(200, {"url": f"{self.server.url}/{name}"})

    def _take(self, repository: Repository, name: str, branch: str, content: bytes) -> None:
        files = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
                    return self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                del files[value["path"]]
        commit = repository.commit(branch, files, message)
        return self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _resolve(self, body: bool) -> None:
        _, owner, name, _, revision, file = urlsplit(self.path).path.split("/", 5)
        self.server.asked.append(("GET" if body else "HEAD", f"{owner}/{name}@{unquote(revision)} {file}"))
        repository = self._repository(f"{owner}/{name}")
        if repository is None:
            return None
        if repository.gated and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer(403, {}, {"X-Error-Code": "GatedRepo"})
        commit = self._commit(repository, unquote(revision))
        if commit is None:
            return None
        content = repository.commits[commit].get(unquote(file))
        if content is None:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._send(200, content if body else b"", headers | {"Content-Length": str(len(content))})

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.headers.get("authorization") != f"Bearer {TOKEN}"):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _commit(self, repository: Repository, revision: str) -> str | None:
        found = repository.branches.get(revision, revision)
        if found in repository.commits:
            return found
        self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        text = b"" if self.command == "HEAD" else json.dumps(content).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        self._send(status, text, own | (headers or {}))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def running_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that huggingface_hub takes for the Hub, with an empty cache and a token that may write."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
    }.items():
        monkeypatch.setattr(constants, name, value)
    _http.close_session()  # it may have been made for other proxies
    try:
        yield hub
    finally:
        _http.close_session()
        hub.shutdown()
        hub.server_close()
        thread.join()
