"""Run what is missing of a table of experiments/tables.toml, several runs at a time, and go on
after a kill.

    python experiments/run.py T4 --size 10m --tokens 5M --dry   # which runs, and which are there
    python experiments/run.py T4 --size 10m --tokens 5M         # a smaller table, on a laptop
    python experiments/run.py rates spread ladder --size 45m --side-by-side 2 --until 540
    python experiments/run.py scaling --side-by-side 3          # all sizes and budgets of the table

The corpus comes from experiments/corpus.py. What is not language comes from
experiments/sequences.py and lies in the corpus as its folders digits and speech, which need no text
beside them. Each run is a process of its own and ends as one JSON in --out, beside which the first
confirming run of each arm leaves the digits or the speech that it sampled (.npz). With --until
SECONDS every run is stopped at a checkpoint before so many seconds have passed since the start; the
same command goes on with it. --archive FILE packs all results for another machine, where --merge
FILE unpacks them. Runs side by side on one GPU are 13 % faster together when
`nvidia-cuda-mps-control -d` has been called before."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import arms
import torch
from arms import Run

from transnormer.provenance import commit
from transnormer.run_folder import CHECKPOINTS, METRICS, step_folders
from transnormer.train.metrics import read_metrics

HERE = Path(__file__).parent
# that a run may take from being asked to stop until its checkpoint is on the disk
SAVE_SECONDS = 25
START_SECONDS = 30  # that a run takes beside its training: imports, compiling, scores


class Queue:
    """Starts runs in processes of their own, at most `options.side_by_side` on each GPU at a
    time."""

    def __init__(self, options: argparse.Namespace, command: str):
        self._options, self._command = options, command
        self.gpus = list(range(torch.cuda.device_count())) or [-1]
        self._running: dict[subprocess.Popen[bytes], tuple[Run, int, float]] = {}
        self.failed: list[Run] = []

    def free(self) -> int | None:
        """The GPU with the fewest runs, None where all have as many as they may."""
        counts = {
            gpu: sum(gpu == used for _, used, _ in self._running.values()) for gpu in self.gpus
        }
        gpu = min(counts, key=lambda one: counts[one])
        return gpu if counts[gpu] < self._options.side_by_side else None

    def start(self, run: Run, gpu: int) -> None:
        options = self._options
        given = {
            "run": dataclasses.asdict(run),
            "corpus": str(options.corpus),
            "work": str(options.work),
            "out": str(options.out),
            "side_by_side": options.side_by_side,
            "commit": options.commit or commit(),
            "command": self._command,
        }
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        }
        if gpu >= 0:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        options.work.mkdir(parents=True, exist_ok=True)
        with (options.work / f"{run.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "one.py"), json.dumps(given)],
                env=environment,
                stdout=log,
                stderr=log,
            )
        self._running[process] = (run, gpu, time.monotonic())

    def collect(self) -> None:
        """Take the runs that have ended out of the queue, and say how each ended."""
        for process in [process for process in self._running if process.poll() is not None]:
            run, _, began = self._running.pop(process)
            seconds = time.monotonic() - began
            if process.returncode == 0:
                found = json.loads((self._options.out / f"{run.name}.json").read_text())
                figures = found.get("diverged") or (
                    f"validation loss {found['valid_loss']:.4f}, "
                    f"{found['tokens_per_second']:,.0f} tokens/s"
                )
                print(f"{run.name}: {figures}, {seconds:.0f} s", flush=True)
            elif process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
                print(
                    f"{run.name}: stopped after {seconds:.0f} s; the same command goes on with it",
                    flush=True,
                )
            else:
                self.failed.append(run)
                tail = (
                    (self._options.work / f"{run.name}.log")
                    .read_text(errors="replace")
                    .strip()
                    .splitlines()[-3:]
                )
                print(f"{run.name}: FAILED ({process.returncode}): {' | '.join(tail)}", flush=True)

    def stop(self) -> None:
        """Ask all to save themselves and end, and wait for it."""
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        for process in self._running:
            process.wait()
        self.collect()

    @property
    def busy(self) -> bool:
        return bool(self._running)


def seconds_of(run: Run, options: argparse.Namespace) -> float:
    """What a run of this size takes, or what is left of it, start and scores included, by the
    slowest earlier one, in proportion to the tokens; 0 if there is none."""
    paths = options.out.glob(f"{run.setting.rpartition('-')[0]}-*.json")
    took = [
        # "seconds" are those of a run's last call alone
        max(found["seconds"], found["tokens"] / found["tokens_per_second"])
        * (run.tokens / found["tokens"])
        + found.get("draw_seconds", 0.0)
        for found in (json.loads(path.read_text()) for path in paths)
        if (found["side_by_side"], found.get("dtype", "bfloat16"))
        == (options.side_by_side, run.dtype)
    ]
    return max(took) * (1 - share_read(run, options)) + START_SECONDS if took else 0.0


def share_read(run: Run, options: argparse.Namespace) -> float:
    """The share of its tokens that a run has read before its newest checkpoint, from which it goes
    on."""
    folder = options.work / run.name
    checkpoints = step_folders(folder / CHECKPOINTS)
    if not checkpoints or not (folder / METRICS).exists():
        return 0.0
    last = int(checkpoints[0].name.rpartition("-")[2])
    read = [row["tokens"] for row in read_metrics(folder / METRICS) if row["step"] <= last]
    return max(read, default=0) / run.tokens


def execute(
    queue: Queue, missing: list[Run], until: float | None, options: argparse.Namespace
) -> int:
    """Run all, beginning with those that an earlier call has started. Stop before `until` (by
    time.monotonic).

    Returns how many are left.
    """
    begun = {run for run in missing if (options.work / run.name).exists()}
    waiting, left = sorted(missing, key=lambda run: run not in begun), 0
    try:
        while waiting or queue.busy:
            queue.collect()
            if until is not None and time.monotonic() > until - SAVE_SECONDS:
                break
            while waiting and (gpu := queue.free()) is not None:
                run = waiting.pop(0)
                end = time.monotonic() + seconds_of(run, options)
                if options.last and until is not None and end > until - SAVE_SECONDS:
                    left += 1
                else:
                    queue.start(run, gpu)
            time.sleep(0.2)
    finally:
        queue.stop()
    return len(waiting) + left


def read_options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="*", help=f"of tables.toml: {', '.join(arms.TABLES['tables'])}"
    )
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, help="how many; by default the table's")
    parser.add_argument(
        "--size", help=f"{', '.join(arms.TABLES['sizes'])}; by default the table's, or 10m"
    )
    parser.add_argument("--tokens", type=arms.number, help="a run, e.g. 5M; by default the table's")
    parser.add_argument("--optimizers", nargs="+", help="adamw, muon; by default the table's")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument(
        "--corpus", type=Path, default=Path("build/corpus"), help="made by experiments/corpus.py"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/experiments"),
        help="the folder for runs and their logs",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for results")
    parser.add_argument(
        "--until", type=float, help="stop, everything saved, within so many seconds"
    )
    parser.add_argument(
        "--last",
        action="store_true",
        help="begin and go on with only those runs that will end before --until, because this "
        "machine's disk is lost then; "
        "a run is always begun where none like it has been timed yet",
    )
    parser.add_argument("--commit", help="of this code, where it has no git with it")
    parser.add_argument("--archive", type=Path, help="write all results into this file at the end")
    parser.add_argument(
        "--merge", type=Path, help="unpack such a file into --out, and do nothing else"
    )
    parser.add_argument("--dry", action="store_true", help="say what would run")
    options = parser.parse_args()
    if options.last and options.until is None:
        parser.error("--last needs --until, which says when nothing is kept any more")
    return options


def wanted_runs(options: argparse.Namespace) -> dict[str, Run]:
    """The runs of all tables that are asked for, by name."""
    wanted: dict[str, Run] = {}
    for table in options.tables:
        found = arms.runs(
            table,
            options.size,
            arms=options.arms,
            seeds=options.seeds,
            tokens=options.tokens,
            optimizers=options.optimizers,
        )
        wanted |= {run.name: run for run in found if run.name not in wanted}
    return wanted


def main() -> None:
    options, began = read_options(), time.monotonic()
    if options.merge:
        with tarfile.open(options.merge) as archive:
            archive.extractall(options.out, filter="data")
        return
    queue = Queue(options, shlex.join(["python", "experiments/run.py", *sys.argv[1:]]))
    wanted = wanted_runs(options)
    missing = [run for name, run in wanted.items() if not (options.out / f"{name}.json").exists()]
    print(
        f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done, {len(queue.gpus)} "
        "device(s)",
        flush=True,
    )
    if options.dry:
        print("\n".join(run.name for run in missing))
        return
    until = None if options.until is None else began + options.until
    left = execute(queue, missing, until, options)
    if options.archive:
        with tarfile.open(options.archive, "w:gz") as archive:
            for file in sorted([*options.out.glob("*.json"), *options.out.glob("*.npz")]):
                archive.add(file, file.name)
    print(f"{left} runs left that were not begun or not gone on with, {len(queue.failed)} failed")
    sys.exit(1 if queue.failed else 0)


if __name__ == "__main__":
    main()
