"""Serves an exported model over HTTP: a .npy of pictures in, JSON out. It needs jax and numpy.

    python serve.py model.jax_export --port 8000
    curl --data-binary @pictures.npy http://127.0.0.1:8000

For a first try, not for the open internet: one request at a time, and no limit on their size.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import jax
import numpy as np
from jax import export


def handler(model: export.Exported) -> type[BaseHTTPRequestHandler]:
    call = jax.jit(model.call)  # compiled once for each number of pictures

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                found = call(np.load(BytesIO(body), allow_pickle=False))
                status, said = 200, json.dumps(np.asarray(found).tolist())
            except (ValueError, TypeError) as error:
                expected = model.in_avals[0].str_short()
                status, said = 400, f"expected a .npy of {expected}: {error}"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal is for errors."""

    return Answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an exported model.")
    parser.add_argument("program", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0 for any that is free")
    options = parser.parse_args()
    model = export.deserialize(bytearray(options.program.read_bytes()))
    server = HTTPServer(("127.0.0.1", options.port), handler(model))
    print(f"serving http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
