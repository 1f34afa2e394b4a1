"""Scripts in processes of their own that need no imports: they are forked from one that has them.

To import torch, diffusers and lml takes a process four seconds, which is more than most scripts
then work in a test. So one process, this file as a script, imports all that once, and forks for
every script that a test starts. The fork has the arguments, environment, folder and streams that
a new process would have, runs the script as `__main__`, and ends as Python ends. It is a child of
the tests, so that they wait for it and send it signals as usual. Two things are not those of a new
process: what is read from the environment on import (HF_HUB_OFFLINE), and /proc/PID/environ.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PR_SET_CHILD_SUBREAPER = 36  # of Linux: this process becomes the parent of orphans below it


class Server:
    """The process that has imported everything. It ends with this one."""

    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # no terminal, or forks would buffer lines
            )

    def start(self, script: Path, *arguments: str, cwd: Path, env: dict[str, str]) -> Forked:
        """`python script arguments`, whose output is to be read from pipes."""
        return Forked(
            self, [str(script), *arguments], cwd=cwd, env={**os.environ, **ENVIRONMENT, **env},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def stop(self) -> None:
        self.socket.close()
        self.process.wait()


class Forked(subprocess.Popen):
    """A Popen whose process is forked by the server; all else is as ever."""

    def __init__(self, server: Server, *args, **kwargs):
        self.server = server
        super().__init__(*args, **kwargs)

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_,
    ):  # fmt: skip
        request = json.dumps([args, str(cwd), env]).encode()
        socket.send_fds(self.server.socket, [request], [c2pwrite, errwrite])
        self.pid = int(self.server.socket.recv(100))
        self._child_created = True
        os.close(c2pwrite)
        os.close(errwrite)


def wait_for_requests(server: socket.socket) -> list[str]:
    """Fork for every request. Returns in each fork: the script that it is, and its arguments."""
    while True:
        message, streams, _, _ = socket.recv_fds(server, 1 << 20, 2)
        if not message:
            os._exit(0)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            for stream in streams:
                os.close(stream)
            continue
        parent = os.getpid()
        if os.fork():
            os._exit(0)  # so that the tests adopt its child
        while os.getppid() == parent:
            os.sched_yield()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        server.send(str(os.getpid()).encode())
        server.close()
        arguments, folder, environment = json.loads(message)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        paths = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
        sys.path[:1] = [str(Path(arguments[0]).parent), *paths]
        return arguments


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own
    import lml.calibration
    import lml.cli.main
    import lml.metrics
    import lml.report
    import lml.runs.sample
    import lml.runs.tracking
    import lml.training  # noqa: F401

    gc.collect()
    gc.freeze()  # else the first collection of a fork copies all that was imported
    sys.argv = wait_for_requests(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
