"""``MODEL_CARD.md``: a readable description of a registered model, made from its JSON card alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from sharding.crystal import SYMBOLS

NAME: Final = "MODEL_CARD.md"


def write_model_card(folder: Path) -> Path:
    """Write the card beside ``encoder.json`` or ``property.json``."""
    (path,) = [p for name in ("encoder", "property") if (p := folder / f"{name}.json").exists()]
    card = json.loads(path.read_text())
    text = (_encoder if path.stem == "encoder" else _property)(card)
    (folder / NAME).write_text(text)
    return folder / NAME


def _encoder(card: dict[str, Any]) -> str:
    sigma = " to ".join(f"{s:g}" for s in sorted(set(card["sigma"])))
    width = card["model"].get("width", 32)
    return f"""# A crystal encoder

MEGNet, pretrained by denoising (CDSSL, arXiv 2408.17255): atoms are displaced by Gaussian noise of σ = {sigma} Å, and
the network recovers the distances of the true crystal{_options(card)}. Input: a periodic crystal. Output: vectors of
{width} numbers for each atom, each edge and the crystal.

{_shape(card)}
## Quality, on crystals held out of training

{_table(card["metrics"])}
`skill_edge` compares with the best function of each distance alone: above 0, the network uses information from the
neighbours.

{_origin(card)}
## Use

    from cdssl_dist import CrystalEncoder
    encoder = CrystalEncoder.from_registry("models:/NAME@champion")
    vectors = encoder.embed(structures)

`encoder.safetensors` and `encoder.json` are data. The pyfunc beside them is **code, for registries you trust**.

## Limits

Ordered periodic crystals only, no molecules. Embeddings of elements that were not seen in pretraining are
meaningless{_elements(card)}. Distances beyond {card["cutoff"]:g} Å are
not seen. The vectors hold no information about charges, spins or temperature.
"""


OPTIONS: Final = {
    "strain": "the cell is strained as well",
    "sigma_in_state": "the state is given σ",
    "conditioned": "the state is given the encoding of the true crystal",
    "displacement": "displacements of atoms are recovered too",
    "masked": "the elements of some atoms are hidden, and recovered",
}


def _options(card: dict[str, Any]) -> str:
    on = card.get("extra", {}).get("pretext", {})
    said = "; ".join(text for name, text in OPTIONS.items() if name in on)
    return f". Beyond the paper: {said}" if said else ""


READ_OUT: Final = {
    "set2set": "Set2Set on nodes and edges with the state, and a multilayer perceptron",
    "linear": "a linear function of its mean vectors, solved with the encoder frozen",
    "atoms": "the mean over atoms of a multilayer perceptron of each atom, its edges and the state",
}


def _property(card: dict[str, Any]) -> str:
    task = card["task"]
    lines = [
        f"- `{t['name']}`{', ' + t['unit'] if t['unit'] else ''}{', learned per atom' if t['per_atom'] else ''}"
        f"{', learned as its logarithm' if t.get('log') else ''}"
        for t in task["targets"]
    ]
    classes = f"\nClasses: {', '.join(map(str, task['classes']))}.\n" if task["classes"] else ""
    return f"""# A fine-tuned crystal property model

{"Classifies by" if classes else "Predicts"}

{chr(10).join(lines)}
{classes}
An ensemble of {len(card["scalers"])} network(s): the encoder below, and {READ_OUT[card.get("readout", "set2set")]}.
{_uncertainty(card)}

Fine-tuned from **{card["encoder"]["ref"]}** (weights {card["encoder"]["weights_sha256"][:12]}, pretrained on data
{card["encoder"]["data_digest"][:12]}).

{_shape(card)}
## Errors on the test crystals

{_table(card["metrics"])}
{_origin(card)}
## Use

    cdssl predict --model models:/NAME@champion --data FILE --out predictions.parquet

## Limits

Only as good as its labels, and only for ordered periodic crystals like those it was tested on. Elements that were
never seen in training are marked in the output{_elements(card)}.
"""


def _uncertainty(card: dict[str, Any]) -> str:
    """How to use the deviation between members as an uncertainty."""
    if len(card["scalers"]) < 2:
        return "It gives no uncertainty."
    if not card.get("uncertainty"):
        return "The deviation between members is an uncertainty that was not calibrated."
    factors = ", ".join(f"{factor:.3g} for {_cell(name)}" for name, factor in card["uncertainty"].items())
    return f"""
`within68` is the deviation between members times a factor ({factors}) that covers 68% of
the errors of validation crystals; its coverage of the test crystals is given below as `covered`."""


def _shape(card: dict[str, Any]) -> str:
    sizes = ", ".join(f"{k} {v}" for k, v in card["model"].items())
    return f"""| | |
| --- | --- |
| format | {card["format"]} {card["version"]} |
| network | {sizes}; {card["centers"]} Gaussians on 0 to {card["end"]:g} Å |
| cutoff | {card["cutoff"]:g} Å |
| weights, SHA-256 | `{card["weights_sha256"]}` |
"""


def _table(metrics: dict[str, Any]) -> str:
    rows = "".join(f"| {_cell(name)} | {value:.5g} |\n" for name, value in sorted(metrics.items()))
    return "| metric | value |\n| --- | --- |\n" + rows if rows else "None were recorded.\n"


def _origin(card: dict[str, Any]) -> str:
    rows = "".join(
        f"| {_cell(s.get('name', '?'))} | {_cell(s.get('licence') or '?')} | {_cell(s.get('cite') or '')} |\n"
        for s in card["sources"]
    )
    digests = {k: card[k] for k in ("data_digest", "config_digest", "validation_digest", "code_version") if k in card}
    listed = "".join(f"- {name.replace('_', ' ')}: `{value}`\n" for name, value in digests.items())
    return f"## Data\n\n| source | licence | to cite |\n| --- | --- | --- |\n{rows}\n{listed}"


def _elements(card: dict[str, Any]) -> str:
    seen = card.get("elements") or []
    return f" (seen: {', '.join(SYMBOLS[z] for z in seen)})" if seen else " (which were seen was not recorded)"


def _cell(text: Any) -> str:
    """Text as a cell of a table: markup is escaped, line breaks are removed."""
    clean = " ".join(str(text).split()).replace("\\", "\\\\")
    for character in "|<>[]`*_":
        clean = clean.replace(character, f"\\{character}")
    return clean
