"""What `fork` starts is a process as any other (see tests/preloaded.py)."""

from __future__ import annotations

import os
import signal

SCRIPT = """
import atexit, os, sys, time

atexit.register(print, "the end")
print(__name__, sys.argv[1:], os.getcwd(), os.environ["OURS"], os.getppid(), flush=True)
print("a line", file=sys.stderr, flush=True)
if sys.argv[1:] == ["waits"]:
    time.sleep(60)
sys.exit(7)
"""


def test_arguments_environment_folder_streams_and_signals(fork, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    line = f"__main__ {{}} {tmp_path} a=b {os.getpid()}\n"
    process = fork(tmp_path / "script.py", "a b", "ü", OURS="a=b")
    printed = process.communicate(timeout=60)
    assert printed == (line.format("['a b', 'ü']") + "the end\n", "a line\n")
    assert process.returncode == 7
    for number, last in ((signal.SIGKILL, ""), (signal.SIGINT, "the end\n")):
        process = fork(tmp_path / "script.py", "waits", OURS="a=b")
        assert process.stdout.readline() == line.format("['waits']")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert out == last and ("KeyboardInterrupt" in err) == bool(last)
        assert process.returncode == -number
