"""Ray's workers as forks of one process that has imported the libraries, which is most of what a worker takes.

Ray starts a worker as ``PYTHON default_worker.py ...``. `forked_workers` gives it a program in place of Python that
hands those words, its environment and its files to a server, and ends as the worker does; anything else it leaves to
Python. The server imports libraries alone and none of our packages: each worker imports those itself, from where Ray's
runtime environment has put them. A worker's hash seed and its parent process are all that tell it from a started one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from forks import end_with, import_ray

#: What workers of some stage import, and takes a second or more.
LIBRARIES = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "trl.trainer.sft_trainer",
    "datasets",
    "sklearn.linear_model",
    "pandas",
    "pyarrow.parquet",
)
#: Ray reads its settings from the environment when it is imported, so that has to be a worker's.
RAY = ("ray.data", "ray.train.torch", "ray.train.v2.api.config")
#: Scripts of Ray's that end in a worker; the first of them where there is a runtime environment.
SETUP, WORKER = "setup_worker.py", "default_worker.py"

#: In place of Python; without site-packages, so that it starts at once.
_PROGRAM = """#!{python} -IS
import json, os, socket, sys
words = [word for word in sys.argv[1:] if word != "-u"]
if os.path.basename(words[0]) not in ("{setup}", "{worker}"):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    socket.send_fds(server, [b"f"], [0, 1, 2])
    request = {{"words": words, "environment": dict(os.environ), "folder": os.getcwd()}}
    server.sendall(json.dumps(request).encode() + b"\\n")
    sys.exit(int(server.makefile().readline() or 1))
"""


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """The Ray that is started in the block forks its workers until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ka2l-test-") as folder:  # a socket's path must be short
        address, program = Path(folder) / "workers", Path(folder) / "python"
        program.write_text(
            _PROGRAM.format(python=sys.executable, address=address, setup=SETUP, worker=WORKER), encoding="utf-8"
        )
        program.chmod(0o755)
        # Ray gives a worker as many threads as it holds cores, which are one for most.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(64)
            number = listener.fileno()
            command = [sys.executable, __file__, str(number)]
            server = subprocess.Popen(command, env=environment, pass_fds=[number], start_new_session=True)
        with server:
            try:
                with mock.patch.object(sys, "executable", str(program)):
                    yield
            finally:
                server.kill()


def serve(listener: socket.socket) -> None:
    """Fork a worker for each request, and tell who asked how it ended."""
    for name in LIBRARIES:
        importlib.import_module(name)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    pid = _fork(connection, listener)
                    # No thread waits for a worker, since a fork must find no thread at work.
                    worker = pid, os.pidfd_open(pid), connection
                    for source in worker[1:]:
                        selector.register(source, selectors.EVENT_READ, worker)
                elif key.data[-1].fileno() >= 0:  # else it has been told
                    pid, watch, connection = key.data
                    if key.fileobj is connection:  # who asked has been killed
                        os.kill(pid, signal.SIGKILL)
                    for source in (watch, connection):
                        selector.unregister(source)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with contextlib.suppress(OSError):
                        connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
                    connection.close()
                    os.close(watch)


def _fork(connection: socket.socket, listener: socket.socket) -> int:
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        request = json.loads(lines.readline())
    if "ray" not in sys.modules:
        os.environ.update(request["environment"])
        import_ray(RAY)
        gc.freeze()  # no worker needs to look through what all of them share
    pid = os.fork()
    if pid == 0:
        listener.close()
        connection.close()
        _become_worker(request, files)
    for file in files:
        os.close(file)
    return pid


def _become_worker(request: dict[str, Any], files: list[int]) -> NoReturn:
    def work() -> None:
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        words = request["words"]
        if Path(words[0]).name == SETUP:
            words = _set_up(words[1:])
        sys.argv = words
        sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        runpy.run_path(words[0], run_name="__main__")

    end_with(work, exit_functions=False)


def _set_up(words: list[str]) -> list[str]:
    """What Ray's setup_worker.py does before it becomes the worker; returns the worker's words."""
    import argparse

    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    options, left = parser.parse_known_args(words)
    context = RuntimeEnvContext.deserialize(options.serialized_runtime_env_context)
    assert not context.command_prefix, context.command_prefix
    update_envs(context.env_vars)
    return left


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
