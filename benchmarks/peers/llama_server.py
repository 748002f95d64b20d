"""llama.cpp's own HTTP server, with the model and the settings that the embedded engine has by default.

python -m benchmarks.peers.llama_server [--batch TOKENS]
"""

import argparse
import signal

import xllamacpp
from flywheel_server.cores import usable_cores
from flywheel_server.engines.embedded import default_model

CONTEXT_TOKENS = 8192
SLOTS = 8


def main() -> None:
    """Serves on a free port, which it prints, until the process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=0, help="tokens computed in one step; 0 is llama.cpp's default")
    batch = parser.parse_args().batch
    params = xllamacpp.CommonParams()
    params.model.path = str(default_model())
    params.n_ctx = CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.kv_unified = True
    if batch:
        params.n_batch = params.n_ubatch = batch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = usable_cores()
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.ui = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(f"ready: {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
