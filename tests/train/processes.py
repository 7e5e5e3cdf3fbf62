"""One of two processes that train together: python -m tests.train.processes ADDRESS INDEX FOLDER [SIGTERM]

It writes its final weights to FOLDER/INDEX.npz. With the argument SIGTERM the second process gets a SIGTERM when it
reports its first step; both then end with code 143.
"""

import os
import random
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from apr_jax.data.packing import flatten_thread
from apr_jax.devices import start_devices
from apr_jax.train.optimizer import OptimizerConfig, path_name
from apr_jax.train.sft import SftConfig, SftJob, SftRun, run_sft
from apr_jax.train.step import data_mesh
from apr_jax.train.termination import Terminated
from tests.tiny import make_model, random_thread


def train(mesh, folder):
    segments = [flatten_thread(random_thread(random.Random(i), depth=0)) for i in range(60)]
    optimizer = OptimizerConfig("muon", peak_lr=1e-2, muon_lr=0.02)
    config = SftConfig(8, 16, 64, optimizer, microbatches=2, log_every=1, save_every=2)
    return run_sft(SftJob(make_model(0, width=64), config, segments, mesh, folder, segments[:9], {"of": "a test"}))


def weights_of(model):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}


def preempt():
    """Make this process send itself a SIGTERM when it reports its first step."""
    report = SftRun.report

    def preempted(self, step, sums):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(self, step, sums)

    SftRun.report = preempted


if __name__ == "__main__":
    address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    start_devices(4, cache=False)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(address, 2, index)
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    if sys.argv[4:] and index == 1:
        preempt()
    try:
        np.savez(folder / f"{index}.npz", **weights_of(train(data_mesh(8, 4), folder / "together")))
    except Terminated as ended:
        print(ended, file=sys.stderr)
        jax.distributed.shutdown()
        sys.exit(143)
