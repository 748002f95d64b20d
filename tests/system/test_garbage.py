"""What a server has made at its start is exempt from garbage collections, which would stop all its calls for 20 ms and more."""

import sys
from pathlib import Path

from flywheel_proto.v1 import generation_pb2 as pb

from tests.server.test_command import ready_line
from tests.serving import connected
from tests.test_examples import started

PROGRAM = """
import gc
from flywheel_server import run
from flywheel_server.engines.base import EngineStats
from flywheel_server.engines.scripted import ScriptedEngine

class Counting(ScriptedEngine):
    async def stats(self):
        exempt = gc.get_freeze_count()
        return EngineStats(backlog=exempt, num_total_runners=len(gc.get_objects()))

raise SystemExit(run(Counting()))
"""


async def test_what_exists_at_the_start_is_exempt(tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text(PROGRAM)
    async with started(program, "--address", "127.0.0.1:0") as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            stats = await target.stub.GetStats(pb.GetStatsRequest())
    exempt, others = stats.backlog, stats.num_total_runners
    assert exempt > len(sys.modules)
    assert others < exempt / 5
