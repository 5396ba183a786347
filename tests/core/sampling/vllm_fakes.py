"""A server that answers as vLLM does, for tests without vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

INFO = {
    "model_config": {
        "model": "some/model",
        "max_model_len": 64,
        "dtype": "torch.float32",
        "logprobs_mode": "processed_logprobs",
    },
    "weight_transfer_config": {"backend": "denserl-file"},
    "device_config": {"device": "cpu"},
    "scheduler_config": {"enable_chunked_prefill": False},
}


class FakeVllm:
    """Answers by path; a function is called with the body, a pair is a status and an answer."""

    def __init__(self) -> None:
        self.version = "default"
        self.asked: list[tuple[str, Any]] = []
        self.address = ""
        self.answers: dict[str, Any] = {
            "/version": {"version": "0.32.0"},
            "/server_info": {"vllm_config": INFO},
            "/get_world_size": {"world_size": 1},
            "/inference/v1/generate": self.generate,
            "/finish_weight_update": self.finish,
            "/reset_prefix_cache": {"success": True},
        }

    def altered(self, **blocks: dict[str, Any] | None) -> None:
        """Change what the server says about itself."""
        info = json.loads(json.dumps(INFO))
        for name, block in blocks.items():
            info[name] = None if block is None else info[name] | block
        self.answers["/server_info"] = {"vllm_config": info}

    def finish(self, body: Any) -> Any:
        """Take over the version of the weights."""
        self.version = body.get("weight_version", self.version)
        return {}

    def generate(self, body: Any) -> Any:
        """Three tokens, the last of which stops."""
        if "token_ids" not in body:
            return 400, {"error": {"message": "token_ids: Field required"}}
        ids = [7, 8, (body["sampling_params"]["stop_token_ids"] or [9])[0]]
        return {
            "choices": [
                {
                    "finish_reason": "stop",
                    "token_ids": ids,
                    "weight_versions": [{"version": self.version, "start": 0, "end": 3}],
                    "logprobs": {"content": [{"token_id": i, "logprob": -0.5} for i in ids]},
                }
            ]
        }

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer of a request."""
        self.asked.append((path, body))
        found = self.answers.get(path, {})
        found = found(body) if callable(found) else found
        return found if isinstance(found, tuple) else (200, found)


@contextmanager
def fake_vllm() -> Iterator[FakeVllm]:
    """A server on a free port of this machine."""
    fake = FakeVllm()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"null")
            status, answer = fake.answer(self.path.partition("?")[0], body)
            if status == 0:  # dies
                self.close_connection = True
                return
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
