"""Every way in which a download fails has its own error: a local server answers as the hub would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CALL = (
    "import sys\nfrom ctxext.errors import CtxextError\nfrom ctxext.model.source import resolve\n"
    "try:\n    resolve('someone/model')\n"
    "except CtxextError as error:\n    print(type(error).__name__, error.message)\n"
)
CONFIG = json.dumps({"model_type": "llama"}).encode()


@contextmanager
def hub(answer: Callable[[str], int], size: int = 100) -> Iterator[str]:
    """A hub with one model of one weight file of `size` bytes; `answer` says the status of a path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path), b"{}"
            if status == 200 and "/tree/" in self.path:
                entry = {"type": "file", "oid": "a" * 40, "size": size, "path": "model.safetensors"}
                body = json.dumps([entry]).encode()
            elif status == 200 and "/api/" in self.path:
                siblings = [{"rfilename": "model.safetensors"}]
                body = json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings}).encode()
            elif status == 200:
                body = b"\0" * size
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", '"' + "a" * 40 + '"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def said(endpoint: str, home: Path, **environment: str) -> str:
    """What a fresh process reports: huggingface_hub reads its settings when it is imported."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, env=plain | settings | environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (500, "EnvironmentFault someone/model: the hub returns a server error (HTTP 500)"),
        (429, "EnvironmentFault someone/model: the hub received too many requests (HTTP 429)"),
        (403, "InputError someone/model: the hub denies access (HTTP 403)"),
    ],
)
def test_a_hub_that_answers_is_not_out_of_reach(status: int, expected: str, tmp_path: Path) -> None:
    with hub(lambda path: status) as endpoint:
        assert expected in said(endpoint, tmp_path)


def test_a_hub_out_of_reach_and_one_that_may_not_be_asked(tmp_path: Path) -> None:
    with hub(lambda path: 200) as endpoint:
        pass
    assert "the hub cannot be reached" in said(endpoint, tmp_path)
    assert "HF_HUB_OFFLINE forbids" in said(endpoint, tmp_path, HF_HUB_OFFLINE="1")


def test_a_full_disk_is_a_full_disk(tmp_path: Path) -> None:
    """The cache lies on a file system of 1 MB, and the weights are 4 MB."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with hub(lambda path: 200, size=4 << 20) as endpoint:
            assert "EnvironmentFault someone/model: the disk of the hub's cache is full" in said(endpoint, small)
    finally:
        subprocess.run(["umount", str(small)], check=True)
