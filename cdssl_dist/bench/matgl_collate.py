"""matgl's collate of crystals, in an environment of its own: ``python matgl_collate.py FILE COUNT REPEATS``.

Reads the crystals that ``cdssl bench loader`` wrote, makes matgl's graphs of them, and times nothing but
``collate_fn_graph`` on batches of them: reading and building are not counted, in its favour.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from matgl.config import DEFAULT_ELEMENTS
from matgl.ext.pymatgen import Structure2Graph
from matgl.graph.data import collate_fn_graph
from pymatgen.core import Structure

torch.set_num_threads(1)

path, count, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
crystals = dict(np.load(path))
ends = np.cumsum(crystals["n_atoms"])
converter = Structure2Graph(element_types=DEFAULT_ELEMENTS, cutoff=5.0)
items, edges = [], 0
for lattice, begin, end in zip(crystals["lattice"], ends - crystals["n_atoms"], ends, strict=True):
    numbers, positions = crystals["atomic_numbers"][begin:end], crystals["positions"][begin:end]
    structure = Structure(lattice.astype(float), numbers.tolist(), positions, coords_are_cartesian=True)
    graph, cell, state = converter.get_graph(structure)
    items.append((graph, cell, torch.as_tensor(state, dtype=torch.float32), {"y": torch.tensor(0.0)}))
    edges += graph.num_edges
seconds = []
for _ in range(repeats + 1):
    begin = time.process_time()
    for i in range(0, len(items), count):
        collate_fn_graph(items[i : i + count])
    seconds.append(time.process_time() - begin)
print(json.dumps([edges, seconds[1:]]))
