"""The one thing that pyproject.toml cannot say: how the operator of the native dialect is compiled."""

from setuptools import Extension, setup

FOLDER = "dijiang/runtime/native"
#: Loops become vector code; no errno and no traps, but infinities and NaN as they are.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]

setup(
    ext_modules=[
        Extension(
            "dijiang.runtime.native._step",
            sources=[f"{FOLDER}/operator.cc", f"{FOLDER}/step.cc"],
            depends=[f"{FOLDER}/onnxruntime_abi.h", f"{FOLDER}/step.h"],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,  # without a compiler only the native dialect is lost
        )
    ]
)
