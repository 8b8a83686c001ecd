"""``cdssl status RUN``: show what a run is doing, from any machine that can read its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from cdssl_dist.train import live
from sharding.commands import DONE, FAILED, Parser, UseError, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a page or a JSON object, or follow the run until it ends; return 1 if it failed."""
    parser = Parser("cdssl status", "Show what a pretraining run is doing; only reads its folder.")
    parser.add_argument("run", metavar="RUN", help="the run folder, or a URL of one (s3://…, gs://…, https://…)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per update")
    parser.add_argument("--follow", action="store_true", help="keep updating until the run ends")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between updates")
    args = parser.parse_args(argv)

    if not args.every > 0:
        raise UseError(f"--every {args.every:g}: must be above 0")
    seen = live.snapshot(args.run)
    if args.follow and not args.json and sys.stdout.isatty():
        from rich.live import Live

        with Live(live.table(seen), auto_refresh=False) as view:
            while not seen.over:
                time.sleep(args.every)
                seen = _again(args.run, seen)
                view.update(live.table(seen), refresh=True)
    elif args.follow:
        last = None
        while True:
            if (now := (seen.state, seen.step)) != last:
                print(seen.json() if args.json else live.line(seen), flush=True)
                last = now
            if seen.over:
                break
            time.sleep(args.every)
            seen = _again(args.run, seen)
    else:
        print(seen.json() if args.json else live.page(seen))
    return FAILED if seen.state in ("failed", "refused") else DONE


def _again(run: str, seen: live.Snapshot) -> live.Snapshot:
    """Take another snapshot, or keep the last one if the storage does not answer this time."""
    try:
        return live.snapshot(run)
    except live.RunFolderError:
        return seen


if __name__ == "__main__":
    sys.exit(main())
