"""Whether weights can be had: from the cache without asking anybody, from a server only if it has them, and in time."""

import http.server
import socket
import threading
import time
import urllib.request

import pytest
from huggingface_hub import constants

from brs_detr.models.backbones import availability
from brs_detr.models.backbones.availability import has_file, where_weights_are

NAME = "resnet50.tv_in1k"


class Handler(http.server.BaseHTTPRequestHandler):
    """A server that has one file."""

    def do_HEAD(self):
        self.send_response(200 if self.path.endswith("/model.safetensors") else 404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture()
def server():
    """The address of a server on this machine."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.fixture()
def silent():
    """The address of a server that takes a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    monkeypatch.setattr(availability, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def hub(monkeypatch, address):
    """Put the hub at an address; returns the files that are asked for."""
    asked = []

    def url(repository, file):
        asked.append((repository, file))
        return f"{address}/{repository}/resolve/main/{file}"

    monkeypatch.setattr(availability, "hf_hub_url", url)
    return asked


def test_a_server_that_has_the_file_is_asked_for_that_of_timm(monkeypatch, server):
    asked = hub(monkeypatch, server)
    assert where_weights_are(NAME) == "network"
    assert asked == [("timm/resnet50.tv_in1k", "model.safetensors")]


@pytest.mark.parametrize("url", ["{}/other", "http://127.0.0.1:9/model.safetensors", "no address", "http://[", ""])
def test_whatever_else_happens_is_no_answer(server, url):
    assert not has_file(url.format(server))


def test_a_server_that_never_answers_takes_no_longer_than_patience(silent, monkeypatch):
    hub(monkeypatch, silent)
    began = time.monotonic()
    assert where_weights_are(NAME, patience=0.3) is None
    assert time.monotonic() - began < 2


def test_a_name_that_is_looked_up_for_ever_takes_no_longer_than_patience(monkeypatch):
    def look_up(*_, **__):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    assert not has_file("http://slow.example/model.safetensors", patience=0.3)
    assert time.monotonic() - began < 2.5


def test_cached_weights_need_no_network(monkeypatch):
    monkeypatch.setattr(availability, "has_file", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr(availability, "try_to_load_from_cache", lambda repository, file: "/cache/" + file)
    assert where_weights_are(NAME) == "cache"


def test_offline_is_taken_at_its_word(monkeypatch):
    monkeypatch.setattr(availability, "has_file", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert where_weights_are(NAME) is None


def test_a_network_without_published_weights_has_none():
    assert where_weights_are("no_such_network") is None


def test_weights_out_of_reach_are_an_error_at_once(monkeypatch):
    """timm's client would try for most of a minute."""
    monkeypatch.setattr(availability, "is_cached", lambda _: False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30) or [])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"weights of resnet50.* cannot be downloaded \(https?://.* cannot be"):
        availability.require_reachable("resnet50.a1_in1k")
    assert time.monotonic() - start < 5
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:1"})
    availability.require_reachable("resnet50.a1_in1k")  # only the proxy knows


def test_weights_in_the_cache_and_other_places_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    for name in ("hf-hub:me/net", "local-dir:/tmp/net", "no_such_network"):
        availability.require_reachable(name)
    monkeypatch.setattr(availability, "is_cached", lambda _: True)
    availability.require_reachable("resnet50.a1_in1k")


def test_a_server_that_listens_can_be_connected_to():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        assert not availability.connects(url, 2.0)
        server.listen()
        assert availability.connects(url, 2.0)
