"""A process that is killed in a test: `keep LOG` has a service and says its process id and folder, `join FOLDER KEEPER`
is another rank of that node.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    import tests.reward.service.without_labeler  # noqa: F401

from mrg_r1.reward.service.client import ServiceRewards  # noqa: E402
from mrg_r1.reward.service.supervisor import ServiceSettings, ServiceState, Supervisor  # noqa: E402

FUNCTION = {"weights": {"mccs": 0.75, "format": 0.25, "rouge_l": 0.1, "bleu4": 0.0}, "mode": "think"}
SETTINGS = ServiceSettings(
    labeler="keywords", tokenizer=None, device="cpu", dtype="float32", reward_function=FUNCTION, threads=1
)


class FaultySupervisor(Supervisor):
    command = (sys.executable, "-m", "tests.reward.service.faulty_server")


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        supervisor = FaultySupervisor(SETTINGS, log=Path(sys.argv[2]))
        supervisor.wait()
        print(ServiceState.read(supervisor.directory).pid, supervisor.directory, flush=True)
    else:
        rank = ServiceRewards(Path(sys.argv[2]), keeper=int(sys.argv[3]), timeout=60)
        print(os.getpid(), sys.argv[2], flush=True)
    time.sleep(600)
