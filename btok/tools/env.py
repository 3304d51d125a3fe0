"""What a bug report needs to know of a machine: `python -m btok env`.

Versions, devices, extras, and what "auto" would take here. Quick: no model is loaded and no kernel
runs. Safe to show: a home folder is ~, a user's name is left out, and so is what is secret.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from packaging.requirements import Requirement

import btok
from btok import label_loss
from btok.files import one_line, printable
from btok_kernels import condensed_attention, contrastive_loss, late_interaction
from btok_kernels.launch import Reasons, first_to_run

CORE = ""  # the name of what is needed without any extra
HEAD_DIM = 128  # of the tensors that implementations are asked about
SHOWN = re.compile(  # how the names of variables begin
    "(BTOK|TRITON|PYTORCH|CUDA|CUBLAS|NCCL|GLOO|HF|TRANSFORMERS|TOKENIZERS|OMP|MKL|OPENBLAS|RAY"
    "|VLLM|LANCE)_|TORCH|(LOCAL_)?(WORLD_SIZE|RANK)"
)
SECRET = re.compile("TOKEN(?!IZER)|KEY|SECRET|PASSW|AUTH|CREDENTIAL")  # in a variable's name
SMI = "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"


@dataclass(frozen=True)
class Env:
    """Say what a bug report needs of this machine: versions, devices, what "auto" takes.

    Args:
        as_json: as JSON, for programs.
    """

    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False


def describe_machine(command: Env) -> str:
    """The text that `python -m btok env` prints: Markdown to paste into an issue, or JSON."""
    found = gather()
    return json.dumps(found, indent=2) if command.as_json else as_markdown(found)


def gather() -> dict[str, Any]:
    """All that is known of this machine, as JSON has it; None stands for what cannot be known.

    Returns:
        "btok" (version, commit, place), "python", "platform", "cpu", "cuda" (of torch, with the
        driver and why no device is seen), "gpus", "packages" and "extras" (by name: versions,
        missing), "implementations" (by operation: what "auto" takes, and why not others),
        "environment".
    """
    root = Path(btok.__file__).resolve().parent.parent
    wanted = requirements(root)
    extras = {name: extra(wanted, name) for name in wanted if name != CORE}
    return {
        "btok": {"version": btok.__version__, "place": shown(root), **commit(root)},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": cpu(),
        "cuda": cuda(),
        "gpus": gpus(),
        "packages": extra(wanted, CORE),
        "extras": dict(sorted(extras.items())),
        "implementations": implementations(),
        "environment": environment(os.environ),
    }


def commit(root: Path) -> dict[str, Any]:
    """The commit that runs: a checkout's, or the one that pip installed from."""
    if not (root / ".git").exists():
        try:
            told = metadata.distribution("btok").read_text("direct_url.json")
        except metadata.PackageNotFoundError:
            told = None
        known = json.loads(told or "{}").get("vcs_info", {}).get("commit_id")
        return {"commit": known, "why": None if known else "no checkout"}
    git = "git", "-C", str(root)
    try:
        head = _said_by(*git, "rev-parse", "HEAD")
        changed = _said_by(*git, "status", "--porcelain", "--untracked-files=no")
    except RuntimeError as error:
        return {"commit": None, "why": shown(error)}
    return {"commit": head, "changed": bool(changed)}


def _said_by(*command: str) -> str:
    """The output of a program; a RuntimeError tells why it gave none."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = "is not installed" if isinstance(error, FileNotFoundError) else one_line(error)
        raise RuntimeError(f"{command[0]} {why}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {one_line(done.stderr or done.stdout)[:200]}")
    return done.stdout.strip()


def cpu() -> dict[str, Any]:
    """Model, cores, torch's threads, and GiB of memory."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        (model,) = re.findall(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)[:1]
    except (OSError, ValueError):  # no Linux, or a processor that has no such line
        model = platform.processor() or platform.machine() or None
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):  # as on Windows
        memory = None
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30
    except (OSError, ValueError):  # no container, or "max"
        most = None
    shared = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").is_dir() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    sizes = {"memory_gib": memory, "memory_limit_gib": most, "shared_memory_gib": shared}
    return {
        "model": model,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        **{name: size and round(size, 1) for name, size in sizes.items()},
    }


def cuda() -> dict[str, Any]:
    """What torch is built for, the driver, and why torch sees no device; what the driver lists."""
    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "torch_hip": torch.version.hip}
    why = None
    if torch.version.cuda is None and torch.version.hip is None:
        why = "torch is built for the CPU alone"
    elif not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why = "torch.cuda.is_available() is False"
        except (RuntimeError, AssertionError) as error:
            why = shown(one_line(error)[:200])
    try:
        listed = [line.rpartition(", ") for line in _said_by(*SMI).splitlines()]
    except RuntimeError as error:
        listed = []
        found["nvidia_smi"] = shown(error)
    return found | {
        "cudnn": torch.backends.cudnn.version() if why is None else None,
        "driver": listed[0][2] if listed else None,
        "driver_lists": [name for name, _, _ in listed],
        "why": why,
    }


def gpus() -> list[dict[str, Any]]:
    """The devices that torch sees."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        memory = round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1)
        name = torch.cuda.get_device_name(i)
        found.append({"name": name, "capability": f"sm_{major}{minor}", "memory_gib": memory})
    return found


def requirements(root: Path) -> dict[str, list[Requirement]]:
    """What btok needs, by extra, `CORE` among them: a checkout's pyproject.toml says, else what pip
    installed; nothing where neither is there.
    """
    try:
        told = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        told = {}
    if told.get("name") == "btok":
        wanted = {CORE: told["dependencies"], **told["optional-dependencies"]}
        return {name: list(map(Requirement, lines)) for name, lines in wanted.items()}
    try:
        installed = metadata.distribution("btok")
    except metadata.PackageNotFoundError:
        return {}
    lines = [Requirement(line) for line in installed.requires or ()]
    names = [CORE, *(installed.metadata.get_all("Provides-Extra") or ())]

    def belongs(line: Requirement, name: str) -> bool:
        if line.marker is None:
            return name == CORE
        alone = line.marker.evaluate({"extra": CORE})  # it holds without the extra too
        return alone if name == CORE else line.marker.evaluate({"extra": name}) and not alone

    return {name: [line for line in lines if belongs(line, name)] for name in names}


def extra(wanted: Mapping[str, Sequence[Requirement]], name: str) -> dict[str, Any]:
    """The versions that are installed of what an extra needs, and what it lacks."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    for line in wanted.get(name, ()):
        if line.marker is not None and not line.marker.evaluate({"extra": name}):
            continue  # of another system
        if line.name == "btok":
            for other in sorted(line.extras):
                inner = extra(wanted, other)
                versions |= inner["versions"]
                missing += [x for x in inner["missing"] if x not in missing]
            continue
        try:
            versions[line.name] = had = metadata.version(line.name)
            fits = line.specifier.contains(had, prereleases=True)
        except metadata.PackageNotFoundError:
            missing.append(f"{line.name}{line.specifier}")
        else:
            missing += [] if fits else [f"{line.name}{line.specifier}, has {had}"]
    return {"versions": versions, "missing": missing}


def implementations() -> dict[str, Any]:
    """The implementation that "auto" takes on the first device, by operation, and why none of the
    others.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(1, 1, HEAD_DIM, dtype=dtype, device=device)
    rows, head = q[0], torch.nn.Linear(HEAD_DIM, 1, device="meta")
    asked: dict[str, tuple[Reasons, tuple[str, ...]]] = {
        "condensed_attention": condensed_attention.implementations(q, q, q),
        "contrastive_loss": contrastive_loss.implementations(contrastive_loss.Call(rows, rows)),
        "maxsim": late_interaction.implementations(q),
        "the generative loss": label_loss.implementations(head, rows),
    }
    found: dict[str, Any] = {}
    for name, (reasons, order) in asked.items():
        taken, _ = first_to_run(reasons, order)
        why_not = {n: why for n, reason in reasons.items() if n != taken and (why := reason())}
        left = [n for n in reasons if n != taken and n not in why_not]
        on = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
        found[name] = {"auto": taken, **on, "also": left, "why_not": why_not}
    return found


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that change what runs; secrets by name alone, home and user's name left out."""
    found = {}
    for name, value in sorted(variables.items()):
        if SHOWN.match(name):
            hidden = SECRET.search(name.upper())
            found[name] = "(set, not shown)" if hidden else shown(value)
    return found


def shown(said: object) -> str:
    """A path or a value on one line, without the user's home and name, or a name in an address."""
    text = str(said)
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    user = Path(home).name
    if len(user) > 2:
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "(user)", text)
    return printable(re.sub(r"//[^/@\s]+@", "//", text))


def as_markdown(found: Mapping[str, Any]) -> str:
    """The findings of `gather` as Markdown lists that read as plain text too."""
    own, machine, torchs = found["btok"], found["cpu"], found["cuda"]
    said = own["commit"] or f"unknown ({own['why']})"
    said += ", with changes" if own.get("changed") else ""
    sizes = [("memory_gib", "memory"), ("memory_limit_gib", "limit"), ("shared_memory_gib", "shm")]
    told = ", ".join(f"{machine[key]} GiB {name}" for key, name in sizes if machine[key])
    cores = f"{machine['usable_cores'] or machine['cores']} of {machine['cores']} cores"
    lines = [
        "### btok env",
        f"- btok {own['version']}, commit {said}, in {own['place']}",
        f"- Python {found['python']}, {found['platform']}",
        f"- CPU: {machine['model']}, {cores}, {machine['torch_threads']} torch threads, {told}",
        *_of_gpus(found["gpus"], torchs),
        f"- packages: {_packages(found['packages'])}",
        "",
        "Implementations",
        *(_taken(name, taken) for name, taken in found["implementations"].items()),
        "",
        "Extras",
        *(f"- {name}: {_packages(has)}" for name, has in found["extras"].items()),
        "",
        "Environment",
        *(f"- {name}={value}" for name, value in found["environment"].items()),
    ]
    return "\n".join(lines)


def _of_gpus(devices: Sequence[Mapping[str, Any]], torchs: Mapping[str, Any]) -> list[str]:
    built = f"CUDA {torchs['torch_cuda']}" if torchs["torch_cuda"] else "no CUDA"
    built = f"ROCm {torchs['torch_hip']}" if torchs["torch_hip"] else built
    said = f"- torch's build: {built}, driver {torchs['driver'] or torchs.get('nvidia_smi')}"
    said += f", cuDNN {torchs['cudnn']}" if torchs["cudnn"] else ""
    lines = [
        f"- GPU {i}: {gpu['name']}, {gpu['capability']}, {gpu['memory_gib']} GiB"
        for i, gpu in enumerate(devices)
    ]
    if torchs["why"]:
        listed = ", ".join(torchs["driver_lists"])
        there = f"; the driver lists {listed}" if listed else ""
        lines = [f"- GPU: none that torch sees ({torchs['why']}){there}"]
    return [said, *lines]


def _packages(has: Mapping[str, Any]) -> str:
    there = ", ".join(f"{name} {version}" for name, version in has["versions"].items())
    lacks = "; ".join(has["missing"])
    return there + (f"{' ' * bool(there)}(missing: {lacks})" if lacks else "")


def _taken(name: str, taken: Mapping[str, Any]) -> str:
    why = "".join(f"; not {n}: {reason}" for n, reason in taken["why_not"].items())
    also = f"; can run too: {', '.join(taken['also'])}" if taken["also"] else ""
    said = f"- {name} on {taken['device']}, {taken['dtype']}, D {HEAD_DIM}: auto takes"
    return f"{said} {taken['auto']}{also}{why}"
