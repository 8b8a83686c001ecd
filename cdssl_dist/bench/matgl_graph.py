"""matgl's path from text to graphs, in an environment of its own: ``python matgl_graph.py FILE LIMIT REPEATS``.

Reads pymatgen JSON (a list of records with a ``structure``) or a CSV with a ``cif`` column, as ``cdssl bench graph``
wrote them, and builds a graph of each with ``Structure2Graph``; nothing is written, which is in its favour.
"""

from __future__ import annotations

import csv
import json
import sys
import time

import torch
from matgl.config import DEFAULT_ELEMENTS
from matgl.ext.pymatgen import Structure2Graph
from pymatgen.core import Structure

torch.set_num_threads(1)


def structures(path: str, limit: int) -> list[Structure]:
    """The structures of a file."""
    with open(path) as file:
        if path.endswith(".json"):
            return [Structure.from_dict(record["structure"]) for record in json.load(file)[:limit]]
        return [
            Structure.from_str(row["cif"], "cif") for _, row in zip(range(limit), csv.DictReader(file), strict=False)
        ]


path, limit, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
converter = Structure2Graph(element_types=DEFAULT_ELEMENTS, cutoff=5.0)
converter.get_graph(structures(path, 1)[0])  # warm-up: loads and compiles
rates = []
for _ in range(repeats):
    begin = time.process_time()
    found = structures(path, limit)
    for structure in found:
        converter.get_graph(structure)
    rates.append(len(found) / (time.process_time() - begin))
print(json.dumps(rates))
