"""Measurements on disk: JSON in the folder of compiled programs, one file for each device, partition mode and driver.

A device is one chip, not one product: which units are near which memory differs from chip to chip, so its UUID is a
part of the file's name, and a folder may be shared by several machines.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from jax_monokernel._version import __version__
from jax_monokernel.topology.measurement import Measurement

VERSION = 1


def cache_dir() -> Path | None:
    """The folder: MONOKERNEL_CACHE_DIR, else below XDG_CACHE_HOME or HOME, as of compiled programs (docs/gpu.md)."""
    if own := os.environ.get("MONOKERNEL_CACHE_DIR"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "jax_monokernel"
    if home := os.environ.get("HOME"):
        return Path(home) / ".cache" / "jax_monokernel"
    return None


def path_of(name: str, units: int, driver_version: int, device_id: str = "", mode: str = "") -> Path | None:
    """The file for a device and driver."""
    folder = cache_dir()
    parts = (name or "device", units, mode, driver_version, device_id)
    plain = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", str(part)).strip("-").lower() for part in parts if part != "")
    return None if folder is None else folder / f"topology-{plain}.json"


def save(found: Measurement) -> Path | None:
    """Writes a measurement. None if there is no folder that can be written."""
    path = path_of(found.name, len(found.places), found.driver_version, found.device_id, found.mode)
    if path is None:
        return None
    return write(path, {"version": VERSION, "measurement": found.to_json()})


def write(path: Path, data: Any) -> Path | None:
    """Writes JSON aside and renames it. None if that cannot be."""
    try:
        _write(path, data)
    except OSError:
        return None
    return path


def _write(path: Path, data: Any) -> None:
    text = json.dumps(data).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".topology-", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _text(path: Path) -> bytes:
    text = path.read_bytes()
    return gzip.decompress(text) if path.suffix == ".gz" else text


def check_record_name(path: Path) -> None:
    """Raises ValueError for what cannot be the name of a record, before anything is measured."""
    if not path.name.endswith((".json", ".json.gz")):
        raise ValueError(f"{path} is no name for a measurement; expected one that ends with .json or .json.gz")


def record(path: Path, found: Measurement) -> None:
    """Writes a measurement to a file of its own, for `recorded`: .json, or .json.gz.

    Raises:
      ValueError: a name with another ending.
      OSError: it could not be written.
    """
    check_record_name(path)
    # Which chip it was is nobody's business who reads the file.
    _write(path, {"version": VERSION, "package": __version__, "measurement": found.to_json() | {"device_id": ""}})


def recorded(path: Path) -> Measurement:
    """A measurement that `record` wrote.

    Raises:
      OSError: it could not be read.
      ValueError: it is no measurement, or one of another version of the package.
    """
    try:
        data = json.loads(_text(path))
        version, measurement = data["version"], data["measurement"]
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is no measurement of a topology: expected what topology --output wrote") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, and this package reads version {VERSION}: measure again")
    return Measurement.from_json(measurement)


def read(path: Path) -> Any:
    """What `write` wrote with this version; None if there is none, or it is damaged."""
    try:
        data = json.loads(_text(path))
        return data if data["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load(name: str, units: int, driver_version: int, device_id: str = "", mode: str = "") -> Measurement | None:
    """The measurement of a device with a driver, or None: there is none, or it is damaged or of another version."""
    path = path_of(name, units, driver_version, device_id, mode)
    if path is None:
        return None
    data = read(path)
    try:
        return None if data is None else Measurement.from_json(data["measurement"])
    except (ValueError, KeyError, TypeError):
        return None
