"""``madad``, but torchrun gets SIGTERM in the denoiser's sixth step, as from a scheduler."""

import os
import signal
import sys
import time

import torch.distributed as dist

from madad import cli
from madad._runtime.distributed import is_first_process
from madad.training import graceful_stop
from madad.training.loop import TrainingLoop

step = TrainingLoop._step


def interrupted(loop):
    if loop.plan.stage == "denoiser" and loop.run.step == 5 and not is_first_process():
        os.kill(os.getppid(), signal.SIGTERM)
        with graceful_stop() as stop:  # that of the fit
            while stop.signal is None:
                time.sleep(0.01)
    step(loop)


if __name__ == "__main__":
    TrainingLoop._step = interrupted
    dist.init_process_group("gloo")  # a group that is there already serves as well
    status = cli.main(sys.argv[1:])
    dist.destroy_process_group()
    sys.exit(status)
