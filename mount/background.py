"""The process that `kvfs mount` leaves behind: takes its order on stdin, tells when it is ready."""

from __future__ import annotations

import logging
import os
import pickle
import sys

from kvfs.errors import KvfsError
from kvfs.mount.passthrough import preload
from kvfs.mount.session import refusal_of

log = logging.getLogger("kvfs.mount.background")


def main() -> int:
    """Serve; whoever started this reads b"ready" or a refusal from the descriptor argument."""
    ready = int(sys.argv[1])
    mountpoint, config, forget_tiers = pickle.load(sys.stdin.buffer)
    told = False

    def tell(answer: bytes) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(ready, answer)
            os.close(ready)

    try:
        preload()
        from kvfs.mount.daemon import run  # pyfuse3 must come after the reply extension

        return run(mountpoint, config, forget_tiers, on_ready=lambda: tell(b"ready"))
    except KvfsError as error:
        tell(refusal_of(error))
        log.error("ended: %s", error)
        return error.exit_code
    except BaseException as error:
        tell(refusal_of(error))
        raise


if __name__ == "__main__":
    sys.exit(main())
