"""One self-contained page about a run: what was run, on which data, how it went, and what came of it downstream.

cdssl report runs/mp --finetune runs/finetune --out report.html
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdssl_dist.commands import Parser, command
from cdssl_dist.report_page import page
from cdssl_dist.runlog import read_lines


class ReportError(ValueError):
    """A folder that nothing can be reported of: said in one line."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read what a run left, write the page."""
    p = Parser("cdssl report", "Write one page about a run, which needs no network.")
    p.add_argument("run", help="folder of a pretraining run")
    p.add_argument("--finetune", action="append", default=[], metavar="FOLDER", help="results of cdssl finetune, too")
    p.add_argument("--out", help="the page; report.html in the folder of the run where left out")
    args = p.parse_args(argv)

    run = Path(args.run)
    out = Path(args.out) if args.out else run / "report.html"
    metrics = read_lines(run / "metrics.jsonl")
    if not metrics:
        raise ReportError(f"{run}: no metrics.jsonl with a line in it; is it the folder of a run?")
    tuned = [_tuned(Path(folder)) for folder in args.finetune]
    events = [e for e in read_lines(run / "events.jsonl") if e.get("event") != "checkpoint"]
    config = run / "config.yaml"
    text = page(
        run.resolve().name,
        _json(run / "status.json"),
        _json(run / "encoder.json"),
        config.read_text() if config.exists() else "",
        metrics,
        events,
        tuned,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(out)
    return 0


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is not there yet."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as why:
        raise ReportError(f"{path}: cannot be read ({why})") from None
    return found if isinstance(found, dict) else {}


def _tuned(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Results and predictions of a fine-tuning."""
    results = _json(folder / "results.json")
    if not results:
        raise ReportError(f"{folder}: no results.json; is it a folder that cdssl finetune made?")
    try:
        return results, pq.read_table(folder / "predictions.parquet").to_pydict()
    except (OSError, pa.ArrowException) as why:
        raise ReportError(f"{folder}/predictions.parquet: cannot be read ({why})") from None


if __name__ == "__main__":
    sys.exit(main())
