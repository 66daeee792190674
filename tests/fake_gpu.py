"""A GPU that is not there: libcuda over host memory, and a TensorRT whose engines run on onnxruntime.

Captured work keeps the addresses it was recorded with and is not executed while recording, as on a
real GPU; so wrong buffers, shapes or orders give wrong numbers here too.
"""

import ctypes
import json
from types import SimpleNamespace

import numpy as np
import onnxruntime

OUT_OF_MEMORY = 2


class FakeLibcuda:
    """The driver calls that dijiang.runtime.driver makes."""

    def __init__(self, sm="87", free=8 << 30, name=b"Fake Orin", integrated=False, count=1):
        self.sm, self.free, self.name, self.integrated = sm, free, name, integrated
        self.count, self.driver = count, 12060
        self.memory, self.graphs = {}, {}
        self.recording = None
        self.launches = self.down = 0
        self._next = 0

    def _handle(self):
        self._next += 1
        return self._next

    def enqueue(self, work):
        """Put work on the stream: at once, or into the graph that is being captured."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

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
        return 0

    def cuDeviceGetName(self, text, size, device):
        text.value = self.name
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.free, 8 << 30
        return 0

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
        if size.value > self.free:
            return OUT_OF_MEMORY
        buffer = ctypes.create_string_buffer(b"\xff" * size.value, size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemsetD8_v2(self, address, value, size):
        ctypes.memset(address, value.value, size.value)
        return 0

    def cuMemFree_v2(self, address):
        del self.memory[address.value]
        return 0

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = self._handle()
        return 0

    def cuMemcpyHtoDAsync_v2(self, device, host, size, stream):
        assert self.recording is None
        ctypes.memmove(device, host, size.value)
        return 0

    def cuMemcpyDtoHAsync_v2(self, host, device, size, stream):
        self.down += size.value
        ctypes.memmove(host, device, size.value)
        return 0

    def cuStreamSynchronize(self, stream):
        assert self.recording is None
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        self.recording = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        graph._obj.value = self._handle()
        self.graphs[graph._obj.value], self.recording = self.recording, None
        return 0

    def cuGraphInstantiateWithFlags(self, ready, graph, flags):
        ready._obj.value = self._handle()
        self.graphs[ready._obj.value] = self.graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph):
        del self.graphs[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in self.graphs[graph.value]:
            work()
        return 0


def view(address, shape, dtype):
    """The device memory at an address as an array."""
    count = int(np.prod(shape))
    raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)


def fake_tensorrt(cuda, version="10.3.0"):
    """A module with the part of TensorRT's API that dijiang uses."""
    trt = SimpleNamespace(__version__=version, built=[], timings=[], fails=set())

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
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses = engine, {}, {}
            self.scratch = self.profile = None

        def set_device_memory(self, address, size):
            self.scratch = address

        def set_optimization_profile_async(self, index, stream):
            self.profile = self.engine.profiles[index]
            return True

        def set_input_shape(self, name, shape):
            low, _, high = self.profile[name]
            fits = all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            if fits:
                self.shapes[name] = tuple(shape)
            return fits

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def execute_async_v3(self, stream):
            if "execute" in trt.fails:
                return False
            assert self.scratch in cuda.memory
            shapes, addresses = dict(self.shapes), dict(self.addresses)
            cuda.enqueue(lambda: self.engine.compute(shapes, addresses))
            return True

    class Engine:
        device_memory_size_v2 = 1024

        def __init__(self, data):
            described = json.loads(bytes(data))
            self.profiles = described["profiles"]
            self.num_optimization_profiles = len(self.profiles)
            self.session = onnxruntime.InferenceSession(described["graph"])

        def create_execution_context(self, strategy):
            return None if "context" in trt.fails else Context(self)

        def compute(self, shapes, addresses):
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.float32 if "state" in name else np.int64
                feeds[name] = view(addresses[name], shape, dtype).copy()
            outputs = [o.name for o in self.session.get_outputs()]
            for name, result in zip(outputs, self.session.run(outputs, feeds), strict=True):
                view(addresses[name], result.shape, result.dtype)[...] = result

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
