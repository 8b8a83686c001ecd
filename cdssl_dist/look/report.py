"""One self-contained page about a run: its configuration and data, how it went, and fine-tunings of its encoder.

    cdssl report runs/mp --finetune runs/finetune --map runs/map
    cdssl report runs/finetune

A run writes its page when it ends, and uploads it to MLflow; the command writes it again, if asked with more in it.
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
    """A folder that cannot be reported on, or options that exclude one another; the message is one line."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read the files of a run and write its page."""
    p = Parser("cdssl report", "Write a self-contained HTML page about a run.")
    p.add_argument("run", help="folder of a pretraining run, or of a fine-tuning")
    p.add_argument("--finetune", action="append", default=[], metavar="FOLDER", help="also show this fine-tuning")
    p.add_argument("--map", metavar="FOLDER", help="also show the map that cdssl map wrote there")
    p.add_argument("--upload", action="store_true", help="replace the page that the pretraining run has in MLflow")
    p.add_argument("--out", help="the page; if omitted, report.html in the folder of the run")
    args = p.parse_args(argv)

    if args.finetune and (Path(args.run) / "results.json").exists():
        raise ReportError("--finetune adds to the page of a pretraining run, but this folder holds a fine-tuning")
    run, drawn = Path(args.run), read_map(Path(args.map)) if args.map else None
    if args.upload and args.out:
        raise ReportError("--upload uploads the page in the folder of the run: leave out --out")
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
        raise ReportError(f"{run}: metrics.jsonl is missing or empty; is this the folder of a run?")
    lines = (run / "events.jsonl").read_text(errors="replace") if (run / "events.jsonl").exists() else ""
    events = [e for e in lines_of(redact(lines)) if e.get("event") != "checkpoint"]  # pages are shared
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


def write_safely(
    folder: Path,
    page: Callable[[CrystalMap | None], str],
    draw: Callable[[], CrystalMap | None] = lambda: None,
) -> None:
    """Write the page of work that has just ended. A failure is printed, never raised: the work itself is done.

    Args:
        folder: folder of the work.
        page: makes the page, with or without a map.
        draw: makes the map; if that fails, the page has none.
    """
    drawn = None
    try:
        drawn = draw()
    except Exception as why:  # a failed drawing must not fail the work
        say(f"{folder / PAGE}: has no map ({type(why).__name__}: {one_line(why)})")
    try:
        (folder / PAGE).write_text(page(drawn))
    except Exception as why:
        say(f"{folder / PAGE}: not written ({type(why).__name__}: {one_line(why)}); cdssl report {folder} tries again")


def _upload(run: Path) -> bool:
    run_id = _json(run / "mlflow-run.json").get("run_id")
    if not run_id:
        raise ReportError(f"{run}: not a run that was tracked in MLflow (there is no mlflow-run.json)")
    config = run / "config.yaml"
    uri = (yaml.safe_load(config.read_text()) or {}).get("tracking", {}).get("uri") if config.exists() else None
    return attach(tracking_uri(uri, run.resolve().parent), run_id, [run / PAGE])


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it does not exist yet."""
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
