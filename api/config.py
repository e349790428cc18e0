"""The settings of the HTTP server. Each field is an option of `longctx serve`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from longctx.errors import LongctxError
from prompt_cache.level import Level, parse_level


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Frozen, and checked when it is made: ValueError names the field, its value and the limit."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 takes a free one"] = 8000
    store_dir: Annotated[Path, "folder of everything durable: files, their state, the secret"] = (
        Path("~/.local/share/longctx")
    )
    served_name: Annotated[str | None, "the model's name in the API; its folder's if absent"] = None
    alias: Annotated[tuple[str, ...], "another name of the model; repeat for more"] = ()
    cors_origin: Annotated[
        tuple[str, ...], "web site whose pages may call the server, or *; repeat for more"
    ] = ()
    api_key: Annotated[tuple[str, ...], "key that requests must carry; repeat for more"] = ()
    api_key_file: Annotated[Path | None, "file of accepted keys, one a line; a tenant each"] = None
    log_format: Annotated[
        Literal["text", "json"], "json: the log as lines of JSON, with one for each request"
    ] = "text"
    metrics_prefix: Annotated[
        str, "what the names of metrics that vLLM has too begin with; vllm suits its dashboards"
    ] = "longctx"
    prompt_cache_level: Annotated[
        str, "how prompts of schema modules are computed: exact, modular or link:K, such as link:16"
    ] = "exact"
    max_upload_mib: Annotated[int, "largest file accepted"] = 512
    ping_seconds: Annotated[float, "a silent stream carries a comment this often"] = 5.0
    page: Annotated[bool, "show a page for browsers at /"] = True
    drain_seconds: Annotated[float, "time that running answers get to finish at the end"] = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} is outside [0, 65535]")
        if self.max_upload_mib < 1:
            raise ValueError(f"max_upload_mib={self.max_upload_mib} must be at least 1")
        if self.ping_seconds <= 0:
            raise ValueError(f"ping_seconds={self.ping_seconds} must be positive")
        if self.drain_seconds < 0:
            raise ValueError(f"drain_seconds={self.drain_seconds} must not be negative")
        parse_level(self.prompt_cache_level, param="prompt_cache_level")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ValueError(
                f"metrics_prefix={self.metrics_prefix!r} is no beginning of a metric's name; "
                "write letters, digits and _, such as vllm"
            )
        if not all(self.alias):
            raise ValueError("alias is empty; leave it out, or write another name of the model")
        for origin in self.cors_origin:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"cors_origin={origin!r} is no origin; write one as https://example.org, "
                    "without a path, or * for all"
                )
        if not all(self.api_key):
            raise ValueError("api_key is empty; leave it out to serve without keys")

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_mib << 20

    @property
    def level(self) -> Level:
        return parse_level(self.prompt_cache_level, param="prompt_cache_level")

    @property
    def folder(self) -> Path:
        """The store's folder. Raises LongctxError where `~` means no folder."""
        try:
            return self.store_dir.expanduser()
        except RuntimeError as error:
            raise LongctxError(
                f"this user has no home folder for {self.store_dir}; name another by --store-dir"
            ) from error
