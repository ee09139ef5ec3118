"""ONNX file -> serialized TensorRT engine, by the calls that TensorRT 10.3 to 11 and TensorRT-RTX share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import Named, UserError

BATCHES = (1, 1, 8)  # smallest, usual and largest, where the model's batch is dynamic
WORKSPACE = 1 << 30  # bytes; TensorRT lowers it to what the device has


def logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors: TensorRT logs the reason of a failure, and returns None."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the message that is raised, drops the rest."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def text(self) -> str:
            return "; ".join(self.errors[-3:]) or "TensorRT logged no reason"

    return Log()


class Builder(Named):
    """Builds one strongly typed engine: the precision is in the graph.

    image: (C, H, W) of the profile where the network's batch is dynamic; None takes the network's own.
    """

    def __init__(
        self,
        module: Any,
        model: Path,
        batches: Sequence[int] = BATCHES,
        image: Sequence[int] | None = None,
    ) -> None:
        self.name = model.name
        self._trt, self._model, self._batches, self._image = module, model, batches, image
        self._log = logger(module)

    def error(self, message: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {message}; try another --precision, or --runtime ort")

    def start_error(self, message: str) -> Exception:
        """The exception to raise where TensorRT itself does not start."""
        return self.error(message)

    def call_failed(self, what: str) -> Exception:
        """The exception of a call that returned nothing, with TensorRT's own reason."""
        return self.error(f"{what}: {self._log.text()}")

    def parse_errors(self, parser: Any) -> str:
        """What the parser rejects, and why."""
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        return f"it: {' '.join(errors.split())[:500] or self._log.text()}"

    @contextlib.contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """Apply the options to the build that runs inside the block."""
        config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, WORKSPACE)
        # TF32 is on by default and has a 10-bit mantissa: fp32 would fail its parity gate.
        config.clear_flag(self._trt.BuilderFlag.TF32)
        yield

    def build(self) -> bytes:
        """The engine. Raises `error`, with TensorRT's own reason: it cannot start, parse or build."""
        trt, log = self._trt, self._log
        try:
            builder = trt.Builder(log)
        except TypeError as error:  # the factory returned nothing: no driver, or one too old
            reason = log.text() if log.errors else error
            raise self.start_error(f"TensorRT cannot start: {reason}") from None
        # TensorRT returns None, False or -1 for a failure: every call is checked.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        if network is None:
            raise self.call_failed("TensorRT created no network")
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(self._model)):
            raise self.error(f"TensorRT cannot parse {self.parse_errors(parser)}")
        config = builder.create_builder_config()
        if config is None:
            raise self.call_failed("TensorRT created no configuration")
        self._add_profile(builder, network, config)
        with self.configured(config):
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise self.call_failed("TensorRT cannot build it")
        return bytes(plan)

    def _add_profile(self, builder: Any, network: Any, config: Any) -> None:
        """Set the batches, where the network's batch is dynamic."""
        entry = network.get_input(0)
        if entry is None:
            raise self.call_failed("the network has no input")
        if entry.shape[0] != -1:
            return
        image = self._image or tuple(entry.shape)[1:]
        profile = builder.create_optimization_profile()
        if profile is None:
            raise self.call_failed("TensorRT created no optimization profile")
        profile.set_shape(entry.name, *[(batch, *image) for batch in self._batches])
        if config.add_optimization_profile(profile) < 0:
            raise self.call_failed(f"TensorRT rejects the batches {list(self._batches)}")
