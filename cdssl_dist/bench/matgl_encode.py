"""matgl's MEGNet on CIFs, timed in an environment of its own: ``.bench-venv/bin/python matgl_encode.py CSV N REPEATS``.

The model has its default size, which is the paper's, random weights and our cutoff; each call takes one crystal, as
``predict_structure`` requires.
"""

from __future__ import annotations

import csv
import json
import sys
import time

import torch
from matgl.config import DEFAULT_ELEMENTS
from matgl.models import MEGNet
from pymatgen.core import Structure

torch.set_num_threads(1)

path, limit, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path) as file:
    texts = [row["cif"] for _, row in zip(range(limit), csv.DictReader(file), strict=False)]
model = MEGNet(element_types=DEFAULT_ELEMENTS, cutoff=5.0).eval()
rates = []
for _ in range(repeats + 1):
    begin = time.process_time()
    for text in texts:
        model.predict_structure(Structure.from_str(text, fmt="cif"))
    rates.append(len(texts) / (time.process_time() - begin))
print(json.dumps(rates[1:]))
