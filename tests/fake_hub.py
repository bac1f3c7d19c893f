"""A Hugging Face hub on this machine, as far as downloading a model needs one, and the ways in which it says no."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# (status, the hub's name for the error) by repository name.
REFUSALS = {
    "private": (401, "RepoNotFound"),  # what the hub answers to a stranger, also for what does not exist
    "gated": (403, "GatedRepo"),
    "refused": (400, None),
}


def commit_of(repo: str, revision: str) -> str:
    """The commit that a branch of a repository stands at."""
    return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()


@contextlib.contextmanager
def serve(repos: Mapping[str, Mapping[str, Path]]) -> Iterator[tuple[str, list[str]]]:
    """Serves folders.

    Args:
      repos: "organisation/name" -> branch -> folder. A repository that is named in `REFUSALS` is refused.

    Yields:
      The address, for HF_ENDPOINT, and the list of requests so far ("GET /path").
    """
    log: list[str] = []
    commits = {(repo, commit_of(repo, b)): folder for repo, branches in repos.items() for b, folder in branches.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str | None) -> None:
            self.answer(status, b'{"error": "no"}', **({"X_Error_Code": code} if code else {}))

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            log.append(f"{self.command} {path}")
            match = re.fullmatch(
                r"/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path
            ) or re.fullmatch(r"/cdn/([^/]+/[^/]+)/(cdn)/([^/]+)/(.+)", path)
            if match is None:
                return self.refuse(404, None)
            repo, kind, revision, name = match.groups()
            if (refusal := REFUSALS.get(repo.split("/")[1])) is not None:
                return self.refuse(*refusal)
            if repo not in repos:
                return self.refuse(404, "RepoNotFound")
            commit = commit_of(repo, revision) if revision in repos[repo] else revision
            folder = commits.get((repo, commit))
            if folder is None:
                return self.refuse(404, "RevisionNotFound")
            files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
            if kind == "revision":
                siblings = [{"rfilename": n} for n in files]
                return self.json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False})
            if kind == "tree":
                return self.json(
                    [
                        {
                            "type": "file",
                            "path": n,
                            "size": p.stat().st_size,
                            "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                        }
                        for n, p in files.items()
                    ]
                )
            if name not in files:
                return self.refuse(404, "EntryNotFound")
            content = files[name].read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if kind == "resolve" and name.endswith(".safetensors"):  # large files lie elsewhere
                return self.answer(
                    302,
                    Location=f"/cdn/{repo}/cdn/{commit}/{name}",
                    X_Repo_Commit=commit,
                    X_Linked_ETag=etag,
                    X_Linked_Size=str(len(content)),
                )
            headers = {"ETag": etag, "X_Repo_Commit": commit}
            if kind == "cdn" and repo.endswith("/cut") and self.command == "GET":  # the connection ends halfway
                self.close_connection = True
                return self.answer(200, content[: len(content) // 2], Content_Length=str(len(content)), **headers)
            return self.answer(200, content, **headers)

        do_HEAD = do_GET

        def json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
