"""A rank of the test pool: waits for tasks in a folder, runs each on all ranks, writes what it returned. Started once a
test run.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from mrg_r1.engine.checkpoint import write_text_atomically
from mrg_r1.engine.ranks import finish_ranks, start_ranks


def main() -> None:
    folder = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    torch.set_num_threads(1)
    tasks = importlib.import_module("tests.ranks.tasks")
    ranks = start_ranks(seed=0)
    gc.collect()
    gc.freeze()  # DeepSpeed calls up the collector in each start at stage 3: a second of walking through libraries
    number = 0
    while True:
        task = folder / f"task_{number}.json"
        while not task.is_file():
            if (folder / "stop").exists():
                finish_ranks()
                return
            time.sleep(0.02)
        order = json.loads(task.read_text())
        try:
            function = getattr(tasks, order["function"])
            answer = {"value": function(ranks, **order["arguments"])}
        except BaseException:  # the test that gave the task shows it
            answer = {"error": traceback.format_exc()}
        write_text_atomically(folder / f"answer_{number}_{ranks.rank}.json", json.dumps(answer))
        number += 1


if __name__ == "__main__":
    main()
