"""matgl's MEGNet, trained in an environment of its own: ``.bench-venv/bin/python matgl_step.py FILE SIZE THREADS``.

Reads the crystals that ``cdssl bench step`` wrote and makes matgl's graphs of them, which is not timed. For each line
on standard input it makes one step (collate, positions from the lattice as in matgl's own training loop, forward,
backward, AdamW) and prints the CPU seconds per directed edge.
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
from matgl.models import MEGNet
from pymatgen.core import Structure

path, size, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
crystals = dict(np.load(path))
ends = np.cumsum(crystals["n_atoms"])
converter = Structure2Graph(element_types=DEFAULT_ELEMENTS, cutoff=5.0)
items = []
for lattice, begin, end in zip(crystals["lattice"], ends - crystals["n_atoms"], ends, strict=True):
    numbers, positions = crystals["atomic_numbers"][begin:end], crystals["positions"][begin:end]
    structure = Structure(lattice.astype(float), numbers.tolist(), positions, coords_are_cartesian=True)
    graph, cell, state = converter.get_graph(structure)
    items.append((graph, cell, torch.as_tensor(state, dtype=torch.float32), {"y": torch.tensor(0.0)}))
bounds = np.cumsum([0, *crystals["packs"]])
packs = [items[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

width, hidden = size["width"], size["hidden"]
model = MEGNet(
    dim_edge_embedding=100,
    nblocks=size["blocks"],
    hidden_layer_sizes_input=(hidden, width),
    hidden_layer_sizes_conv=(hidden, hidden, width),
    cutoff=5.0,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for i, _ in enumerate(sys.stdin):
    pack = packs[i % len(packs)]
    begin = time.process_time()
    graph, lattice, state, label = collate_fn_graph(pack)
    graph.pos = (graph.frac_coords.unsqueeze(-1) * lattice[graph.batch]).sum(dim=1)
    of_edge = lattice[graph.batch[graph.edge_index[0]]]
    graph.pbc_offshift = (graph.pbc_offset.unsqueeze(-1) * of_edge).sum(dim=1)
    optimizer.zero_grad()
    torch.autograd.backward(torch.nn.functional.mse_loss(model(graph, state_attr=state), label))
    optimizer.step()
    print((time.process_time() - begin) / graph.num_edges, flush=True)
