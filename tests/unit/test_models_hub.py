"""Downloads from a hub (a real HTTP server with the hub's answers) into its cache, and what works from there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")

from tests.support.models import (  # isort: skip  (torchvision must be made importable first)
    clip_folder,
    lively,
    quietly_created,
    register,
    save,
    siglip_tokenizer_files,
    tiny_config,
    write_files,
)

COMMIT = "1234567890123456789012345678901234567890"
#: Loads a model in a process of its own, as a user's command does; prints its fingerprint and a few numbers as JSON.
PROGRAM = """
import json, sys
from clipfilter.errors import RefusedError
from clipfilter.models import download_model, load_encoder
try:
    path = download_model(sys.argv[1])
    encoder = load_encoder(sys.argv[1])
    vector = encoder.encode_texts(["a dog"])[0, :4].tolist()
    print(json.dumps({"path": str(path), "fingerprint": encoder.fingerprint, "vector": vector}))
except RefusedError as error:
    print(json.dumps({"refused": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of /ORG/NAME/resolve/REVISION/FILE, with the headers that huggingface_hub reads."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        repository = self.root.joinpath(*parts[:2])
        file = repository.joinpath(*parts[4:]) if len(parts) > 4 and parts[2] == "resolve" else repository / "no-such"
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repository.is_dir() else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for) of a hub with three repositories."""
    root = tmp_path_factory.mktemp("hub")
    asked: list[str] = []
    clip_folder(root / "org" / "hf-clip")
    repository = root / "org" / "open-clip"
    repository.mkdir(parents=True)
    config = {**tiny_config(), "text_cfg": {**tiny_config()["text_cfg"], "hf_tokenizer_name": "org/tokenizer"}}
    (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    architecture = register("clipfilter-test-hub", tiny_config(), root)
    save(dict(lively(quietly_created(architecture)).state_dict()), repository / "open_clip_model.safetensors")
    (root / "org" / "tokenizer").mkdir()
    write_files(siglip_tokenizer_files(), root / "org" / "tokenizer")
    handler = type("Handler", (Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()


def run(name: str, endpoint: str, home: Path) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.integration
@pytest.mark.parametrize("name", ["hf:org/hf-clip", "hf-hub:org/open-clip"])
def test_what_was_downloaded_once_loads_without_a_network(
    name: str, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    first = run(name, endpoint, tmp_path)
    assert "refused" not in first, first
    assert COMMIT in first["path"]
    assert not [path for path in asked if path.endswith((".py", ".h5", ".msgpack"))]
    asked.clear()
    # No server at all: the port is closed.
    again = run(name, "http://127.0.0.1:9", tmp_path)
    assert again == first
    assert asked == []


@pytest.mark.integration
def test_a_repository_that_is_not_there_is_refused(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    refused = run("hf:org/nothing", hub[0], tmp_path)["refused"]
    assert "no such repository" in refused
    wrong = run("hf:org/tokenizer", hub[0], tmp_path)["refused"]
    assert "has no config.json: use hf-hub:org/tokenizer" in wrong
