"""Images from a web server, and everything else that a server may send."""

import functools
import http.server
import io
import threading
import time
from base64 import b64encode

import pytest
import torch
from PIL import Image

from brs_detr.data import web
from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError
from brs_detr.data.sources import expand
from brs_detr.data.video import read_source, read_sources


def png(size=(40, 30)):
    content = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(content, "PNG")
    return content.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_):
        pass

    def do_GET(self):
        content, kind, code, extra = png(), "image/png", 200, {}
        if self.path == "/page.jpg":
            content, kind = b"<!DOCTYPE html><html>not found</html>", "text/html; charset=utf-8"
        elif self.path == "/hidden-page.jpg":
            content = b"<!DOCTYPE html><html>not found</html>"
        elif self.path == "/missing.jpg":
            code = 404
        elif self.path == "/short.png":
            extra = {"Content-Length": str(len(content) + 5)}
        elif self.path == "/cut.png":
            content = content[:-20]
        elif self.path == "/large.png":
            extra = {"Content-Length": str(2**40)}
        elif self.path == "/endless.png":
            content = b"\0" * 4096
        elif self.path == "/hangs.png":
            time.sleep(3)
        elif self.path == "/there.png":
            code, extra = 302, {"Location": "/image.png"}
        elif self.path == "/away.png":
            code, extra = 302, {"Location": "ftp://ann:secret@127.0.0.1/x"}
        elif self.path == "/private.png":
            code = 200 if self.headers["Authorization"] == "Basic " + b64encode(b"ann:a:b@c").decode() else 401
        elif self.path.startswith("/to/"):
            code, extra = 302, {"Location": self.path.removeprefix("/to/")}
        elif self.path == "/live":
            kind, content = "multipart/x-mixed-replace; boundary=x", b""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
            while self.path in ("/endless.png", "/slow.png"):
                self.wfile.write(content[:1] if self.path == "/slow.png" else content)
                time.sleep(0.05 if self.path == "/slow.png" else 0)
        except OSError:
            pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def read(url, **limits):
    [source], _ = expand([url])
    (frame,) = read_source(source, Limits(**limits))
    return frame


@pytest.mark.parametrize("path", ["/image.png", "/there.png", "/Bild ä.png?größe=1"])
def test_an_image_is_fetched_and_decoded(server, path):
    frame = read(server + path)
    assert frame.index is None and torch.equal(frame.pixels[:, 0, 0], torch.tensor([200, 30, 30], dtype=torch.uint8))


def test_user_and_password_are_sent_to_the_server_that_they_are_for(server):
    """As curl does: also after a redirect on the server, and not after one to another."""
    own = server.replace("://", "://ann:a%3ab%40c@")
    other = server.replace("127.0.0.1", "localhost")
    for path in ("/private.png", "/to//private.png", f"/to/{server}/private.png"):
        assert read(own + path).pixels.shape == (3, 30, 40)
    assert read(f"{other}/to/{own}/private.png").pixels.shape == (3, 30, 40)
    for url in (f"{own}/to/{other}/private.png", f"{server}/private.png"):
        with pytest.raises(ImageError) as error:
            read(url)
        assert "a%3ab" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/page.jpg", "the server sends a web page, not an image. Give the address of the image itself."),
        ("/hidden-page.jpg", "this image cannot be read: it begins with '<!DOCTYPE html><html>not', which is not an"),
        ("/missing.jpg", "cannot be fetched: the server answers 404 Not Found."),
        ("/short.png", "the connection ended after"),
        ("/cut.png", "this image cannot be read: the file is truncated."),
        ("/large.png", "1,099,511,627,776 bytes, more than data.max_image_bytes=99999; raise the setting"),
        ("/endless.png", "bytes, more than data.max_image_bytes=99999; raise the setting"),
        ("/hangs.png", "cannot be fetched: the server has sent nothing for 0.5 s."),
        ("/slow.png", "cannot be fetched: after 1 s only"),
        ("/away.png", "it leads to ftp://127.0.0.1/x, which is not on a web server."),
    ],
)
def test_anything_else_is_one_sentence_that_names_the_url(server, monkeypatch, path, said):
    monkeypatch.setattr(web, "TIMEOUT", 0.5)
    monkeypatch.setattr(web, "MAX_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(ImageError) as error:
        read(server + path, max_image_bytes=99999)
    assert str(error.value).startswith(f"{server}{path}: ") and said in str(error.value)
    assert "\n" not in str(error.value) and time.monotonic() - start < 3


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "http://h:port/a.png", "http://host.invalid/a.png"])
def test_servers_that_do_not_exist(url):
    [source], _ = expand([url])
    with pytest.raises(ImageError, match="cannot be fetched"):
        list(read_source(source, Limits()))


def test_the_limit_of_pixels_holds_for_urls(server):
    with pytest.raises(ImageError, match=r"1,200 pixels, more than data\.max_image_pixels=1199"):
        read(f"{server}/image.png", max_image_pixels=1199)


def test_what_cannot_be_read_does_not_end_the_others(server):
    found = list(read_sources(expand([f"{server}/page.jpg", f"{server}/image.png"])[0], Limits()))
    assert isinstance(found[0], ImageError) and found[1].pixels.shape == (3, 30, 40)


def test_a_server_that_sends_a_video_is_asked_for_its_frames(server):
    pytest.importorskip("av", reason="PyAV is not installed")
    with pytest.raises(ImageError, match="live: this video cannot be read"):
        read(f"{server}/live")


def test_a_server_that_sends_a_video_is_refused_where_ids_are_of_images(server):
    found = list(read_sources(expand([f"{server}/live", f"{server}/image.png"])[0], Limits(), images_only=True))
    assert str(found[0]) == f"{server}/live: the server sends a video, whose frames have no ids in --annotations."
    assert found[1].pixels.shape == (3, 30, 40)


def test_a_video_is_read_from_a_server_frame_by_frame(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (50 * number, 0, 0)))))
        container.mux(stream.encode(None))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        [source], _ = expand([f"http://127.0.0.1:{running.server_port}/clip.mkv"])
        frames = list(read_source(source, Limits()))
        running.shutdown()
    assert [frame.index for frame in frames] == list(range(5)) and frames[0].pixels.shape == (3, 48, 64)
    assert frames[4].pixels[0].float().mean() == pytest.approx(200, abs=12)
