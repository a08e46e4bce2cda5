"""A small Hugging Face hub on this machine: the calls that huggingface_hub makes to upload and to download a model.

Repositories live in a folder: REPO/BRANCH/FILE, and large files by their sha256. Nothing is offered for xet.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_this_test"
LARGE = (".safetensors", ".onnx")


class Hub(ThreadingHTTPServer):
    """The server, with what it was asked.

    Args:
        root: Where it keeps files.
        full: Repository whose commits the server refuses.
    """

    daemon_threads = True

    def __init__(self, root: Path, full: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.full = root, full
        self.calls: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815 - names that http.server calls

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for kind, pattern, allowed in CALLS:
            found = re.fullmatch(pattern, path)
            if found and self.command in allowed:
                self.server.calls.append(kind)
                needs_token = self.command in ("POST", "PUT") and kind not in ("store", "validate")
                if (needs_token or kind == "whoami") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._json({"error": "Invalid username or password."}, 401)
                if kind == "commit" and found[1] == self.server.full:
                    return self._json({"error": "the disk of the server is full"}, 507)
                return getattr(self, f"_{kind}")(body, *found.groups())
        self.server.calls.append(f"unknown {self.command} {path}")
        return self._json({"error": "unknown call"}, 404)

    def _send(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, values: Any, code: int = 200, **headers: str) -> None:
        self._send(json.dumps(values).encode(), code, Content_Type="application/json", **headers)

    def _missing(self, kind: str) -> None:
        self._json({"error": "not found"}, 404, X_Error_Code=kind, X_Error_Message="not found")

    def _branch(self, repo: str, branch: str = "main") -> Path:
        return self.server.root / repo / branch.replace("/", "_")

    def _whoami(self, _: bytes) -> None:
        self._json({"name": "ada", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        metadata = yaml.safe_load(text.split("---")[1])
        errors = [] if metadata.get("license") in ("mit", "apache-2.0", "other") else [{"message": "unknown license"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        if not repo.startswith("ada/"):
            return self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if self._branch(repo).exists():
            return self._json({"error": "exists", "url": f"{self.server.endpoint}/{repo}"}, 409)
        self._branch(repo).mkdir(parents=True)
        (self.server.root / repo / "private").write_text(str(asked.get("private") or asked.get("visibility")))
        return self._json({"url": f"{self.server.endpoint}/{repo}"})

    def _create_branch(self, _: bytes, repo: str, branch: str) -> None:
        exists = self._branch(repo, branch).exists()
        self._branch(repo, branch).mkdir(exist_ok=True)
        self._json({"error": "exists"} if exists else {}, 409 if exists else 200)

    def _preupload(self, body: bytes, repo: str, branch: str) -> None:
        if not self._branch(repo).exists():
            return self._missing("RepoNotFound")
        names = [one["path"] for one in json.loads(body)["files"]]
        modes = [{"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular"} for name in names]
        return self._json({"files": [{**one, "shouldIgnore": False} for one in modes]})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.server.endpoint}/store/{one['oid']}"}}
            actions["verify"] = {"href": f"{self.server.endpoint}/stored/{one['oid']}"}
            stored = (self.server.root / one["oid"]).exists()
            objects.append(one if stored else {**one, "actions": actions})
        self._json({"objects": objects, "transfer": "basic"})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        (self.server.root / oid).write_bytes(body)
        self._json({})

    def _stored(self, _: bytes, oid: str) -> None:
        self._json({}, 200 if (self.server.root / oid).exists() else 404)

    def _commit(self, body: bytes, repo: str, branch: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        pull = "create_pr=1" in self.path
        target = self._branch(repo, "pr/1" if pull else branch)
        for line in lines:
            value, key = line["value"], line["key"]
            path = target / value.get("path", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                path.write_bytes((self.server.root / value["oid"]).read_bytes())
            elif key == "deletedFile":
                path.unlink()
        commit = _commit_of(target)
        pull_url = f"{self.server.endpoint}/{repo}/discussions/1"
        values = {"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}"}
        self._json({**values, **({"pullRequestUrl": pull_url} if pull else {})})

    def _info(self, _: bytes, repo: str, branch: str | None = None) -> None:
        target = self._branch(repo, branch or "main")
        if not target.exists():
            return self._missing("RepoNotFound" if not self._branch(repo).exists() else "RevisionNotFound")
        files = [{"rfilename": path.relative_to(target).as_posix()} for path in target.rglob("*") if path.is_file()]
        return self._json({"id": repo, "modelId": repo, "sha": _commit_of(target), "siblings": files, "tags": []})

    def _tree(self, _: bytes, repo: str, branch: str) -> None:
        target = self._at(repo, branch)
        files = [path for path in sorted(target.rglob("*")) if path.is_file()]
        rows = [
            {"type": "file", "path": path.relative_to(target).as_posix(), "size": path.stat().st_size} for path in files
        ]
        self._json(
            [{**row, "oid": hashlib.sha1(path.read_bytes()).hexdigest()} for row, path in zip(rows, files, strict=True)]
        )

    def _at(self, repo: str, revision: str) -> Path:
        """The branch of a name or of a commit."""
        branches = [path for path in (self.server.root / repo).glob("*") if path.is_dir()]
        return next((one for one in branches if _commit_of(one) == revision), self._branch(repo, revision))

    def _resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        target = self._at(repo, revision)
        if not target.exists():
            return self._missing("RepoNotFound")
        if not (target / name).is_file():
            return self._missing("EntryNotFound")
        content = (target / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        linked = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(content))} if name.endswith(LARGE) else {}
        return self._send(content, ETag=f'"{etag}"', X_Repo_Commit=_commit_of(target), **linked)


def _commit_of(branch: Path) -> str:
    """A commit's name: a digest of the branch's files."""
    digest = hashlib.sha1(str(branch).encode())
    for path in sorted(one for one in branch.rglob("*") if one.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


REPO = r"([\w.-]+/[\w.-]+)"
CALLS = [
    ("whoami", "/api/whoami-v2", ("GET",)),
    ("validate", "/api/validate-yaml", ("POST",)),
    ("create", "/api/repos/create", ("POST",)),
    ("create_branch", f"/api/models/{REPO}/branch/(.+)", ("POST",)),
    ("preupload", f"/api/models/{REPO}/preupload/(.+)", ("POST",)),
    ("commit", f"/api/models/{REPO}/commit/(.+)", ("POST",)),
    ("tree", f"/api/models/{REPO}/tree/([^/]+)", ("GET",)),
    ("info", f"/api/models/{REPO}", ("GET",)),
    ("info", f"/api/models/{REPO}/revision/(.+)", ("GET",)),
    ("batch", rf"/{REPO}\.git/info/lfs/objects/batch", ("POST",)),
    ("store", "/store/([0-9a-f]{64})", ("PUT",)),
    ("stored", "/stored/([0-9a-f]{64})", ("POST",)),
    ("resolve", f"/{REPO}/resolve/([^/]+)/(.+)", ("GET", "HEAD")),
]


@contextlib.contextmanager
def serve(root: Path, full: str = "") -> Iterator[Hub]:
    """Run the server in a thread."""
    hub = Hub(root, full)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
