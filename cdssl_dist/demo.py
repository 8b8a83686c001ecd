"""``make demo``: the whole pipeline, run through the commands that a user would type.

shard crystals → pretrain on two workers → register the encoder → pull it → fine-tune → report
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cdssl_dist.config import packaged
from cdssl_dist.train.runlog import read_lines
from sharding.commands import Parser, UseError, command, natural, positive, run_child
from sharding.manifest import read_manifest
from sharding.sources import open_source
from sharding.sources.streams import local_path

HOME = Path("runs/demo")
REGISTRY = f"sqlite:///{HOME}/mlflow.db"
TARGET = "computed:density"


def steps(source: str, limit: int | None, seed: int) -> list[tuple[str, list[str]]]:
    """Return the steps of the demo, each a title and the arguments of ``cdssl``."""
    shard = ["shard", source, "--out", f"{HOME}/shards", "--val", "0.2", "--seed", str(seed)]
    shard += ["--block-edges", "8192", "--blocks-per-shard", "16"]
    shard += ["--limit", str(limit)] if limit else []
    pretrain = ["pretrain", "--config", str(packaged("pretrain/demo.yaml"))]
    pretrain += [f"model.seed={seed}", f"noise.seed={seed}"]
    finetune = ["finetune", "--encoder", "models:/cdssl-encoder@champion", "--registry", REGISTRY]
    # Crystals that pretraining has not seen, so that the comparison is fair.
    finetune += ["--data", f"{HOME}/shards", "--split", "val", "--target", TARGET, "--epochs", "40", "--train", "0.4"]
    finetune += ["--batch-size", "8", "--lr", "3e-3"]
    finetune += ["--seed", str(seed), "--out", f"{HOME}/finetune"]
    return [
        ("shard the crystals into graphs", shard),
        ("pretrain on two workers and register the encoder", pretrain),
        ("pull the encoder and fine-tune it on crystals it has not seen", finetune),
    ]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, then print a summary."""
    p = Parser("cdssl demo", f"The whole pipeline in a few minutes on two CPU cores; results are left in {HOME}/.")
    p.add_argument("--data", default="aflow:", help="your own database instead of the crystals that ship with pymatgen")
    p.add_argument("--limit", type=positive, help="crystals to read; if omitted, all of pymatgen's, or 3,000 of yours")
    p.add_argument("--seed", type=natural, default=0, help="seed of split, weights and noise")
    args = p.parse_args(argv)
    own = args.data != "aflow:"
    started = time.monotonic()
    open_source(args.data)
    data = local_path(args.data).resolve()
    if own and HOME.resolve() in (data, *data.parents):
        raise UseError(f"{args.data} lies in {HOME}, which the demo deletes at the start: move it elsewhere")
    if HOME.exists():
        shutil.rmtree(HOME)  # only demos write here
    for title, arguments in steps(args.data, args.limit or (3000 if own else None), args.seed):
        print(f"\n── {title}\n   cdssl {' '.join(arguments)}", flush=True)
        code = run_child([sys.executable, "-m", "cdssl_dist.cli", *arguments])
        if code:
            return code
    print(summary(args.data, time.monotonic() - started))
    return 0


def summary(source: str, seconds: float) -> str:
    """Summarize the results that the steps wrote."""
    manifest = read_manifest(HOME / "shards")
    last = [line for line in read_lines(HOME / "pretrain" / "metrics.jsonl") if "val/skill_edge" in line][-1]
    results = json.loads((HOME / "finetune" / "results.json").read_text())
    error = {arm: errors[TARGET] for arm, errors in results["errors"].items()}
    unit, sizes = results["task"]["targets"][0]["unit"], results["crystals"][0]
    gain = 1.0 - error["pretrained"] / error["from scratch"]
    train, val = manifest.splits["train"], manifest.splits["val"]
    return f"""
══ done in {seconds:.0f} s

data        {train["graphs"] + val["graphs"]:,} crystals from {source}; {val["graphs"]:,} of them, in whole groups
            (prototypes or formulas), were held out of pretraining
skill       validation skill {last["val/skill"]:.3f}, where 0 is returning the noisy edges unchanged;
            skill_edge {last["val/skill_edge"]:.3f}, where 0 is the best function of each distance alone
            (above 0: the network uses information from the neighbours)
fine-tuned  density (computed from the cell: a stand-in for your labels) of crystals held out of pretraining,
            {sizes["train"]} to train on; mean absolute error on {sizes["test"]} test crystals, {unit}:
              pretrained {error["pretrained"]:.3f}, from scratch {error["from scratch"]:.3f} ({-gain:+.0%})
              linear on frozen vectors {error["linear on frozen vectors"]:.3f}
              ridge on composition {error["ridge on composition"]:.3f}, median {error["median"]:.3f}
model       models:/cdssl-encoder@champion in {REGISTRY}
            {HOME}/pretrain/encoder.safetensors + encoder.json; parity plot {HOME}/finetune/parity.png
next        .venv/bin/cdssl finetune --registry {REGISTRY} --data YOUR_FILE --target YOUR_COLUMN
            .venv/bin/mlflow ui --backend-store-uri {REGISTRY}
"""


if __name__ == "__main__":
    sys.exit(main())
