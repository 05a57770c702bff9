"""What torchrun tells a process through its environment. Without torch, so that the command line can ask."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

from shoal.errors import ShoalError

# Unlike the first four, which clusters also set for whole machines, the last two are torchrun's alone.
_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in _SET)


def one_machine() -> bool:
    """Whether all ranks are on this one, as far as torchrun says."""
    return not is_worker() or os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def is_mistake(error: ShoalError) -> bool:
    """Whether it is the user's, and not a rank's failure."""
    return error.exit_code == ShoalError.exit_code


def to_be_said(error: ShoalError) -> bool:
    """Whether this process, which ends with the error, is the one to print it.

    All of torchrun's ranks find the same mistake of the user's: the first one of this machine says it.
    """
    # torchrun's name for a file of this rank, in a folder of this start of all ranks of this machine.
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not is_worker() or not file or not is_mistake(error):
        return True
    # torchrun ends the others when one has ended: not in the middle of the sentence, and with the exit code of all.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # what torchrun prints last, as the cause
        Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    try:
        (Path(file).parent.parent / "shoal-said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # rather twice than never
    return True
