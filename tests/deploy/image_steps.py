"""A Dockerfile's steps, one after the other, in Debian roots of their own: what Docker would do, without Docker.

    sudo python tests/deploy/image_steps.py deploy/Dockerfile FOLDER        FOLDER: outside of /tmp, 10 GB

ARGs are taken from the environment, such as TORCH_INDEX of a machine with wheels of its own.

Makes one root with debootstrap (apt-get install debootstrap), copies it for each stage, runs RUN with chroot and copies
for COPY; then starts CMD as its USER, asks it for an answer and ends it. Knows the instructions that our files use and
refuses others. What pip is told on this machine (its configuration, and local folders of it) is told inside too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RELEASE = "bookworm"
START_SECONDS = 900
PORT = 8000
# Of this machine, for pip and apt inside.
BOUND = [folder for folder in ("/opt/wheels", "/opt/pypi", "/opt/pypi-more") if Path(folder).is_dir()]
LENT = ["/etc/resolv.conf", "/etc/pip.conf", "/root/.config/pip/pip.conf"]
# A proxy's certificate may be among them; the place inside is one that no package writes to.
CERTIFICATES, CERTIFICATES_INSIDE = "/etc/ssl/certs/ca-certificates.crt", "/run/certificates.crt"
PASSED = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass
class Stage:
    root: Path
    folder: str = "/"
    user: str | None = None
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    command: list[str] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name.upper(), rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in joined)]


class Image:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stages: dict[str, Stage] = {}
        self.stage = Stage(root=folder)

    def from_(self, rest: str) -> None:
        _, _, name = rest.partition(" AS ")
        name = name or "final"
        base = self._folder / "base"
        if not (base / "etc" / "debian_version").exists():
            run(["debootstrap", "--variant=minbase", RELEASE, str(base)])
        root = self._folder / name
        shutil.rmtree(root, ignore_errors=True)
        run(["cp", "-a", str(base), str(root)])
        self.stage = self._stages[name] = Stage(root=root)
        for file in LENT:
            if Path(file).exists():
                target = root / file[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                run(["cp", "-rL", file, str(target.parent)])

    def shell(self, rest: str) -> None:
        assert json.loads(rest)[:1] == ["/bin/bash"], rest

    def arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.stage.environment[name] = os.environ.get(name, value)

    def env(self, rest: str) -> None:
        for name, value in re.findall(r"(\w+)=(\S+)", rest):
            self.stage.environment[name] = value.replace("$PATH", self.stage.environment["PATH"])

    def workdir(self, rest: str) -> None:
        self.stage.folder = rest
        (self.stage.root / rest[1:]).mkdir(parents=True, exist_ok=True)

    def copy(self, rest: str) -> None:
        *sources, target = rest.split()
        origin = ROOT
        if sources[0].startswith("--from="):
            origin = self._stages[sources.pop(0).removeprefix("--from=")].root
        place = self.stage.root / os.path.join(self.stage.folder, target)[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        for source in sources:
            found = origin / source.lstrip("/")
            if found.is_dir():
                run(["cp", "-a", f"{found}/.", str(place)]) if place.is_dir() else run(
                    ["cp", "-a", str(found), str(place)]
                )
            else:
                run(["cp", "-a", str(found), str(place)])
        built = self.stage.root / "src/qwen_ray/kernels/cpu/built"  # .dockerignore
        shutil.rmtree(built, ignore_errors=True)

    def user(self, rest: str) -> None:
        self.stage.user = rest

    def expose(self, rest: str) -> None:
        assert int(rest) == PORT

    def cmd(self, rest: str) -> None:
        self.stage.command = json.loads(rest)

    def run(self, rest: str) -> None:
        run(self.inside(["/bin/bash", "-euo", "pipefail", "-c", rest]))

    def inside(self, command: list[str]) -> list[str]:
        """In a mount namespace of its own, whose mounts end with it."""
        stage = self.stage
        mounts = [f"mount -t proc proc {stage.root}/proc", f"mount --rbind /dev {stage.root}/dev"]
        for folder in BOUND:
            mounts.append(f"mkdir -p {stage.root}{folder} && mount --bind {folder} {stage.root}{folder}")
        trusted: dict[str, str] = {}
        if Path(CERTIFICATES).exists():
            inside = f"{stage.root}{CERTIFICATES_INSIDE}"
            mounts.append(f"touch {inside} && mount --bind {CERTIFICATES} {inside}")
            trusted = dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), CERTIFICATES_INSIDE)
        passed = {name: value for name, value in os.environ.items() if name in PASSED or name.startswith("PIP_")}
        home = {"HOME": "/home/ray" if stage.user else "/root"}
        variables = [f"{name}={value}" for name, value in {**passed, **home, **trusted, **stage.environment}.items()]
        who = [f"--userspec={stage.user}:{stage.user}"] if stage.user else []
        enter = ["chroot", *who, str(stage.root), "/usr/bin/env", "-i", *variables]
        go = ["/bin/bash", "-c", f'cd {stage.folder}; exec "$0" "$@"', *command]
        script = " && ".join(mounts) + ' && exec "$0" "$@"'
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/bash", "-c", script, *enter, *go]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def answer(image: Image) -> str:
    """Starts CMD, waits until it is ready, asks for a completion, and ends it."""
    process = subprocess.Popen(image.inside(image.stage.command), start_new_session=True)
    url = f"http://127.0.0.1:{PORT}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(url):
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline, "it is not ready"
            time.sleep(2)
        body = json.dumps({"model": "demo", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0})
        asked = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as response:
            return json.load(response)["choices"][0]["text"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def main(dockerfile: str, folder: str) -> None:
    image = Image(Path(folder).absolute())
    for name, rest in instructions((ROOT / dockerfile).read_text(encoding="utf-8")):
        began = time.monotonic()
        getattr(image, {"FROM": "from_"}.get(name, name.lower()))(rest)
        sys.stdout.write(f"{name} {rest[:100]} ({time.monotonic() - began:.1f} s)\n")
        sys.stdout.flush()
    sys.stdout.write(f"answered: {answer(image)!r}\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
