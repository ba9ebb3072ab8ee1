"""Whatever a child starts, and however it hides, is gone after `stop`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

# Starts a child that leaves a stubborn daemon behind (own session, parent dead, deaf to SIGTERM), then stops it all.
SCRIPT = """
import sys, time
from pathlib import Path
from qwen_ray.commands import process_tree

pid_file, child_lives = Path(sys.argv[1]), sys.argv[2] == "lives"
daemon = f"trap '' TERM INT; echo $$ > {pid_file}; while true; do sleep 1; done"
script = f'setsid bash -c "{daemon.replace("$", chr(92) + "$")}" >/dev/null 2>&1 & '
script += "sleep 60" if child_lives else "while [ ! -s %s ]; do sleep 0.01; done" % pid_file
child = process_tree.start(["bash", "-c", script], {"FROM": "test"}, None)
while not pid_file.exists() or not pid_file.read_text():
    time.sleep(0.01)
if not child_lives:
    child.wait()
assert int(pid_file.read_text()) in process_tree.descendants()
process_tree.stop(child, seconds=0.2)
assert process_tree.descendants() == set()
"""


@pytest.mark.parametrize("state", ["lives", "has ended"])
def test_stop_leaves_nothing(tmp_path: Path, state: str) -> None:
    pid_file = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", SCRIPT, str(pid_file), state], check=True, timeout=30)
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


def test_the_environment_comes_on_top(tmp_path: Path) -> None:
    script = (
        "from qwen_ray.commands import process_tree; import sys\n"
        "child = process_tree.start(['sh', '-c', 'echo $GIVEN $PWD'], {'GIVEN': 'a b'}, None)\n"
        "print(child.stdout.read().decode()); process_tree.stop(child, seconds=5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=30, cwd=tmp_path, capture_output=True)
    assert done.stdout.decode().strip() == f"a b {tmp_path}"


def test_a_child_that_ends_when_asked_is_not_killed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = (
        "from qwen_ray.commands import process_tree; import time\n"
        f"child = process_tree.start(['bash', '-c', \"trap 'sleep 0.2; echo done > {mark}; exit' TERM; "
        f'echo up > {mark}; while true; do sleep 0.05; done"], {{}}, None)\n'
        f"while not __import__('pathlib').Path('{mark}').exists(): time.sleep(0.01)\n"
        "process_tree.stop(child, seconds=10)\n"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert mark.read_text() == "done\n"
    assert time.monotonic() - started < 10
