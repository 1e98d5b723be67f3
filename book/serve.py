"""Show the built site on a local port as a host on the network would, with the book's own 404 page.

Called by `make serve`: python book/serve.py _build/html 8000
"""

import sys
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Site(SimpleHTTPRequestHandler):
    """Files of a folder, and its 404.html for all that is not there."""

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        page = Path(self.directory) / "404.html"
        if code != HTTPStatus.NOT_FOUND or not page.exists():
            super().send_error(code, message, explain)
            return
        body = page.read_bytes()
        self.send_response(code, message)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` for this machine alone; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Site, directory=str(folder)))


if __name__ == "__main__":
    with server(Path(sys.argv[1]), int(sys.argv[2])) as running:
        print(f"http://localhost:{running.server_port}", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()
