"""`distckpt watch`: what it prints, and what Prometheus, TensorBoard and OpenTelemetry are told, each read back."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time

import pytest

from distckpt import cli
from distckpt.run.events import note
from distckpt.store.local import LocalStore


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of ten seconds, of which one was loading and one saving."""
    root = tmp_path / "first"
    store, now = LocalStore(root), 1_700_000_000.0
    for at, event, more in (
        (1, "launched", {"seconds": 1.0}),
        (5, "staged", {"step": 10, "stall": 0.25, "samples": 80}),
        (6, "committed", {"step": 10, "bytes": 1000, "seconds": 1.0, "metrics": {"loss": 0.5, "note": "x"}}),
        (9, "staged", {"step": 20, "stall": 0.75, "samples": 160}),
        (9.5, "failed", {"step": 20, "error": "full"}),
        (10, "closed", {}),
    ):
        monkeypatch.setattr(time, "time", lambda at=at: now + at)
        note(store, event, launch=1, **more)
    monkeypatch.undo()
    return root


def test_what_a_run_comes_to(run, capsys):
    assert cli.main(["watch", str(run), "--once"]) == 0
    out = capsys.readouterr().out
    for line in ("committed_total: 1", "failed_total: 1", "step: 20", "committed_step: 10", "stall_seconds_total: 1"):
        assert line in out.splitlines()
    assert (
        "goodput: 80.0% of 10 s in 1 launch(es); saving 10.0%, lost work 0.0%, down, starting and loading 10.0%" in out
    )
    assert cli.main(["watch", str(run), "--once", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["figures"]["goodput_ratio"] == pytest.approx(0.8)
    assert [e["event"] for e in value["events"]][:2] == ["launched", "staged"]
    assert cli.main(["watch", str(run / "nowhere"), "--once"]) == 3
    (run / "file").touch()
    assert cli.main(["watch", str(run / "file")]) == 3


def test_it_follows(run):
    command = [sys.executable, "-m", "distckpt.cli", "watch", str(run), "--interval", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        try:
            first = [watch.stdout.readline() for _ in range(6)]
            assert "committed  step=10 bytes=1.0 kB seconds=1.0 metrics={'loss': 0.5, 'note': 'x'}" in first[2]
            note(LocalStore(run), "skipped", step=30, why="because")
            assert watch.stdout.readline().endswith("skipped    step=30 why=because\n")
            (run / "events.jsonl").unlink()
            note(LocalStore(run), "skipped", step=1, why="it began again")
            assert watch.stdout.readline().endswith("skipped    step=1 why=it began again\n")
            watch.send_signal(2)
            assert watch.wait(20) == 130
        finally:
            watch.kill()


def test_prometheus(run, tmp_path):
    parser = pytest.importorskip("prometheus_client.parser")
    file = tmp_path / "first.prom"
    assert cli.main(["watch", str(run), "--once", "--prometheus", str(file)]) == 0
    families = parser.text_string_to_metric_families(file.read_text())
    found = {s.name: (s.labels, s.value) for family in families for s in family.samples}
    assert found["distckpt_committed_step"] == ({"run": "first"}, 10.0)
    assert found["distckpt_goodput_ratio"][1] == pytest.approx(0.8)
    assert found["distckpt_save_bytes"][1] == 1000.0


def test_tensorboard(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert cli.main(["watch", str(run), "--once", "--tensorboard", str(tmp_path / "logs")]) == 0
    logs = accumulator.EventAccumulator(str(tmp_path / "logs"))
    logs.Reload()
    assert [(e.step, e.value) for e in logs.Scalars("distckpt/stall_seconds")] == [(10, 0.25), (20, 0.75)]
    assert [(e.step, e.value) for e in logs.Scalars("metrics/loss")] == [(10, 0.5)]
    assert "metrics/note" not in logs.Tags()["scalars"]


def test_opentelemetry(run, monkeypatch, capsys):
    decode = pytest.importorskip("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    bodies = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            assert cli.main(["watch", str(run), "--once", "--otel"]) == 0
        finally:
            server.shutdown()
    capsys.readouterr()
    request = decode.ExportMetricsServiceRequest.FromString(bodies[-1])
    metrics = [m for r in request.resource_metrics for s in r.scope_metrics for m in s.metrics]
    found = {m.name: m.gauge.data_points[0] for m in metrics}
    assert found["distckpt.committed_step"].as_int == 10
    assert found["distckpt.goodput_ratio"].as_double == pytest.approx(0.8)
    assert found["distckpt.step"].attributes[0].value.string_value == "first"


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [
        (["--prometheus", "x"], "prometheus_client", "prometheus"),
        (["--tensorboard", "x"], "torch.utils.tensorboard", "tensorboard"),
        (["--otel"], "opentelemetry.sdk.metrics", "otel"),
    ],
)
def test_what_is_not_installed_is_named(run, option, module, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["watch", str(run), "--once", *option]) == 1
    assert f"pip install 'distckpt[{extra}]'" in capsys.readouterr().err
