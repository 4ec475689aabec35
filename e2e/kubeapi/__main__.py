"""``python -m e2e.kubeapi --config FILE.json``: serve until SIGTERM."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from .config import ConfigError, parse_config
from .server import Server


def main() -> int:
    parser = argparse.ArgumentParser(prog="e2e.kubeapi", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    try:
        config = parse_config(json.loads(arguments.config.read_bytes()))
        server = Server(config)
    except (OSError, ValueError, ConfigError) as error:
        print(f"kubeapi: {arguments.config}: {error}", file=sys.stderr)
        return 2
    signals = {signal.SIGTERM, signal.SIGINT}
    # Blocked before the first thread starts, so that every thread leaves them to sigwait below.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        server.start()
    except OSError as error:
        print(f"kubeapi: cannot listen: {error}", file=sys.stderr)
        return 1
    print(f"ready {server.kubeconfig}", flush=True)
    signal.sigwait(signals)
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
