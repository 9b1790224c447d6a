"""Programs that begin where torch has been imported and nothing else: seconds for each of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# Forks before anything but torch is imported and before torch has a second thread. ``PYTHON...``
# variables, which an interpreter reads as it starts, have no effect on what is forked.
_PARENT = """
import json, os, signal, sys, traceback
import torch

def child(asked):
    signal.alarm(300)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, asked["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), number)
    os.chdir(asked["cwd"])
    os.environ.update(asked["env"])
    sys.path[1:1] = asked["path"]
    sys.stdin = open(0, closefd=False)
    code = 1
    try:
        exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as left:
        code = left.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))

for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        child(asked)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class TorchProcess:
    """What ``python -c`` would do, after ``import torch``."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(
        self, program: str, cwd: str | Path, path: Sequence[str] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Ends it after five minutes. ``path``: more folders to import from."""
        out, err = self._folder / "out", self._folder / "err"
        asked = dict(program=program, cwd=str(cwd), path=list(path), env=env)
        asked |= dict(out=str(out), err=str(err))
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        code = self._process.stdout.readline()
        assert code, "the process that forks has ended"
        return subprocess.CompletedProcess(
            ["python", "-c", program], int(code), out.read_text(), err.read_text()
        )


@contextmanager
def torch_process() -> Iterator[TorchProcess]:
    pipe = subprocess.PIPE
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", _PARENT], stdin=pipe, stdout=pipe, text=True, cwd=folder
        )
        with process:
            try:
                yield TorchProcess(process, Path(folder))
            finally:
                process.kill()
