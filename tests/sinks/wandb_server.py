"""A W&B server of one page: enough for a run to begin, send its rows and raise an alert.

It answers what the W&B client of this release asks, so that the client itself is the real one.
"""

from __future__ import annotations

import base64
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that leaves in the middle is no failure of a test."""


class WandbServer:
    """``asked`` lists (operation, variables) in order; a wrong key is refused with 401."""

    KEY = "k" * 40

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                try:
                    request = json.loads(body)
                except ValueError:
                    request = {}
                answer, code = server.answer(request, self.headers.get("authorization") or "")
                data = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST

            def log_message(self, *args):
                pass

        self._http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, request: dict[str, Any], authorization: str) -> tuple[dict[str, Any], int]:
        key = base64.b64decode(authorization.removeprefix("Basic ") or b"").decode()
        if not key.endswith(self.KEY):
            return {"errors": [{"message": "permission denied"}]}, 401
        operation, asked = request.get("operationName"), request.get("variables") or {}
        if operation is None:
            return {"exitcode": None, "limits": {}}, 200
        self.asked.append((operation, asked))
        project = {"id": "p", "name": "x", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b",
            "name": asked.get("name"),
            "displayName": asked.get("displayName"),
            "description": None,
            "config": None,
            "sweepName": None,
            "historyLineCount": 0,
            "project": project,
        }
        answers = {
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "RunResumeStatus": {"model": None},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
            "NotifyScriptableRunAlert": {"notifyScriptableRunAlert": {"success": True}},
        }
        return {"data": answers.get(operation, {})}, 200

    def variables(self, operation: str) -> list[dict[str, Any]]:
        return [asked for name, asked in self.asked if name == operation]

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
