"""Where `distckpt watch` tells what happens to a run: each sink is an extra of its own, imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from distckpt.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack


class Sink(Protocol):
    """Told of each event, and then of what all come to."""

    def take(self, event: Mapping[str, Any], /) -> None:
        """One more event."""
        ...

    def show(self, values: Mapping[str, float], /) -> None:
        """What all events so far come to."""
        ...


def opened(stack: ExitStack, run: str, prometheus: str | None, tensorboard: str | None, *, otel: bool) -> list[Sink]:
    """Sinks that were asked for; closed with the stack. Unsupported where an extra is not installed."""
    sinks: list[Sink] = []
    if prometheus:
        sinks.append(Prometheus(prometheus, run))
    if tensorboard:
        sinks.append(TensorBoard(stack, tensorboard))
    if otel:
        sinks.append(OpenTelemetry(stack, run))
    return sinks


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Unsupported(f"{name} is not installed: pip install 'distckpt[{extra}]'") from e


class Prometheus:
    """A textfile for node_exporter, replaced as a whole."""

    def __init__(self, file: str, run: str) -> None:
        self._client, self._file, self._run = _module("prometheus_client", "prometheus"), file, run

    def take(self, event: Mapping[str, Any]) -> None:
        """Nothing: the values say it all."""

    def show(self, values: Mapping[str, float]) -> None:
        """Write the file."""
        registry = self._client.CollectorRegistry()
        for name, value in values.items():
            text = f"{name} of a run; docs/events.md of distckpt"
            self._client.Gauge(f"distckpt_{name}", text, ["run"], registry=registry).labels(self._run).set(value)
        self._client.write_to_textfile(self._file, registry)


class TensorBoard:
    """Scalars over steps: what saves cost, and the metrics recorded with them."""

    def __init__(self, stack: ExitStack, directory: str) -> None:
        self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(directory)
        stack.callback(self._writer.close)

    def take(self, event: Mapping[str, Any]) -> None:
        """Add an event's scalars."""
        numbers: dict[str, Any] = {}
        if event["event"] == "staged":
            numbers = {"distckpt/stall_seconds": event["stall"]}
        elif event["event"] == "committed":
            numbers = {f"distckpt/save_{name}": event.get(name) for name in ("seconds", "bytes")}
            numbers |= {f"metrics/{name}": value for name, value in event.get("metrics", {}).items()}
        for name, value in numbers.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, event["step"], walltime=event["time"])

    def show(self, values: Mapping[str, float]) -> None:
        """Add what the run has come to."""
        if "goodput_ratio" in values and "step" in values:
            self._writer.add_scalar("distckpt/goodput", values["goodput_ratio"], int(values["step"]))
        self._writer.flush()


class OpenTelemetry:
    """Gauges, exported over OTLP/HTTP to where the OTEL_* variables say."""

    def __init__(self, stack: ExitStack, run: str) -> None:
        metrics = _module("opentelemetry.sdk.metrics", "otel")
        export = _module("opentelemetry.sdk.metrics.export", "otel")
        otlp = _module("opentelemetry.exporter.otlp.proto.http.metric_exporter", "otel")
        reader = export.PeriodicExportingMetricReader(otlp.OTLPMetricExporter())
        provider = metrics.MeterProvider([reader])
        stack.callback(provider.shutdown)
        self._meter, self._run = provider.get_meter("distckpt"), run
        self._gauges: dict[str, Any] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Nothing: the values say it all."""

    def show(self, values: Mapping[str, float]) -> None:
        """Set the gauges."""
        for name, value in values.items():
            gauge = self._gauges.get(name) or self._gauges.setdefault(
                name, self._meter.create_gauge(f"distckpt.{name}")
            )
            gauge.set(value, {"run": self._run})
