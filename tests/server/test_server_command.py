"""The verb `lapwing serve`: what it refuses, what it prints and logs, how it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
import transformers.utils.logging as transformers_logging
from certificates import Authority, replace
from service_fakes import WAIT, Running, a_probe
from test_server_lifecycle import NOT_SERVING, check, info_of, start_and_stop

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_client.cli import main
from lapwing_server.addresses import is_loopback
from lapwing_server.engine import real_detector
from lapwing_server.server import Settings

EVERYWHERE = "0.0.0.0"  # noqa: S104


def serve_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lapwing_client", "serve", *arguments]


@pytest.mark.parametrize("host", [EVERYWHERE, "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_is_refused(host: str) -> None:
    done = subprocess.run(serve_command("--host", host, "--port", "0"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert host in done.stderr
    assert "--insecure" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert not is_loopback(f"{host}.example.org")


def test_a_taken_port_ends_the_command_with_1() -> None:
    with Running() as server:
        command = serve_command("--port", str(server.port))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"port {server.port} of host 127.0.0.1 can't be listened on: perhaps another server has it" in done.stderr
    assert "give another --port (0 for a free one)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "never awaited" not in done.stderr


@pytest.mark.parametrize("more", [[], ["--host", EVERYWHERE, "--insecure"]])
def test_the_command_says_where_it_listens_even_when_there_is_no_probe(tmp_path: Path, more: list[str]) -> None:
    process = subprocess.Popen(
        serve_command("--port", "0", "--probes", str(tmp_path), *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(f"listening on {EVERYWHERE if more else '127.0.0.1'}:")
        target = f"127.0.0.1:{line.strip().rsplit(':', 1)[1]}"
        info = info_of(target)
        while info.state == detector_pb2.SERVER_STATE_LOADING:
            info = info_of(target)
        assert info.state == detector_pb2.SERVER_STATE_FAILED
        assert "holds no sound probe" in info.message
        assert check(target) == NOT_SERVING
        process.terminate()
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.communicate()


WITHOUT_END = """
import sys
import torch
from lapwing_client.cli import main
from lapwing_server import cli, engine
from service_fakes import FakeEngine, a_shelf

def compute():
    print("computing", flush=True)
    while True:
        torch.stack([torch.ones(8) for _ in range(8)])

torch.set_num_threads(1)
engine.loader = lambda *_, **__: lambda: engine.Loaded(FakeEngine(before=compute), a_shelf())
if sys.argv.pop() == "False":
    cli.computing = lambda seconds: False
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("looks", [True, False])
def test_a_forward_that_goes_on_after_the_grace_does_not_make_the_process_abort(looks: bool) -> None:
    """Where nobody looks for it, which is the control, Python stops its thread in the middle of torch."""
    arguments = ["serve", "--port", "0", "--grace", "0.1", "--log-format", "json", str(looks)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_END, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    try:
        target = process.stdout.readline().removeprefix("listening on ").strip()
        while info_of(target).state == detector_pb2.SERVER_STATE_LOADING:
            pass
        with grpc.insecure_channel(target) as channel:
            message = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
            call = detector_pb2_grpc.DetectorStub(channel).Score.future(message, timeout=WAIT)
            assert process.stdout.readline() == "computing\n"
            process.terminate()
            assert call.exception(WAIT), "it is cut off"
        _, log = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (0 if looks else -signal.SIGABRT)
    assert ("what is still being computed is given up" in log) == looks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "some/model"], "--model needs --probes"),
        (["--probes", "/no/such/folder"], "/no/such/folder"),
        (["--model", "some/model", "--probes", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    command = serve_command("--port", "0", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 2
    assert "--probes" in done.stderr
    assert words in done.stderr
    assert done.stdout == "", "it never listened"


def test_an_address_that_nobody_reads_ends_the_command_in_good_order(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = serve_command("--port", "0", "--probes", str(tmp_path))
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=WAIT)
    os.close(writing)
    assert done.returncode == 1
    assert "but standard output can't be written: Broken pipe" in done.stderr
    for word in ("Traceback", "Event loop is closed", "never awaited", "Exception ignored", "listened on"):
        assert word not in done.stderr


@pytest.mark.parametrize(("host", "address"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_a_host_is_announced_as_a_client_takes_it(host: str, address: str) -> None:
    assert Settings(host=host).address == address


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_a_host_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(OSError, match=rf"^port 0 of host {host} can't be listened on: .*or --host$"):
        start_and_stop(Settings(host=host, port=0, insecure=True))


LOGGING = """
import logging
from lapwing_server import logs
logs.configure("info", "json")
logging.getLogger("some.library").info("chatter")
logging.getLogger("some.library").warning("trouble")
logging.getLogger("lapwing.server").debug("detail")
logging.getLogger("lapwing.server").info("news")
"""


def test_the_log_is_ours_and_of_libraries_only_what_went_wrong() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True)
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["trouble", "news"]


def test_loading_draws_no_bar_in_the_log_and_writes_nothing_past_it() -> None:
    transformers_logging.enable_progress_bar()
    transformers_logging.enable_default_handler()
    theirs = logging.getLogger("transformers")
    assert transformers_logging.is_progress_bar_enabled(), "control"
    assert logging.StreamHandler in map(type, theirs.handlers), "control"
    with pytest.raises(Exception, match="can't be loaded"):
        real_detector("/nowhere/at/all", a_probe())
    assert not transformers_logging.is_progress_bar_enabled()
    assert logging.StreamHandler not in map(type, theirs.handlers), "what it warns of is a line of our log"
    assert theirs.propagate


# Certificates, tokens and metrics, as the command takes them.


@pytest.fixture
def guarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, bytes, str]:
    """A configuration file, the authority to trust, and a token."""
    authority = Authority("ours")
    authority.issue("localhost").write(tmp_path / "cert.pem", tmp_path / "key.pem")
    assert main(["token", "ci", "--scope", "read", "--into", str(tmp_path / "tokens.toml")]) == 0
    token = capsys.readouterr().out.strip()
    names = {"tls_cert": "cert.pem", "tls_key": "key.pem", "tokens_file": "tokens.toml", "probes": "no-probes"}
    (tmp_path / "no-probes").mkdir()
    lines = [f'{name} = "{tmp_path / file}"' for name, file in names.items()]
    lines += ['log_format = "json"', "port = 0", "metrics_port = 0", "[limits]", "batch_items = 7"]
    config = tmp_path / "lapwing.toml"
    config.write_text("\n".join(lines))
    return config, authority.pem, token


def test_the_command_serves_as_its_settings_say(guarded: tuple[Path, bytes, str]) -> None:
    config, roots, token = guarded
    process = subprocess.Popen(
        serve_command("--config", str(config), "--host", EVERYWHERE, "--limits-page-size", "9"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LAPWING_LOG_LEVEL": "debug"},
    )
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip().rsplit(":", 1)[1]
        with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(roots)) as channel:
            stub = detector_pb2_grpc.DetectorStub(channel)
            request, metadata = detector_pb2.GetServerInfoRequest(), [("authorization", f"Bearer {token}")]
            assert stub.GetServerInfo(request, timeout=WAIT, metadata=metadata).limits.max_batch_items == 7
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetServerInfo(request, timeout=WAIT, metadata=[("authorization", f"Bearer {token}x")])
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        process.terminate()
        _, log = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert f"setting host is '{EVERYWHERE}' (from --host)" in events
    assert f"setting limits.batch_items is 7 (from {config})" in events
    assert "setting limits.page_size is 9 (from --limits-page-size)" in events
    assert "setting log_level is 'debug' (from LAPWING_LOG_LEVEL)" in events
    assert token not in log


def test_the_metrics_live_as_long_as_the_server() -> None:
    with Running(metrics_port=0) as server:
        url = f"http://127.0.0.1:{server.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=WAIT) as page:
            assert re.search(rb"^lapwing_", page.read(), re.MULTILINE)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=WAIT)


def test_a_taken_port_of_the_metrics_is_named() -> None:
    with Running(metrics_port=0) as server:
        port = server.server.metrics_port
        assert port is not None
        with pytest.raises(OSError, match=f"port {port} of host 127.0.0.1 can't be listened on for the metrics"):
            start_and_stop(Settings(port=0, metrics_port=port))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tokens.toml", "tokens.toml is no TOML, line 1, column"),
        ("cert.pem", "cert.pem and tls_key"),
        ("key.pem", "key.pem can't be used together"),
    ],
)
def test_a_broken_file_ends_the_command_with_2_and_is_not_shown(
    file: str, words: str, guarded: tuple[Path, bytes, str], tmp_path: Path
) -> None:
    replace(tmp_path / file, b"a canary")
    command = serve_command("--config", str(guarded[0]), "--log-format", "text")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the settings can't be used" in done.stderr
    assert words in done.stderr
    assert "canary" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
