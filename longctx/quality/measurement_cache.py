"""Keeps measurements between starts, each under everything that it depends on."""

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from longctx.engine_info import Measured
from longctx.model.spec import ModelSpec
from longctx.version import __version__


def identity_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return what measurements depend on of a model and of this program."""
    return (
        __version__,
        spec.fingerprint,
        spec.rope_identity,
        str(spec.dtype),
        spec.device.type,
    )


class MeasurementCache:
    """One measurement in a file of a folder; without a folder nothing is kept."""

    def __init__(self, cache_dir: Path | None, identity: tuple[object, ...]) -> None:
        """Name the file by the `repr` of `identity`, which has to say all that matters."""
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._path = None if cache_dir is None else cache_dir / "quality" / f"{digest}.json"

    def load(self) -> Measured | None:
        """Return what was measured at an earlier start; None where nothing readable is there."""
        try:
            if self._path is None:
                return None
            return msgspec.json.decode(self._path.read_bytes(), type=Measured)
        except (OSError, msgspec.DecodeError):
            return None

    def store(self, measured: Measured) -> None:
        """Keep a measurement; where it cannot be written it is measured again at the next start."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(msgspec.json.encode(measured))
            os.replace(file.name, self._path)  # two servers may start at once
        except OSError:
            return
