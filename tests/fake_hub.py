"""A Hugging Face Hub of our own, on loopback: what snapshot_download asks for."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT, OLD = "a" * 40, "b" * 40


class Hub(ThreadingHTTPServer):
    """Repositories (name, commit) -> files; `asked`: the paths of all requests. None: it answers 500."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked, self.private, self.broken = {}, [], set(), False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def variables(self, home):
        """The environment of a process that asks this hub, and keeps what it gets in a folder."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home)}

    def add(self, name, folder, commit=COMMIT):
        self.repositories[name, commit] = {
            file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }


class Handler(BaseHTTPRequestHandler):
    """What snapshot_download asks for: the commit, the list of files, the head and the body of each."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.broken:
            return self.answer(500)
        parts = path.strip("/").split("/")
        if len(parts) < 4:  # whether there is anybody
            return self.answer(200)
        listing = parts[0] == "api"
        owner, repository = parts[2:4] if listing else parts[:2]
        name = f"{owner}/{repository}"
        if name in self.server.private and self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to it is restricted.")
        if not any(known == name for known, _ in self.server.repositories):
            return self.answer(404, X_Error_Code="RepoNotFound")
        revision = parts[5] if listing else parts[3]
        commit = {"main": COMMIT, "old": OLD}.get(revision, revision)
        files = self.server.repositories.get((name, commit))
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if listing and parts[4] == "tree":
            entries = [{"type": "file", "path": f, "size": len(b), "oid": etag(b)} for f, b in files.items()]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if listing:
            facts = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
        body = files.get("/".join(parts[4:]))
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, body, ETag=f'"{etag(body)}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


def etag(body):
    return hashlib.sha1(body).hexdigest()
