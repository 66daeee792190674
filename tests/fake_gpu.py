"""A GPU that is not there: libcuda over memory of its own, and a TensorRT whose engines run on onnxruntime.

Nothing happens before it must. Work waits on its stream until that is synchronised; until then an array to
which something is copied holds garbage, and so does memory that nothing was written to. The legacy stream,
on which a memset without a stream runs, comes last: nothing but waiting for it puts it first. Captured work
keeps the addresses and shapes it was recorded with. What the driver refuses is refused: calls in a thread
without the context, waiting and allocating in a capture, graphs that are gone, memory that is.
"""

import ctypes
import json
import threading
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import onnxruntime

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, ILLEGAL_ADDRESS = 1, 2, 201, 400, 700
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
#: Bytes that no number of ours has.
GARBAGE = 0xCD
#: Where device memory begins: the host that reads there is killed.
FIRST_ADDRESS = 1 << 52
LEGACY = 0


class Fault(Exception):
    """What a kernel or a copy did wrong; the next call that waits for it says so."""


@dataclass(frozen=True)
class Work:
    """Something on a stream, and the device memory that it touches."""

    do: object
    uses: tuple[int, ...]


class FakeLibcuda:
    """The driver calls that dijiang.machine.driver makes."""

    def __init__(self, sm="87", name=b"Fake Orin", count=1):
        self.sm, self.free, self.name, self.integrated = sm, 8 << 30, name, False
        self.count, self.driver = count, 12060
        self.memory, self.graphs, self.streams = {}, {}, {LEGACY: []}
        self.recording = self.recorded = None
        self.invalidated = False
        self.launches = self.down = 0
        self._next, self._address = 0, FIRST_ADDRESS
        self._thread = threading.local()

    def _handle(self):
        self._next += 1
        return self._next

    def _refusal(self, *, capturable=True):
        """Why a call cannot be made here and now; 0: it can."""
        if not getattr(self._thread, "context", None):
            return INVALID_CONTEXT
        if self.recording is not None and not capturable:
            self.invalidated = True
            return CAPTURE_UNSUPPORTED
        return 0

    def enqueue(self, stream, do, uses):
        """Put work on a stream, or into the graph that is being captured from it. An error code."""
        if code := self._refusal():
            return code
        if stream not in self.streams:
            return INVALID_HANDLE
        if any(address not in self.memory for address in uses):
            return INVALID_VALUE
        work = Work(do, tuple(uses))
        (self.recorded if stream == self.recording else self.streams[stream]).append(work)
        return 0

    def _run(self, stream):
        waiting, self.streams[stream] = self.streams[stream], []
        for work in waiting:
            if any(address not in self.memory for address in work.uses):
                raise Fault
            work.do()

    def view(self, address, shape, dtype):
        """Device memory from an address on, as an array."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if nbytes > len(self.memory.get(address, ())):
            raise Fault
        return self.memory[address][:nbytes].view(dtype).reshape(shape)

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, index):
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context):
        self._thread.context = context.value
        return 0

    def cuDeviceGetName(self, text, size, device):
        text.value = self.name
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.free, 8 << 30
        return self._refusal()

    def cuDriverGetVersion(self, version):
        version._obj.value = self.driver
        return 0

    def cuDeviceGetAttribute(self, value, which, device):
        known = {75: self.sm[:-1], 76: self.sm[-1], 18: self.integrated}
        value._obj.value = int(known[which.value])
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = {OUT_OF_MEMORY: b"out of memory"}.get(code.value, b"invalid value")
        return 0

    def cuMemAlloc_v2(self, address, size):
        if code := self._refusal(capturable=False):
            return code
        if size.value > self.free:
            return OUT_OF_MEMORY
        address._obj.value = self._address
        self.memory[self._address] = np.full(size.value, GARBAGE, np.uint8)
        self._address += max(size.value, 1) + 255 & ~255
        return 0

    def cuMemsetD8_v2(self, address, value, size):
        def fill():
            self.view(address.value, size.value, np.uint8)[...] = value.value

        return self._refusal(capturable=False) or self.enqueue(LEGACY, fill, [address.value])

    def cuMemFree_v2(self, address):
        if code := self._refusal(capturable=False):
            return code
        if any(address.value in work.uses for waiting in self.streams.values() for work in waiting):
            return ILLEGAL_ADDRESS  # CUDA would wait; that our code did not is what a test wants to know
        if address.value not in self.memory:
            return INVALID_VALUE
        del self.memory[address.value]
        return 0

    def cuStreamCreate(self, stream, flags):
        assert flags.value == 1  # not blocking: it does not wait for the legacy stream
        stream._obj.value = self._handle()
        self.streams[stream._obj.value] = []
        return self._refusal()

    def cuMemcpyHtoDAsync_v2(self, device, host, size, stream):
        def copy():
            raw = (ctypes.c_uint8 * size.value).from_address(host.value)
            self.view(device.value, size.value, np.uint8)[...] = np.frombuffer(raw, np.uint8)

        return self._refusal(capturable=False) or self.enqueue(stream.value or LEGACY, copy, [device.value])

    def cuMemcpyDtoHAsync_v2(self, host, device, size, stream):
        def copy():
            if ctypes.string_at(host.value, size.value) != bytes([GARBAGE]) * size.value:
                raise Fault  # somebody else's memory by now
            found = np.ascontiguousarray(self.view(device.value, size.value, np.uint8))
            ctypes.memmove(host.value, found.ctypes.data, size.value)

        code = self._refusal(capturable=False) or self.enqueue(stream.value or LEGACY, copy, [device.value])
        if code == 0:
            self.down += size.value
            ctypes.memset(host.value, GARBAGE, size.value)
        return code

    def cuStreamSynchronize(self, stream):
        if code := self._refusal(capturable=False):
            return code
        if (stream.value or LEGACY) not in self.streams:
            return INVALID_HANDLE
        try:
            self._run(stream.value or LEGACY)
            self._run(LEGACY)
        except Fault:
            return ILLEGAL_ADDRESS
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        if code := self._refusal(capturable=False):
            return code
        self.recording, self.recorded, self.invalidated = stream.value, [], False
        return 0

    def cuStreamEndCapture(self, stream, graph):
        if stream.value != self.recording:
            return INVALID_VALUE
        recorded, self.recording, self.recorded = self.recorded, None, None
        if self.invalidated:
            return CAPTURE_INVALIDATED
        graph._obj.value = self._handle()
        self.graphs[graph._obj.value] = recorded
        return 0

    def cuGraphInstantiateWithFlags(self, ready, graph, flags):
        if graph.value not in self.graphs:
            return INVALID_HANDLE
        ready._obj.value = self._handle()
        self.graphs[ready._obj.value] = self.graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph):
        return 0 if self.graphs.pop(graph.value, None) is not None else INVALID_HANDLE

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph, stream):
        if code := self._refusal(capturable=False):
            return code
        if graph.value not in self.graphs or stream.value not in self.streams:
            return INVALID_HANDLE
        self.launches += 1
        self.streams[stream.value] += self.graphs[graph.value]
        return 0


def fake_tensorrt(cuda):
    """A module with the part of TensorRT's API that dijiang uses."""
    # torch asks for the specs of modules like it, when it is imported.
    trt = SimpleNamespace(
        __spec__=ModuleSpec("tensorrt", None), __version__="10.3.0", built=[], timings=[], fails=set()
    )

    class ILogger:
        ERROR = 1

        def __init__(self, severity=1):
            pass

    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, name, *shapes):
            self.shapes[name] = [list(shape) for shape in shapes]

    class Config:
        def __init__(self):
            self.profiles, self.flags, self.timing = [], {"TF32"}, None

        def add_optimization_profile(self, profile):
            self.profiles.append(profile)

        def clear_flag(self, flag):
            self.flags.discard(flag)

        def create_timing_cache(self, known):
            return SimpleNamespace(known=known, serialize=lambda: b"timings")

        def set_timing_cache(self, cache, ignore_mismatch):
            trt.timings.append(cache.known)
            self.timing = cache
            return not (cache.known and "timing" in trt.fails)

        def get_timing_cache(self):
            return self.timing

    class Network:
        def __init__(self, flags):
            self.flags, self.path, self.inputs = flags, None, []

        num_inputs = property(lambda self: len(self.inputs))

        def get_input(self, index):
            return self.inputs[index]

    class Builder:
        def __init__(self, logger):
            if "builder" in trt.fails:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.logger = logger

        def create_network(self, flags):
            return Network(flags)

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            if "build" in trt.fails:
                self.logger.log(1, "no kernel\n for this")
                return None
            trt.built.append(SimpleNamespace(network=network, config=config))
            profiles = [profile.shapes for profile in config.profiles]
            return json.dumps({"graph": network.path, "profiles": profiles}).encode()

    class OnnxParser:
        def __init__(self, network, logger):
            self.network = network

        def parse_from_file(self, path):
            session = onnxruntime.InferenceSession(path)
            self.network.path = path
            self.network.inputs = [
                SimpleNamespace(name=i.name, shape=[-1 if isinstance(n, str) else n for n in i.shape])
                for i in session.get_inputs()
            ]
            return True

    class Context:
        """Refuses to run with a shape or an address missing, and to be captured before it ran with these
        shapes once: it resolves them in that run.
        """

        def __init__(self, engine):
            self.engine, self.shapes, self.addresses = engine, {}, {}
            self.scratch = self.profile = None
            self.resolved = False

        def set_device_memory(self, address, size):
            assert size >= self.engine.device_memory_size_v2
            self.scratch = address

        def set_optimization_profile_async(self, index, stream):
            self.profile, self.shapes, self.resolved = self.engine.profiles[index], {}, False
            return True

        def set_input_shape(self, name, shape):
            if self.profile is None or name not in self.profile:
                return False
            low, _, high = self.profile[name]
            fits = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            if fits:
                self.resolved = self.resolved and self.shapes.get(name) == tuple(shape)
                self.shapes[name] = tuple(shape)
            return fits

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream):
            if "execute" in trt.fails:
                return False
            inputs, outputs = self.engine.inputs, self.engine.outputs
            if set(self.shapes) != set(inputs) or not {*inputs, *outputs} <= set(self.addresses):
                return False
            if cuda.recording == stream and not self.resolved:
                return False
            shapes, addresses = dict(self.shapes), dict(self.addresses)
            uses = [self.scratch, *addresses.values()]
            self.resolved = True
            return cuda.enqueue(stream, lambda: self.engine.compute(shapes, addresses), uses) == 0

    class Engine:
        device_memory_size_v2 = 1024

        def __init__(self, data):
            described = json.loads(bytes(data))
            self.profiles = described["profiles"]
            self.num_optimization_profiles = len(self.profiles)
            self.session = onnxruntime.InferenceSession(described["graph"])
            self.inputs = [i.name for i in self.session.get_inputs()]
            self.outputs = [o.name for o in self.session.get_outputs()]

        def create_execution_context(self, strategy):
            return None if "context" in trt.fails else Context(self)

        def compute(self, shapes, addresses):
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.float32 if "state" in name else np.int64
                feeds[name] = cuda.view(addresses[name], shape, dtype).copy()
            try:
                results = self.session.run(self.outputs, feeds)
            except Exception as error:  # ids that are garbage
                raise Fault from error
            for name, result in zip(self.outputs, results, strict=True):
                cuda.view(addresses[name], result.shape, result.dtype)[...] = result

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            return None if "load" in trt.fails else Engine(data)

    trt.ILogger = trt.Logger = ILogger
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    trt.BuilderFlag = SimpleNamespace(TF32="TF32")
    trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    return trt
