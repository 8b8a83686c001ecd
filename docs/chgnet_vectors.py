"""Vectors for probes from CHGNet, a network trained on energies, forces and magnetic moments.

    python -m pip install chgnet==0.4.2 -c constraints.txt     # in an environment of its own
    python docs/chgnet_vectors.py jarvis_dft3d_2021.parquet IDS.txt chgnet.parquet

IDS.txt holds one id per line, as `cdssl study --ids` writes it. The structures are those of an OPTIMADE table.
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from chgnet.model.model import CHGNet
from pymatgen.core import Structure

BATCH = 256  # structures converted to graphs at a time
COLUMNS = ["id", "lattice_vectors", "species_at_sites", "cartesian_site_positions"]


def main(source: str, ids: str, out: str) -> None:
    """Write a row, `key` and `embedding`, for each structure that CHGNet can take."""
    torch.set_num_threads(1)
    model = CHGNet.load(use_device="cpu", verbose=False)
    model.graph_converter.set_isolated_atom_response("ignore")  # accept crystals with an isolated atom too
    with open(ids, encoding="utf-8") as file:
        wanted = set(file.read().split())
    table = pq.read_table(source, columns=COLUMNS)
    rows = [row for row in table.to_pylist() if row["id"] in wanted]
    rows.sort(key=lambda row: len(row["species_at_sites"]))  # batches of similar size
    keys: list[str] = []
    vectors: list[list[float]] = []
    for begin in range(0, len(rows), BATCH):
        part, graphs = [], []
        for row in rows[begin : begin + BATCH]:
            structure = Structure(
                row["lattice_vectors"],
                row["species_at_sites"],
                row["cartesian_site_positions"],
                coords_are_cartesian=True,
            )
            if graph := model.graph_converter(structure):
                part.append(row["id"])
                graphs.append(graph)
        said = model.predict_graph(graphs, task="e", return_crystal_feas=True, batch_size=16) if graphs else []
        keys += part
        vectors += [one["crystal_fea"].tolist() for one in (said if isinstance(said, list) else [said])]
        print(f"{len(keys)} of {begin + len(rows[begin : begin + BATCH])}", flush=True)
    pq.write_table(pa.table({"key": keys, "embedding": pa.array(vectors, pa.list_(pa.float32()))}), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
