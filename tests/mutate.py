"""Breaking our code on purpose: tests of GPU sessions must notice, although no GPU is there.

    python -m tests.mutate          every mutation
    python -m tests.mutate NAME     one of them, with what pytest says

Each runs in a forked child: one method is compiled anew with a piece of its text replaced, then tests run.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import tempfile
import textwrap
from dataclasses import dataclass

import pytest

from dijiang.machine.driver import Cuda
from dijiang.runtime.sessions import device_session, resident, tensorrt
from dijiang.runtime.state import State

TENSORRT, DEVICE = "tests/runtime/test_tensorrt.py", "tests/runtime/test_cuda.py"
#: Tests that run models on them, as pytest's -k has it.
CHOSEN = "turns or anew or thread or only_the_token or a_side or graphs_too"
#: pytest's word for tests that failed; and what a copy into memory that is gone may end in.
CAUGHT = (1, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


@dataclass(frozen=True)
class Mutation:
    """`old`, once in the text of a method, becomes `new`; the tests of `file` must fail."""

    owner: type
    method: str
    old: str
    new: str
    file: str

    def text(self) -> str:
        """The method's text after the mutation.

        Raises:
            AssertionError: The method no longer has `old` once.

        """
        text = textwrap.dedent(inspect.getsource(inspect.getattr_static(self.owner, self.method)))
        assert text.count(self.old) == 1, (self.owner, self.method, text.count(self.old))
        return text.replace(self.old, self.new)

    def apply(self) -> None:
        """Replace the method in this process."""
        module, made = sys.modules[self.owner.__module__], {}
        exec(compile(self.text(), inspect.getfile(self.owner), "exec"), vars(module), made)
        setattr(self.owner, self.method, made[self.method])


def both(name: str, *mutation: object) -> dict[str, Mutation]:
    """A mutation of what both sessions share."""
    return {f"{name}, {file}": Mutation(*mutation, path) for file, path in FILES.items()}


FILES = {"tensorrt": TENSORRT, "device": DEVICE}
TRT, ORT, SLOT = tensorrt.TensorRtSession, device_session.DeviceSession, device_session._Slot
WRITE, GRAPH_KEY = "slot.inputs[name].write(array)", "key = (length, side)"
WAIT = 'self._call("cuStreamSynchronize", stream)'
MUTATIONS = {
    "synchronise does nothing": Mutation(Cuda, "synchronize", WAIT, "pass", TENSORRT),
    "a download is not waited for": Mutation(Cuda, "download", "self.synchronize(stream)", "pass", TENSORRT),
    "a memset is not waited for": Mutation(Cuda, "allocate", "self.synchronize(LEGACY)", "pass", TENSORRT),
    "a download stays in its thread": Mutation(Cuda, "download", "self.activate()", "pass", TENSORRT),
    "a step stays in its thread": Mutation(TRT, "_run", "self.cuda.activate()", "pass", TENSORRT),
    "the token is not copied": Mutation(TRT, "_run", WRITE, f'name == "input_ids" or {WRITE}', TENSORRT),
    "the position is not copied": Mutation(TRT, "_run", WRITE, f'name == "position_ids" or {WRITE}', TENSORRT),
    "no swap is committed": Mutation(TRT, "_run", "swap=True", "swap=False", TENSORRT),
    "nothing runs before a capture": Mutation(
        TRT,
        "_replay",
        "self._enqueue(slot, context, *shapes, side)\n        self.cuda.synchronize",
        "self.cuda.synchronize",
        TENSORRT,
    ),
    "a step waits inside of a capture": Mutation(
        TRT,
        "_replay",
        "shapes, side)\n        slot",
        "shapes, side)\n            self.cuda.synchronize(self.stream)\n        slot",
        TENSORRT,
    ),
    "one graph for both sides": Mutation(TRT, "_replay", GRAPH_KEY, "key = (length, 0)", TENSORRT),
    "one graph for all lengths": Mutation(TRT, "_replay", GRAPH_KEY, "key = (1, side)", TENSORRT),
    "destroyed graphs are launched": Mutation(
        tensorrt._Slot, "require_outputs", "self.graphs.clear()", "pass", TENSORRT
    ),
    "graphs are kept when results move": Mutation(
        tensorrt._Slot,
        "require_outputs",
        "self._session.cuda.destroy(graph)\n        self.graphs.clear()",
        "pass",
        TENSORRT,
    ),
    "results do not move when they must": Mutation(
        tensorrt._Slot, "require_outputs", "old.nbytes >= nbytes", "old.nbytes", TENSORRT
    ),
    "the tokens are not copied to the device": Mutation(
        ORT,
        "_run",
        "buffer.update(np.ascontiguousarray(array, np.int64))",
        "array is step.ids or buffer.update(np.ascontiguousarray(array, np.int64))",
        DEVICE,
    ),
    "what was fed is believed to be there": Mutation(ORT, "_run", "binding.tokens.known = None", "pass", DEVICE),
    "no swap is committed on the device": Mutation(ORT, "_run", "swap=True", "swap=False", DEVICE),
    "one binding for both sides": Mutation(
        SLOT, "binding", "key = (shape, kept, side)", "key = (shape, kept, 0)", DEVICE
    ),
    "one binding for all shapes": Mutation(
        SLOT, "binding", "key = (shape, kept, side)", "key = ((1, 1), kept, side)", DEVICE
    ),
    "one graph id for all bindings": Mutation(ORT, "new_graph", "self._graphs += 1", "self._graphs = 1", DEVICE),
    **both("past is the wrong side", resident.Resident, "past", "[side]", "[1 - side]"),
    **both("present is the wrong side", resident.Resident, "present", "[1 - side]", "[side]"),
    **both("a taken state is not copied", resident.Resident, "take", "buffer.write(array)", "pass"),
    **both("the owner before is forgotten", resident.Resident, "take", "owner.bring_home()", "pass"),
    **both("a state stays away", resident.Resident, "give_back", "buffer.read(array)", "pass"),
    **both("the wrong side comes home", resident.Resident, "give_back", "[side]", "[1 - side]"),
    **both("a state is not brought home", State, "bring_home", "is not None", "is None"),
    **both("a lent state keeps its side", State, "lend", "side=0", "side=self.point.side"),
}


def start(mutation: Mutation | None, file: str, shown: bool) -> int:
    """The process of a child that applies a mutation and runs the tests."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        if not shown:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        if mutation is not None:
            mutation.apply()
        status = 1  # pytest raises what finalizers raised
        with tempfile.TemporaryDirectory() as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/t", "-k", CHOSEN, file]
            status = int(pytest.main(options))
    finally:
        os._exit(status)


def statuses(runs: dict[str, tuple[Mutation | None, str]]) -> dict[str, int]:
    """What pytest says of each: 0 passed, 1 failed. As many at once as there are cores to use."""
    waiting, running, found = list(runs), {}, dict.fromkeys(runs, 99)
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            name = waiting.pop(0)
            running[start(*runs[name], shown=False)] = name
        pid, status = os.wait()
        found[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    return found


def main() -> None:
    """Print what each mutation, and none, makes of the tests; exit 1 if one goes unnoticed."""
    if sys.argv[1:]:
        mutation = MUTATIONS[sys.argv[1]]
        status = os.waitpid(start(mutation, mutation.file, shown=True), 0)[1]
        raise SystemExit(os.waitstatus_to_exitcode(status) not in CAUGHT)
    sound = statuses({f"none, {name}": (None, file) for name, file in FILES.items()})
    broken = statuses({name: (mutation, mutation.file) for name, mutation in MUTATIONS.items()})
    print(json.dumps(sound | broken, indent=1))
    raise SystemExit(any(sound.values()) or not all(status in CAUGHT for status in broken.values()))


if __name__ == "__main__":
    main()
