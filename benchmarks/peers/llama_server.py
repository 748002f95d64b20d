"""llama.cpp's own HTTP server, with the embedded engine's default model and settings.

python -m benchmarks.peers.llama_server [--own-batch]
"""

import argparse
import signal

import xllamacpp
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.settings import Settings
from flywheel_server.system.cores import usable_cores


def main() -> None:
    """Serves on a free port until the process ends, and prints the address."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--own-batch", action="store_true", help="use llama.cpp's default number of tokens in a step")
    has_own_batch = parser.parse_args().own_batch
    settings = Settings()
    params = xllamacpp.CommonParams()
    params.model.path = str(default_model())
    params.n_ctx = settings.embedded_context
    params.n_parallel = settings.embedded_slots
    params.kv_unified = True
    if not has_own_batch:
        params.n_batch = params.n_ubatch = settings.embedded_batch
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
