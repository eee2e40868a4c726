"""Whether ``madad predict`` is faster when other processes prepare the next scans (``--readers``).

    python -m benchmarks.readers MODEL SCANS [...] [--readers 0 1] [--repeat 3] [--device auto] [--json FILE]

MODEL is what ``madad fit`` wrote, SCANS what ``madad predict`` takes; six scans or more, so that starting
does not count too much. Each number of readers is a run of the whole command, in turns, and all must leave
the same bytes. Threads come from the environment: ``OMP_NUM_THREADS``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main():
    """Time the command with each number of readers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("scans", type=Path, nargs="+")
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 1], help="the first is the measure")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    seconds = {n: [] for n in options.readers}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeat):
            for n in options.readers:
                seconds[n].append(timed(options, n, Path(folder, f"{turn}-{n}")))
        results = [contents(out) for out in Path(folder).iterdir()]
    if any(result != results[0] for result in results):
        raise SystemExit("The results differ.")
    print(table(seconds, n_scans=sum(path.endswith("_statmap.nii.gz") for path in results[0])))
    if options.json is not None:
        facts = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "seconds": seconds,
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def timed(options, n_readers, out):
    """Seconds of one run of the command."""
    flags = ["--device", options.device, "--readers", str(n_readers), "--quiet"]
    start = time.perf_counter()
    command = [sys.executable, "-m", "madad", "predict", options.model, *options.scans, out, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def contents(folder):
    """The bytes of each file, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def table(seconds, n_scans):
    """Markdown: a row for each number of readers, beside the first of them."""
    lines = [
        f"| readers | s, median | s for each of {n_scans} scans | times the first |",
        "|---|---|---|---|",
    ]
    medians = {n: statistics.median(runs) for n, runs in seconds.items()}
    first = next(iter(medians.values()))
    for n, median in medians.items():
        lines.append(f"| {n} | {median:.1f} | {median / n_scans:.2f} | {median / first:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
