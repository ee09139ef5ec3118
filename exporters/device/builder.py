"""ONNX file -> serialized TensorRT engine, by the calls that TensorRT 10.3 to 11 and TensorRT-RTX share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import Named, UserError

BATCHES = (1, 1, 8)  # smallest, usual and largest, where the model leaves the batch free
WORKSPACE = 1 << 30  # bytes, cut by TensorRT to what the device has


def logger(trt: Any) -> Any:
    """A TensorRT logger that keeps the errors: TensorRT tells by them, and returns None."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the message that is raised, drops the rest."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def told(self) -> str:
            return "; ".join(self.errors[-3:]) or "TensorRT said nothing"

    return Log()


class Builder(Named):
    """Builds one engine, strongly typed: the precision is in the graph.

    TensorRT logs its failures and returns None, False or -1: all are checked.

    image: (C, H, W) of the profile where the network leaves its batch free; None takes the network's own.
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

    def error(self, what: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {what}; try another --precision, or --runtime ort")

    def not_started(self, what: str) -> Exception:
        """The exception to raise where TensorRT itself does not start."""
        return self.error(what)

    def refused(self, what: str) -> Exception:
        """The exception of a call that gave nothing, in TensorRT's own words."""
        return self.error(f"{what}: {self._log.told()}")

    def unparsed(self, parser: Any) -> str:
        """What of the network the parser refuses, and why."""
        words = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        return f"it: {' '.join(words.split())[:500] or self._log.told()}"

    @contextlib.contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """The settings of the build that runs inside the block."""
        config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, WORKSPACE)
        config.clear_flag(self._trt.BuilderFlag.TF32)  # fp32 means fp32
        yield

    def build(self) -> bytes:
        """The engine. Raises `error`: TensorRT cannot start, parse or build it; the reason is its own."""
        trt, log = self._trt, self._log
        try:
            builder = trt.Builder(log)
        except TypeError as error:  # the factory returned nothing: no driver, or one too old
            words = log.told() if log.errors else error
            raise self.not_started(f"TensorRT cannot start: {words}") from None
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        if network is None:
            raise self.refused("TensorRT makes no network")
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(self._model)):
            raise self.error(f"TensorRT cannot parse {self.unparsed(parser)}")
        config = builder.create_builder_config()
        if config is None:
            raise self.refused("TensorRT makes no configuration")
        self._add_profile(builder, network, config)
        with self.configured(config):
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise self.refused("TensorRT cannot build it")
        return bytes(plan)

    def _add_profile(self, builder: Any, network: Any, config: Any) -> None:
        """The batches, where the network leaves its batch free."""
        entry = network.get_input(0)
        if entry is None:
            raise self.refused("the network has no input")
        if entry.shape[0] != -1:
            return
        image = self._image or tuple(entry.shape)[1:]
        profile = builder.create_optimization_profile()
        if profile is None:
            raise self.refused("TensorRT makes no optimization profile")
        profile.set_shape(entry.name, *[(batch, *image) for batch in self._batches])
        if config.add_optimization_profile(profile) < 0:
            raise self.refused(f"TensorRT refuses the batches {list(self._batches)}")
