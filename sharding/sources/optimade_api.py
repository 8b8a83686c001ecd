"""Databases behind an OPTIMADE endpoint: ``optimade:https://host/path``, with ``?filter=…`` to choose structures.

Pages are read in the order in which the server links them. Links and redirections are followed to the same origin only,
so that no server can make this process query another. If the server does not answer within the limits of ``Patience``,
reading ends with an error; a rerun goes through the same pages in the same order.

https://specification.optimade.org
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, urlencode, urljoin, urlsplit

import orjson

from sharding.crystal import Crystal, Refusal
from sharding.sources import ReadOptions, Record, Source, SourceError
from sharding.sources.json_lines import parse
from sharding.sources.pieces import Fault, Piece, batched, parsed
from sharding.sources.streams import redacted

FIELDS: Final = ("lattice_vectors", "cartesian_site_positions", "species_at_sites", "species", "nperiodic_dimensions")
PAGE: Final = 100  # structures; servers differ in how many they allow
PASSING: Final = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes of errors that may pass


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, in seconds."""

    silence: float = 30.0  # without receiving a byte
    page: float = 300.0  # for a whole page
    pause: float = 1.0  # before the first retry; doubled before each further one
    longest_pause: float = 120.0
    retries: int = 6


PATIENCE = Patience()


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open an endpoint. Asks it for its licence, and for the units of the labels.

    Raises:
        SourceError: if no OPTIMADE endpoint answers, or it lacks a property.
    """
    url = urlsplit(spec.removeprefix("optimade:"))
    if url.scheme not in ("http", "https") or not url.hostname:
        raise SourceError(f"{spec}: give the address of an endpoint, as in optimade:https://example.org/optimade")
    base = url.path.rstrip("/").removesuffix("/structures")
    if not re.search(r"/v\d+(\.\d+)*$", base):
        base += "/v1"
    query = dict(parse_qsl(url.query))
    fields = dict.fromkeys((*FIELDS, *(column.split(".")[0] for column in options.labels.values())))
    asked = {"page_limit": str(PAGE), **query, "response_fields": ",".join(fields), "response_format": "json"}
    limit = options.max_record_bytes
    about = _get(url._replace(path=f"{base}/info", query="", fragment="").geturl(), limit)
    first = url._replace(path=f"{base}/structures", query=urlencode(asked), fragment="").geturl()
    name = f"optimade:{url.scheme}://{_host(url)}{base}" + (f"?filter={query['filter']}" if "filter" in query else "")
    return Source(
        name=name,
        records=functools.partial(_records, first, name, options),
        parse=functools.partial(_parse, name, options),
        licence=_licence(about),
        units=_units(url._replace(path=f"{base}/info/structures", query="").geturl(), options),
    )


def _records(first: str, name: str, options: ReadOptions) -> Iterator[Record]:
    with contextlib.closing(_pieces(first, options)) as pieces:
        yield from batched(pieces, name, options)


def _parse(name: str, options: ReadOptions, record: Record) -> Iterator[Crystal | Refusal]:
    return parsed(parse, name, options, record.payload)


def _pieces(url: str, options: ReadOptions) -> Generator[Piece | Fault]:
    stem = urlsplit(url).hostname or ""
    seen: set[int] = set()
    page = 0
    while url:
        seen.add(hash(url))
        response = _get(url, options.max_record_bytes)
        entries = response.get("data")
        if not isinstance(entries, list):
            raise SourceError(f"{redacted(url)}: the response has no list of structures")
        for i, entry in enumerate(entries):
            yield Piece(f"{stem}#{page}-{i}", f"page {page}, entry {i}", orjson.dumps(entry), stem)
        url = _next(response, url)
        page += 1
        if hash(url) in seen:
            raise SourceError(f"{redacted(url)}: the link to the next page leads back")


def _next(response: dict[str, Any], url: str) -> str:
    """The link to the next page, "" after the last one."""
    links = response.get("links")
    link = links.get("next") if isinstance(links, dict) else None
    link = link.get("href") if isinstance(link, dict) else link
    if not isinstance(link, str) or not link:
        return ""
    here, there = urlsplit(url), urlsplit(urljoin(url, link))
    if (here.scheme, there.scheme) == ("https", "http") and here.netloc == there.netloc:
        there = there._replace(scheme="https")  # a server behind a TLS proxy may write its own links with http
    if _origin(there) != _origin(here):
        raise SourceError(
            f"{url}: the next page is said to be at {there.geturl()[:200]}, on another server: not followed"
        )
    return there.geturl()


def _get(url: str, limit: int) -> dict[str, Any]:
    """A response in JSON.

    Raises:
        SourceError: if there is none after all retries, or it is larger than ``limit``.
    """
    pause = PATIENCE.pause
    for attempt in range(PATIENCE.retries + 1):
        if attempt:
            time.sleep(min(pause, PATIENCE.longest_pause))
            pause *= 2
        try:
            response = orjson.loads(_read(url, limit))
        except urllib.error.HTTPError as error:
            if error.code not in PASSING:
                raise SourceError(
                    f"{redacted(url)}: the server answers {error.code} {error.reason}: {_detail(error)}"
                ) from None
            wait = error.headers.get("Retry-After", "")
            pause = max(pause, float(wait) if wait.isdecimal() else 0.0)
            why: object = error
        except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:  # missing or broken responses
            why = error
        else:
            if not isinstance(response, dict):
                raise SourceError(f"{redacted(url)}: the response is no JSON object")
            return response
    raise SourceError(f"{redacted(url)}: no response after {PATIENCE.retries + 1} attempts ({why}); rerun to continue")


def _read(url: str, limit: int) -> bytes:
    request = urllib.request.Request(
        url, headers={"Accept": "application/vnd.api+json, application/json", "User-Agent": "cdssl-dist"}
    )
    until = time.monotonic() + PATIENCE.page
    parts: list[bytes] = []
    size = 0
    with urllib.request.build_opener(_SameOrigin).open(request, timeout=PATIENCE.silence) as response:
        while part := response.read1(2**16):
            size += len(part)
            if size > limit:
                raise SourceError(f"{redacted(url)}: the response is larger than {limit:,} bytes")
            if time.monotonic() > until:
                raise TimeoutError(f"not complete after {PATIENCE.page:g} s")
            parts.append(part)
    return b"".join(parts)


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Follow a redirection on the same server."""
        if _origin(urlsplit(newurl)) != _origin(urlsplit(req.full_url)):
            raise SourceError(f"{redacted(req.full_url)}: redirects to {redacted(newurl)[:200]}: not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _host(url: SplitResult) -> str:
    return url.netloc.rpartition("@")[2]


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server says about an error, as OPTIMADE wants it to."""
    try:
        return str(orjson.loads(error.read(2**16))["errors"][0]["detail"])[:200]
    except (OSError, ValueError, LookupError, TypeError):
        return "no details"


def _licence(about: dict[str, Any]) -> str:
    data = about.get("data")
    attributes = data.get("attributes", {}) if isinstance(data, dict) else {}
    listed = attributes.get("available_licenses")
    stated = ", ".join(map(str, listed)) if isinstance(listed, list) and listed else attributes.get("license")
    return str(stated.get("href") if isinstance(stated, dict) else stated or "unknown")


def _units(url: str, options: ReadOptions) -> dict[str, str]:
    """Label → unit, from the endpoint's description of its properties."""
    if not options.labels:
        return {}
    data = _get(url, options.max_record_bytes).get("data")
    properties = data.get("properties", {}) if isinstance(data, dict) else {}
    missing = [column for column in options.labels.values() if column.split(".")[0] not in properties]
    if missing:
        own = sorted(name for name in properties if name.startswith("_"))
        raise SourceError(f"{redacted(url)}: no property {', '.join(missing)}; it has {', '.join(own[:40])}")
    units = {label: properties[column.split(".")[0]].get("unit") for label, column in options.labels.items()}
    return {label: unit for label, unit in units.items() if isinstance(unit, str)}
