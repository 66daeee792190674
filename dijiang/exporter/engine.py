"""TensorRT engines of a bundle: `dijiang build`. TensorRT and TensorRT-RTX go the same way.

The network is strongly typed: every type, and every quantizer, is in the graph. So no precision flag is
set, which TensorRT 11 no longer has, and the engine computes what the graph that was verified says.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import names
from ..bundle.integrity import record_file
from ..bundle.manifest import DATA, Manifest
from ..bundle.opened import Bundle, open_bundle
from ..errors import ExportError, SessionError
from ..files import move_file
from ..hidden import hidden_folder
from ..machine.driver import Cuda, Gpu
from ..machine.memory import build_bytes, require_memory
from ..recipe import AUTO, PRECISIONS
from ..runtime.sessions.base import PIECE
from ..runtime.sessions.engines import BACKENDS, TURING, Backend, EngineRecord, import_backend, installed_backend


def build(
    bundle: str | Path, *, backend: str = AUTO, gpus: Sequence[str] = (), batch: int = 1, longest: int = PIECE
) -> Bundle:
    """Build an engine into a bundle; an engine of the same backend is replaced.

    Args:
        bundle: folder written by `dijiang export --target tensorrt`.
        backend: `tensorrt`, `tensorrt_rtx`, or `auto`: the first that is installed.
        gpus: compute capabilities to build for, as in "sm86"; only TensorRT-RTX can build for GPUs that
            are not there. Empty: the GPU of this machine.
        batch: sequences a call at most.
        longest: tokens a call at most; a longer prompt goes through in pieces.

    Raises:
        BundleError, SessionError: the bundle, or the backend, its GPU or driver, is not usable.
        ExportError: the graph cannot be built for what was asked, or not in the memory that is free.
    """
    opened = open_bundle(bundle)
    name = installed_backend() if backend == AUTO else backend
    if name not in BACKENDS:
        raise ExportError(f"backend {name!r} is unknown, expected one of auto, {', '.join(BACKENDS)}")
    if batch < 1 or longest < 1:
        raise ExportError(f"batch is {batch} and longest {longest}, expected at least 1; give larger ones")
    graph = _readable(opened, name)  # said before a GPU is asked for
    device, targets = _targets(name, (gpus,) if isinstance(gpus, str) else tuple(gpus))
    _require_types(opened, targets)
    require_memory(
        f"{opened.path}: building its engine",
        build_bytes(opened.data_bytes),
        "close something, export a smaller precision, or build on a machine with more memory",
        ExportError,
    )
    trt = import_backend(name)
    record = EngineRecord(
        file=f"{name}.engine",
        backend=name,
        version=trt.__version__,
        gpus=targets,
        device=None if BACKENDS[name].gpus else str(device),
        batch=batch,
        longest=longest,
    )
    return _store(opened, record, _Builder(trt, opened, opened.graph_file(graph), record))


def _targets(name: str, gpus: tuple[str, ...]) -> tuple[Gpu | None, tuple[str, ...]]:
    """The GPU at hand, if one is needed, and the compute capabilities to build for."""
    backend = BACKENDS[name]
    device = None if gpus and backend.gpus else _device(backend)
    targets = gpus or (device.sm,) if device is not None else gpus
    unknown = sorted(set(targets) - set(backend.gpus or (device.sm if device else "",)))
    if unknown:
        known = ", ".join(backend.gpus) or f"{device}: it builds for the GPU it runs on"
        raise ExportError(f"{backend.title} cannot build for {', '.join(unknown)}, expected {known}")
    if TURING in targets and len(targets) > 1:
        raise ExportError(f"{TURING} needs an engine of its own; build it into a copy of the bundle")
    return device, targets


def _device(backend: Backend) -> Gpu:
    """The GPU of this machine. Asked before TensorRT is: its Builder is null without a driver."""
    try:
        return Cuda().gpu
    except SessionError as error:
        advice = f"; or name it: --gpu {' --gpu '.join(backend.gpus[2:5])}" if backend.gpus else ""
        raise SessionError(f"{error}{advice}") from None


def _readable(bundle: Bundle, backend: str) -> str:
    """The graph that a backend reads; ExportError if the bundle has none."""
    recipe = bundle.manifest.recipe
    found = [name for name in recipe.graphs if backend in recipe.providers(name)]
    if not found:
        raise ExportError(
            f"{bundle.path}: TensorRT reads none of its graphs ({', '.join(recipe.graphs)}); "
            "export again with --target tensorrt"
        )
    return found[0]


def _require_types(bundle: Bundle, targets: tuple[str, ...]) -> None:
    """ExportError where a GPU lacks what the bundle needs."""
    recipe = bundle.manifest.recipe
    known = PRECISIONS.get(recipe.precision)
    if TURING in targets and (known is None or not known.turing):
        raise ExportError(
            f"{bundle.path}: TensorRT-RTX has no {recipe.precision} matmul on {TURING}; "
            "export again with --precision fp16"
        )


def _store(bundle: Bundle, record: EngineRecord, builder: _Builder) -> Bundle:
    """Build inside the bundle's folder, out of sight; then its files, and the manifest last.

    A new file never takes the name of one that the manifest says the hash of: until the manifest changes
    the old engine is the engine.
    """
    listed = bundle.manifest.files
    kept = {name: _free(name, listed) for name in (record.file, f"{record.backend}.timing")}
    bundle = bundle.announced([*kept, *kept.values()])
    try:
        with hidden_folder(bundle.path / record.file) as folder:
            written = builder.write(folder)
            records = {kept[file.name]: record_file(file) for file in written}
            for file in written:
                move_file(file, bundle.path / kept[file.name], ExportError)
    except OSError as error:
        raise ExportError(
            f"{bundle.path}: the engine cannot be written ({error.strerror or error}); "
            "free some space, or make the folder writable"
        ) from error
    record = replace(record, file=kept[record.file])

    def changed(manifest: Manifest) -> Manifest:
        files = {name: known for name, known in manifest.files.items() if not _is_of(name, record.backend)}
        engines = manifest.engines | {record.backend: record.to_dict()}
        return replace(manifest, files=files | records, engines=engines)

    bundle = bundle.edited(changed)
    for name in bundle.manifest.reports:
        if _is_of(name, record.backend) and name not in bundle.manifest.files:
            (bundle.path / name).unlink(missing_ok=True)
    return bundle


def _free(name: str, listed: Collection[str]) -> str:
    """One of the two names that a file of an engine has in turn: the one that is not listed."""
    return f"next-{name}" if name in listed else name


def _is_of(name: str, backend: str) -> bool:
    """Whether a file of a bundle belongs to its engine of a backend."""
    return name.removeprefix("next-").partition(".")[0] == backend


@contextmanager
def _graph_for(graph: Path, gpus: tuple[str, ...], folder: Path) -> Iterator[Path]:
    """The ONNX file to parse: the bundle's, or one in `folder` with what Turing lacks replaced."""
    if TURING not in gpus:
        yield graph
        return
    import onnx_ir as ir  # a Jetson builds without it

    from ..graph.passes.turing import ExpandMatMuls
    from ..graph.strangers import reading

    path = folder / "graph" / f"{TURING}.onnx"
    with reading(graph):
        model = ir.load(graph)
        ExpandMatMuls()(model)
    path.parent.mkdir()
    (path.parent / DATA).symlink_to((graph.parent / DATA).absolute())
    ir.save(model, path)
    yield path
    shutil.rmtree(path.parent)


class _Builder:
    """One build: parse the graph, declare the shapes, let TensorRT compile."""

    def __init__(self, trt: Any, bundle: Bundle, graph: Path, record: EngineRecord) -> None:
        self.trt, self.bundle, self.graph, self.record = trt, bundle, graph, record
        self.backend = BACKENDS[record.backend]
        self.log = _log(trt)
        try:
            self.builder = trt.Builder(self.log)
        except TypeError as error:  # what its null pointer becomes
            raise SessionError(
                f"{self.backend.title} {trt.__version__} could not start ({error}); "
                "check that its CUDA version is not newer than the driver's"
            ) from error

    def write(self, folder: Path) -> list[Path]:
        """Write the engine, and what belongs to it, into a folder."""
        with _graph_for(self.graph, self.record.gpus, folder) as graph:
            network = self._parse(graph)
        config = self.builder.create_builder_config()
        self._set_types(config)
        for shortest, typical, longest in self.backend.profiles:
            config.add_optimization_profile(self._profile(network, shortest, typical, longest))
        timing = self._timing(config)
        path = folder / self.record.file
        engine = self.builder.build_serialized_network(network, config)
        if engine is None:
            reason = self.log.errors[-1] if self.log.errors else "no reason given"
            raise ExportError(
                f"{self.graph}: {self.backend.title} {self.record.version} cannot build it for "
                f"{', '.join(self.record.gpus)} ({reason}); report the checkpoint and this line"
            )
        path.write_bytes(engine)
        if timing is None:
            return [path]
        (folder / timing).write_bytes(config.get_timing_cache().serialize())
        return [path, folder / timing]

    def _parse(self, graph: Path) -> Any:
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self.trt.OnnxParser(network, self.log)
        if not parser.parse_from_file(str(graph)):
            first = parser.get_error(0)
            raise ExportError(
                f"{self.graph}: {self.backend.title} {self.record.version} cannot read node "
                f"{first.node_name() or first.node()} ({first.desc()}); report this line"
            )
        return network

    def _set_types(self, config: Any) -> None:
        """Types are the graph's own: TF32 would round float32 matmuls to 10 bits behind its back."""
        if hasattr(self.trt.BuilderFlag, "TF32"):
            config.clear_flag(self.trt.BuilderFlag.TF32)
        if not self.backend.gpus:
            return
        config.num_compute_capabilities = len(self.record.gpus)
        for index, gpu in enumerate(self.record.gpus):
            config.set_compute_capability(getattr(self.trt.ComputeCapability, gpu.upper()), index)

    def _profile(self, network: Any, shortest: int, typical: int | None, longest: int | None) -> Any:
        profile = self.builder.create_optimization_profile()
        most = longest or self.record.longest
        lengths = (shortest, typical or most, most)
        batches = (1, 1, self.record.batch)
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            rest = tuple(tensor.shape)[1:]
            # The graph's only dynamic sizes are the batch, the tokens and the kept tokens.
            kept = (1, 1, most) if tensor.name == names.LOGIT_INDICES else lengths
            shapes = [
                (batch, *(length if size == -1 else size for size in rest))
                for batch, length in zip(batches, kept, strict=True)
            ]
            profile.set_shape(tensor.name, *shapes)
        return profile

    def _timing(self, config: Any) -> str | None:
        """Start from the kernel timings of an earlier build, where the backend measures any."""
        if self.backend.gpus:
            return None
        name = f"{self.record.backend}.timing"
        old = next((n for n in self.bundle.manifest.files if n in (name, f"next-{name}")), None)
        known = b"" if old is None else (self.bundle.path / old).read_bytes()
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):  # of another GPU or version: start anew
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return name


def _log(trt: Any) -> Any:
    """A logger that keeps errors for the message and says nothing itself."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

    return Log()
