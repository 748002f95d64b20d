"""The proxy beside a server that llm-d's endpoint picker needs: calls and metrics on one port."""

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import grpc
import pytest
from flywheel_server.engines.scripted import ScriptedEngine

from tests.proxies.proxies import ENVOY_ARGUMENTS, envoy
from tests.serving import code_of, connected, free_ports, serving, until
from tests.telemetry.monitored import QUICK, scraped
from tests.telemetry.promql import DEPLOY


@pytest.mark.thorough
@pytest.mark.skipif(envoy() is None, reason="Envoy is not installed")
async def test_calls_and_metrics_share_a_port(tmp_path: Path) -> None:
    port, metrics_port = free_ports(2)
    async with serving(ScriptedEngine(), metrics_address=f"127.0.0.1:{metrics_port}") as target:
        text = (DEPLOY / "kubernetes" / "llm-d-envoy.yaml").read_text()
        for old, new in (
            ("address: 0.0.0.0, port_value: 8000", f"address: 127.0.0.1, port_value: {port}"),
            ("port_value: 50051", f"port_value: {target.address.rpartition(':')[2]}"),
            ("port_value: 9464", f"port_value: {metrics_port}"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (file := tmp_path / "envoy.yaml").write_text(text)
        arguments = [argument.format(file=file) for argument in ENVOY_ARGUMENTS]
        process = await asyncio.create_subprocess_exec(str(envoy()), *arguments, stdout=PIPE, stderr=STDOUT)

        async def takes_calls() -> bool:
            async with connected(f"127.0.0.1:{port}") as proxied:
                return await code_of(proxied.stub.GenerateDeltas(QUICK)) is grpc.StatusCode.OK

        try:
            await until(takes_calls, "a call gets through")
            assert 'flywheel_build_info{engine="scripted"' in await scraped(port)
        finally:
            process.terminate()
            out, _ = await process.communicate()
            sys.stdout.write(out.decode())
