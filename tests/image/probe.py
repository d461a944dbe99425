"""Runs inside the image, without anything but what the image has, and prints what it found as JSON."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import botocore
import botocore.session

HOME = Path(sys.prefix)
PLACES = ("/", "/tmp", "/var/tmp", "/var/lib/falco-forwarder", "/opt/falco-forwarder", "/root")  # noqa: S108
"""Where a root that may be written would show."""
IMPORTED = """
import sys, forwarder.app
print(*(file for module in sys.modules.values() if (file := getattr(module, "__file__", None)) and file.endswith(".py")))
"""


def main() -> None:
    files = [path for path in HOME.rglob("*") if path.is_file() and not path.is_symlink()]
    modules = [path for path in files if path.suffix == ".py" and path.is_relative_to(HOME / "lib")]
    data = Path(botocore.__file__).parent / "data"
    services = sorted(path.name for path in data.iterdir() if path.is_dir())
    json.dump(
        {
            "user": [os.getuid(), os.getgid(), os.getgroups()],
            "python": sys.version.split()[0],
            "path": sys.path,
            "writable": [place for place in PLACES if _writable(Path(place))],
            "loose": [str(path) for path in HOME.rglob("*") if _loose(path)],
            "without_bytecode": [str(path) for path in modules if not _compiled(path)],
            "bytes": sum(path.stat().st_size for path in files),
            "bytecode_bytes": sum(path.stat().st_size for path in files if path.suffix == ".pyc"),
            "botocore_data_bytes": sum(path.stat().st_size for path in data.rglob("*") if path.is_file()),
            "distributions": {item.name: item.version for item in metadata.distributions(path=_packages())},
            "pip": util.find_spec("pip") is not None,
            "authorities": ssl.create_default_context().cert_store_stats()["x509_ca"],
            "services": services,
            "clients": [name for name in services if _client(name)],
            "library_without_bytecode": [str(path) for path in _library() if not _compiled(path)],
        },
        sys.stdout,
    )


def _packages() -> list[str]:
    return [path for path in sys.path if path.startswith(str(HOME))]


def _library() -> list[Path]:
    """What the service imports of the standard library; asked of another process, as this one imports more."""
    said = subprocess.check_output([sys.executable, "-c", IMPORTED], text=True)
    return [path for path in map(Path, said.split()) if not path.is_relative_to(HOME)]


def _writable(place: Path) -> bool:
    try:
        with (place / "probe").open("x"):
            pass
        (place / "probe").unlink()
    except OSError:
        return False
    return True


def _loose(path: Path) -> bool:
    """Of another owner than root, or to be written by others, or raising privileges."""
    found = path.lstat()
    bits = stat.S_IWGRP | stat.S_IWOTH | stat.S_ISUID | stat.S_ISGID
    return found.st_uid != 0 or (not path.is_symlink() and bool(found.st_mode & bits))


def _compiled(path: Path) -> bool:
    """Whether there is bytecode that is taken without a look at the source (PEP 552)."""
    file = Path(util.cache_from_source(str(path)))
    return file.exists() and file.read_bytes()[4] == 1


def _client(name: str) -> Any:
    session = botocore.session.get_session()
    return session.create_client(name, "eu-west-1", aws_access_key_id="a", aws_secret_access_key="b")


main()
