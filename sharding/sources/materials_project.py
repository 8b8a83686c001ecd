"""The Materials Project, through its client mp-api: ``mp:`` for all of it, ``mp:Li-Fe-O`` for one chemical system.

The client reads the API key from the variable MP_API_KEY. Structures of the GNoME set, which have another licence, are
not requested. The list of ids is fetched first, then the structures in that order, so that no more than a few hundred
are held at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator
from typing import Any, Final

import orjson

from sharding.crystal import Crystal, Refusal
from sharding.sources import ReadOptions, Record, Source, SourceError
from sharding.sources.json_lines import parse
from sharding.sources.pieces import Fault, Piece, batched, parsed

AT_ONCE: Final = 250  # structures per request
UNITS: Final = {
    "band_gap": "eV",
    "density": "g/cm³",
    "energy_above_hull": "eV/atom",
    "energy_per_atom": "eV/atom",
    "formation_energy_per_atom": "eV/atom",
    "total_magnetization": "μB",
    "uncorrected_energy_per_atom": "eV/atom",
    "volume": "Å³",
}


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open the Materials Project.

    Raises:
        SourceError: if mp-api is not installed.
    """
    _client_class()
    return Source(
        name=spec,
        records=functools.partial(_records, spec, options),
        parse=functools.partial(_parse, spec, options),
        licence="CC-BY-4.0",
        cite="Jain et al. 2013, doi:10.1063/1.4812323",
        units={label: UNITS[column] for label, column in options.labels.items() if column in UNITS},
    )


def _client_class() -> Any:
    try:
        from mp_api.client import MPRester
    except ImportError:
        raise SourceError(
            "mp: needs the package mp-api: pip install mp-api; "
            "optimade:https://optimade.materialsproject.org needs neither it nor a key"
        ) from None
    return MPRester


def _records(spec: str, options: ReadOptions) -> Iterator[Record]:
    with contextlib.closing(_pieces(spec, options)) as pieces:
        yield from batched(pieces, spec, options)


def _parse(name: str, options: ReadOptions, record: Record) -> Iterator[Crystal | Refusal]:
    return parsed(parse, name, options, record.payload)


def _pieces(spec: str, options: ReadOptions) -> Generator[Piece | Fault]:
    system = spec.removeprefix("mp:")
    chosen = {"chemsys": system} if system else {"deprecated": False}
    fields = list(dict.fromkeys(["material_id", "structure", *(c.split(".")[0] for c in options.labels.values())]))
    try:
        with _client_class()(mute_progress_bars=True) as client:
            search = client.materials.summary.search
            found = search(**chosen, include_gnome=False, fields=["material_id"])
            ids = sorted(str(document.material_id) for document in found)
            for begin in range(0, len(ids), AT_ONCE):
                asked = ids[begin : begin + AT_ONCE]
                documents = {str(d.material_id): d for d in search(material_ids=asked, fields=fields)}
                for key in asked:
                    yield _piece(key, documents.get(key), fields)
    except SourceError:
        raise
    except Exception as why:  # errors of the client and of its dependencies
        raise SourceError(f"{spec}: the Materials Project gives no answer ({type(why).__name__}: {why})") from None


def _piece(key: str, document: Any, fields: list[str]) -> Piece | Fault:
    if document is None:
        return Fault(key, "unparsable", "is listed, and not found", key)
    record = {field: getattr(document, field, None) for field in fields} | {"material_id": key}
    return Piece(key, key, orjson.dumps(record, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY), "mp", named=True)


def _plain(value: Any) -> Any:
    """Convert what JSON cannot represent: structures, models, numbers of other libraries."""
    for name in ("as_dict", "model_dump"):
        if hasattr(value, name):
            return getattr(value, name)()
    return str(value)
