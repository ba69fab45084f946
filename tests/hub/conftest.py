"""A server on this machine, and a cache of the test's own."""

import http.server
import threading
import urllib.request

import pytest


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges, and misbehaves as `server` says."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.status != 200:
            self.send_error(server.status)
            return
        content, tag = server.content, server.tag
        start, status = 0, 200
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") == tag:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(status)
        if tag:
            self.send_header("ETag", tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = len(content)
        if server.breaks:
            stop = min(stop, start + server.breaks.pop(0))
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The server; its attributes say what it does."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    httpd.content, httpd.tag, httpd.ranges, httpd.status = b"", '"v1"', True, 200
    httpd.breaks, httpd.requests = [], []  # breaks: bytes after which each answer ends early
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}/x.pth"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder; and no proxy, which would be asked in place of the test's server."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setenv("BRS_DETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
