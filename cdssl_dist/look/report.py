"""One self-contained page about a run: what was run, on which data, how it went, and what came of it downstream.

    cdssl report runs/mp --finetune runs/finetune --map runs/map
    cdssl report runs/finetune

A run makes its page when it ends, and leaves it with MLflow; the command makes it again, with more in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cdssl_dist.look.map import CrystalMap, read_map
from cdssl_dist.look.report_page import Tuned, run_page, tuning_page
from cdssl_dist.mlops.mlflow_server import one_line, redact, say, tracking_uri
from cdssl_dist.mlops.record import attach
from cdssl_dist.train.runlog import lines_of, read_lines
from sharding.commands import Parser, command

PAGE: Final = "report.html"


class ReportError(ValueError):
    """A folder that nothing can be reported of: said in one line."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read what a run left, write the page."""
    p = Parser("cdssl report", "Write a self-contained HTML page about a run.")
    p.add_argument("run", help="folder of a pretraining run, or of a fine-tuning")
    p.add_argument("--finetune", action="append", default=[], metavar="FOLDER", help="also show this fine-tuning")
    p.add_argument("--map", metavar="FOLDER", help="also show the map that cdssl map wrote there")
    p.add_argument("--upload", action="store_true", help="replace the page that the pretraining run has in MLflow")
    p.add_argument("--out", help="the page; if omitted, report.html in the folder of the run")
    args = p.parse_args(argv)

    if args.finetune and (Path(args.run) / "results.json").exists():
        raise ReportError("--finetune adds to the page of a pretraining, and this folder holds a fine-tuning")
    run, drawn = Path(args.run), read_map(Path(args.map)) if args.map else None
    if args.upload and args.out:
        raise ReportError("--upload takes the page in the folder of the run: leave out --out")
    if (run / "results.json").exists():
        text = of_tuning(run, drawn)
    else:
        text = of_run(run, [Path(folder) for folder in args.finetune], drawn)
    out = Path(args.out) if args.out else run / PAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(out)
    return 0 if not args.upload or _upload(run) else 1


def of_run(run: Path, finetune: Sequence[Path] = (), drawn: CrystalMap | None = None) -> str:
    """The page of a pretraining run.

    Raises:
        ReportError: where the folder is none, or something in it cannot be read.
    """
    metrics = read_lines(run / "metrics.jsonl")
    if not metrics:
        raise ReportError(f"{run}: no metrics.jsonl with a line in it; is it the folder of a run?")
    lines = (run / "events.jsonl").read_text(errors="replace") if (run / "events.jsonl").exists() else ""
    events = [e for e in lines_of(redact(lines)) if e.get("event") != "checkpoint"]  # a page is there to be passed on
    config = run / "config.yaml"
    text = redact(config.read_text()) if config.exists() else ""
    status, card = _json(run / "status.json"), _json(run / "encoder.json")
    return run_page(run.resolve().name, status, card, text, metrics, events, [_tuned(f) for f in finetune], drawn)


def of_tuning(folder: Path, drawn: CrystalMap | None = None) -> str:
    """The page of a fine-tuning.

    Raises:
        ReportError: where the folder is none, or something in it cannot be read.
    """
    return tuning_page(folder.resolve().name, _tuned(folder), drawn)


def leave(
    folder: Path,
    page: Callable[[CrystalMap | None], str],
    draw: Callable[[], CrystalMap | None] = lambda: None,
) -> None:
    """Write the page of work that has just ended, which no page may spoil: what fails is said.

    Args:
        folder: of the work.
        page: makes the page, with a map or without.
        draw: makes the map; where that fails, there is a page without one.
    """
    drawn = None
    try:
        drawn = draw()
    except Exception as why:  # the work is done, whatever a drawing makes of it
        say(f"{folder / PAGE}: has no map ({type(why).__name__}: {one_line(why)})")
    try:
        (folder / PAGE).write_text(page(drawn))
    except Exception as why:
        say(f"{folder / PAGE}: not written ({type(why).__name__}: {one_line(why)}); cdssl report {folder} tries again")


def _upload(run: Path) -> bool:
    run_id = _json(run / "mlflow-run.json").get("run_id")
    if not run_id:
        raise ReportError(f"{run}: no pretraining or study with a run in MLflow (there is no mlflow-run.json)")
    config = run / "config.yaml"
    uri = (yaml.safe_load(config.read_text()) or {}).get("tracking", {}).get("uri") if config.exists() else None
    return attach(tracking_uri(uri, run.resolve().parent), run_id, [run / PAGE])


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is not there yet."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as why:
        raise ReportError(f"{path}: cannot be read ({why})") from None
    return found if isinstance(found, dict) else {}


def _tuned(folder: Path) -> Tuned:
    """Results, predictions and history of a fine-tuning."""
    results = _json(folder / "results.json")
    if not results:
        raise ReportError(f"{folder}: no results.json; is it a folder that cdssl finetune made?")
    try:
        rows = pq.read_table(folder / "predictions.parquet").to_pydict()
    except (OSError, pa.ArrowException) as why:
        raise ReportError(f"{folder}/predictions.parquet: cannot be read ({why})") from None
    return results, rows, read_lines(folder / "history.jsonl")


if __name__ == "__main__":
    sys.exit(main())
