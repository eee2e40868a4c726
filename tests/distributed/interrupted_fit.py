"""``madad`` several times in one process; in the last, a signal comes in the denoiser's sixth step.

    python tests/distributed/interrupted_fit.py SIGKILL COMMANDS.json

What the others gave and printed is written beside the commands. Under torchrun the signal goes to torchrun,
as from a scheduler.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from madad import cli
from madad._runtime.distributed import join
from madad.training import graceful_stop
from madad.training.loop import TrainingLoop

step = TrainingLoop._step


def with_signal(number):
    def interrupted(loop):
        team = join()
        if loop.plan.stage == "denoiser" and loop.run.step == 5 and team.rank == team.size - 1:
            os.kill(os.getpid() if team.size == 1 else os.getppid(), number)
            with graceful_stop() as stop:  # that of the fit
                while stop.signal is None:
                    time.sleep(0.01)
        step(loop)

    return interrupted


def run(command):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(command)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    path = Path(sys.argv[2])
    *before, last = json.loads(path.read_text())
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")  # a group that is there already serves as well
    done = [run(command) for command in before]
    path.with_suffix(f".{join().rank}.json").write_text(json.dumps(done))
    TrainingLoop._step = with_signal(signal.Signals[sys.argv[1]])
    status = cli.main(last)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
