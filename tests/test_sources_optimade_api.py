"""An OPTIMADE endpoint on loopback: pages, other servers, silence, errors, and too much of everything."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pymatgen.core import Structure
from test_sources_formats import optimade
from test_sources_support import assert_all_same, read, structures_of

from sharding.crystal import Crystal
from sharding.sources import ReadOptions, SourceError, open_source, optimade_api

pytestmark = pytest.mark.server


class Endpoint:
    """A small OPTIMADE server; ``answer`` may be replaced, request by request."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries
        self.asked: list[str] = []
        self.answer: Callable[[Any, str], bool] = lambda handler, path: False
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint.asked.append(self.path)
                try:
                    if not endpoint.answer(self, self.path):
                        endpoint.send(self, endpoint.respond(self.path))
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def respond(self, path: str) -> dict[str, Any]:
        url = urlsplit(path)
        if url.path == "/base/v1/info":
            return {"data": {"attributes": {"available_licenses": ["CC-BY-4.0"]}}}
        if url.path == "/base/v1/info/structures":
            return {"data": {"properties": {"_odbx_energy": {"unit": "eV"}, "_odbx_name": {}}}}
        query = parse_qs(url.query)
        assert url.path == "/base/v1/structures"
        assert "lattice_vectors" in query["response_fields"][0]
        start, size = int(query.get("page_offset", ["0"])[0]), int(query["page_limit"][0])
        more = f"{self.url}{url.path}?{url.query}&page_offset={start + size}"
        more = more.replace(f"&page_offset={start}&", "&")
        following = more if start + size < len(self.entries) else None
        return {"data": self.entries[start : start + size], "links": {"next": {"href": following}}, "meta": {}}

    @staticmethod
    def send(handler: Any, body: Any, code: int = 200, **headers: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(text)


@pytest.fixture(scope="module")
def structures(aflow: list[Crystal]) -> list[Structure]:
    return structures_of(aflow)


@pytest.fixture
def endpoint(structures: list[Structure], monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "*")
    patience = optimade_api.Patience(silence=0.3, page=0.6, pause=0.01, longest_pause=0.05, retries=3)
    monkeypatch.setattr(optimade_api, "PATIENCE", patience)
    endpoint = Endpoint(optimade(structures))
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def spec(endpoint: Endpoint, query: str = "?page_limit=3") -> str:
    return f"optimade:{endpoint.url}/base{query}"


def test_pages(endpoint: Endpoint, structures: list[Structure]) -> None:
    source = open_source(
        spec(endpoint, '?page_limit=3&filter=elements HAS "Si"'), ReadOptions(labels={"e": "_odbx_energy"})
    )
    assert source.licence == "CC-BY-4.0"
    assert source.units == {"e": "eV"}
    assert source.name == f'optimade:{endpoint.url}/base/v1?filter=elements HAS "Si"'
    crystals, refusals = read(spec(endpoint), labels={"e": "_odbx_energy"})
    assert not refusals
    assert_all_same(crystals, structures)
    assert crystals[4].labels == {"e": 1.0}
    pages = [path for path in endpoint.asked if "/structures?" in path]
    assert len(pages) == 4
    assert all("_odbx_energy" in path for path in pages)
    first = [record.position for record in source.records()]
    assert first == [record.position for record in source.records()]  # a rerun numbers its work alike


def test_versioned_address(endpoint: Endpoint) -> None:
    assert len(read(f"optimade:{endpoint.url}/base/v1/structures?page_limit=5", limit=7)[0]) == 7
    assert len([path for path in endpoint.asked if "/structures?" in path]) == 2  # no page more than needed


@pytest.mark.parametrize(
    "link", ["http://127.0.0.2:1/x", "https://127.0.0.1:1/x", "//evil.example/x", "file:///etc/passwd"]
)
def test_links_to_other_servers_are_refused(endpoint: Endpoint, link: str) -> None:
    def answer(handler: Any, path: str) -> bool:
        if "/structures?" in path:
            endpoint.send(handler, {"data": [], "links": {"next": link}})
        return "/structures?" in path

    endpoint.answer = answer
    with pytest.raises(SourceError, match="another server"):
        read(spec(endpoint))


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/x", "http://localhost/x"])
def test_redirections_to_other_servers_are_refused(endpoint: Endpoint, target: str) -> None:
    def answer(handler: Any, path: str) -> bool:
        endpoint.send(handler, b"", 302, Location=target)
        return True

    endpoint.answer = answer
    with pytest.raises(SourceError, match="redirects to"):
        open_source(spec(endpoint))


def test_a_redirection_on_the_same_server_is_followed(endpoint: Endpoint) -> None:
    def answer(handler: Any, path: str) -> bool:
        if path.startswith("/old"):
            endpoint.send(handler, b"", 302, Location=path.replace("/old", "/base"))
        return path.startswith("/old")

    endpoint.answer = answer
    assert len(read(f"optimade:{endpoint.url}/old?page_limit=20")[0]) == 10


def test_relative_links_and_loops(endpoint: Endpoint) -> None:
    def answer(handler: Any, path: str) -> bool:
        if "/structures?" in path:
            page = int(parse_qs(urlsplit(path).query).get("p", ["0"])[0])
            endpoint.send(
                handler, {"data": endpoint.entries[:1], "links": {"next": f"structures?p={(page + 1) % 3}&p_=1"}}
            )
        return "/structures?" in path

    endpoint.answer = answer
    with pytest.raises(SourceError, match="leads back"):
        read(spec(endpoint))


@pytest.mark.parametrize("fault", ["503", "429", "half", "not json", "hang up", "silence"])
def test_what_passes_is_tried_again(endpoint: Endpoint, structures: list[Structure], fault: str) -> None:
    def answer(handler: Any, path: str) -> bool:
        if endpoint.asked.count(path) > 2:
            return False
        if fault.isdecimal():
            endpoint.send(handler, {"errors": []}, int(fault), Retry_After="0")
        elif fault == "half":
            endpoint.send(handler, json.dumps(endpoint.respond(path)).encode()[:-10], Content_Length="100000")
        elif fault == "not json":
            endpoint.send(handler, b'{"data": [')
        elif fault == "silence":
            time.sleep(0.5)
        handler.close_connection = True
        return True

    endpoint.answer = answer
    assert_all_same(read(spec(endpoint, "?page_limit=9"))[0], structures)


def test_patience_ends(endpoint: Endpoint) -> None:
    source = open_source(spec(endpoint))
    endpoint.answer = lambda handler, path: time.sleep(1.0) or True
    started = time.monotonic()
    with pytest.raises(SourceError, match="no response after 4 attempts"):
        list(source.records())
    assert time.monotonic() - started < 5


def test_drop_by_drop(endpoint: Endpoint) -> None:
    """A server that sends a byte now and then is never silent; a page may take so long in all."""

    def answer(handler: Any, path: str) -> bool:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
        return True

    source = open_source(spec(endpoint))
    endpoint.answer = answer
    started = time.monotonic()
    with pytest.raises(SourceError, match="no response"):
        list(source.records())
    assert time.monotonic() - started < 10


def test_errors_are_told(endpoint: Endpoint) -> None:
    def answer(handler: Any, path: str) -> bool:
        endpoint.send(handler, {"errors": [{"detail": "unknown filter"}]}, 400)
        return True

    source = open_source(spec(endpoint))
    endpoint.answer = answer
    with pytest.raises(SourceError, match="400 Bad Request: unknown filter"):
        list(source.records())
    with pytest.raises(SourceError, match="400"):
        open_source(spec(endpoint))


def test_too_large_a_page(endpoint: Endpoint) -> None:
    with pytest.raises(SourceError, match="larger than 2,000 bytes"):
        read(spec(endpoint), max_record_bytes=2000)


@pytest.mark.parametrize("body", [[1], {"data": {}}, {"data": None}, {}])
def test_responses_that_are_none(endpoint: Endpoint, body: Any) -> None:
    source = open_source(spec(endpoint))
    endpoint.answer = lambda handler, path: endpoint.send(handler, body) or True
    with pytest.raises(SourceError, match=r"is no JSON object|no list of structures"):
        list(source.records())


def test_bad_entries(endpoint: Endpoint) -> None:
    endpoint.entries[1:4] = [{"id": "a", "attributes": {}}, 7, {"id": "b"}]  # type: ignore[list-item]
    del endpoint.entries[5]["attributes"]["species_at_sites"]
    crystals, refusals = read(spec(endpoint))
    assert len(crystals) == 6
    assert [r.code for r in refusals] == ["unparsable"] * 4
    assert refusals[1].position == "page 0, entry 2"


def test_unknown_properties(endpoint: Endpoint) -> None:
    with pytest.raises(SourceError, match="no property _nope; it has _odbx_energy, _odbx_name"):
        open_source(spec(endpoint), ReadOptions(labels={"e": "_nope"}))


@pytest.mark.parametrize(
    "bad", ["optimade:", "optimade:example.org", "optimade:ftp://example.org", "optimade:file:///x"]
)
def test_addresses(bad: str) -> None:
    with pytest.raises(SourceError, match="give the address"):
        open_source(bad)
