"""Figures that are kept between starts, each under everything that it depends on."""

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from longctx.engine_info import Measured
from longctx.model.spec import ModelSpec
from longctx.version import __version__


def identity_of(spec: ModelSpec) -> tuple[str, ...]:
    """What of a model and of this program figures depend on."""
    return (
        __version__,
        spec.fingerprint,
        spec.rope_identity,
        str(spec.dtype),
        spec.device.type,
    )


class MeasurementCache:
    """One file in a folder of figures; without a folder nothing is remembered."""

    def __init__(self, cache_dir: Path | None, identity: tuple[object, ...]) -> None:
        """`identity`: its `repr` says everything; another one is another file."""
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._path = None if cache_dir is None else cache_dir / "quality" / f"{digest}.json"

    def load(self) -> Measured | None:
        try:
            if self._path is None:
                return None
            return msgspec.json.decode(self._path.read_bytes(), type=Measured)
        except (OSError, msgspec.DecodeError):
            return None

    def store(self, measured: Measured) -> None:
        """What cannot be written is measured again another time."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(msgspec.json.encode(measured))
            os.replace(file.name, self._path)  # two servers may start at once
        except OSError:
            return
