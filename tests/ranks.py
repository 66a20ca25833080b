"""Processes of one gloo group that wait for functions to run, since starting them takes longer than most tests.

They are forked from one that has imported what takes seconds.
"""

import os
import time
import traceback
from datetime import timedelta
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SECONDS = 120  # nothing takes so long unless processes wait for each other for ever
_PRELOADED = ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "gsm_sgd.optim.gsm"]


class Ranks:
    """So many processes."""

    closed = False

    def __init__(self, size, folder):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._jobs = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        store = f"file://{folder}/store-{os.getpid()}-{time.monotonic_ns()}"
        self._processes = [
            context.Process(target=_serve, args=(rank, size, store, jobs, self._results), daemon=True)
            for rank, jobs in enumerate(self._jobs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *args):
        """Return what each rank's call of a function returned; raise the first error of any."""
        results = self.outcomes(function, *args)
        for outcome in results:
            if isinstance(outcome, Failure):
                self.close()  # the others may wait for it for ever
                raise AssertionError(outcome.text)
        return results

    def errors(self, function, *args):
        """Return the message of each rank's error."""
        outcomes = self.outcomes(function, *args)
        assert all(isinstance(outcome, Failure) for outcome in outcomes), outcomes
        return [outcome.message for outcome in outcomes]

    def outcomes(self, function, *args):
        for jobs in self._jobs:
            jobs.put((function, args))
        outcomes = {}
        for _ in self._jobs:
            try:
                rank, outcome = self._results.get(timeout=_SECONDS)
            except Empty:
                self.close()
                raise AssertionError(f"{function.__name__} hangs; done on ranks {sorted(outcomes)}") from None
            outcomes[rank] = outcome
        return [outcomes[rank] for rank in range(len(self._jobs))]

    def close(self):
        self.closed = True
        for process in self._processes:
            process.kill()
            process.join()


class Failure:
    """An error in another process."""

    def __init__(self, error):
        self.message = f"{type(error).__name__}: {error}"
        self.text = "".join(traceback.format_exception(error))

    def __repr__(self):
        return self.text


def full(tensor):
    """Return a copy of a tensor, of all of it if processes hold parts."""
    return (tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()).clone()


def _serve(rank, size, store, jobs, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS // 2))
    while True:
        function, args = jobs.get()
        try:
            results.put((rank, function(*args)))
        except Exception as error:
            results.put((rank, Failure(error)))
