"""One dataclass field, four ways to set it, and a clear line for every mistake."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest

from api.config import ServerConfig
from compress.codec import CODECS
from longctx.attention.registry import BACKENDS
from longctx.commands.arguments import CONFIGS
from longctx.config import (
    AttentionBackendName,
    CacheConfig,
    EngineConfig,
    EvictionPolicyName,
    KVCodec,
    ModelConfig,
    SchedulerConfig,
)
from longctx.options import _options, add_options, read_options
from offload.eviction import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    gib: Annotated[float | None, "memory"] = None
    mode: Annotated[Literal["fast", "100%"], "how"] = "fast"

    def __post_init__(self) -> None:
        if self.gib is not None and self.gib <= 0:
            raise ValueError(f"gib={self.gib} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    group: Group = field(default_factory=Group)
    tokens: Annotated[int, "tokens per step"] = 8
    folder: Annotated[Path | None, "where"] = None
    verify: Annotated[bool, "check what is read"] = True
    names: Annotated[tuple[str, ...], "who"] = ()
    title: Annotated[str, "what"] = "x"


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    port: Annotated[int, "TCP port"] = 8000


def read(
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    toml: Path | None = None,
) -> Tree:
    parser = argparse.ArgumentParser()
    add_options(parser, Tree)
    namespace = parser.parse_args(arguments)
    return read_options(namespace, Tree, environment=environment or {}, file=toml)


def write(folder: Path, text: str) -> Path:
    file = folder / "longctx.toml"
    file.write_text(text, encoding="utf-8")
    return file


EXPECTED = Tree(
    group=Group(gib=2.0, mode="100%"),
    tokens=3,
    folder=Path("a/b"),
    verify=False,
    names=("a", "b"),
    title="7",
)


def test_nothing_given_is_the_default():
    assert read() == Tree()


def test_the_command_line_sets_every_kind_of_field():
    arguments = "--gib 2 --mode 100% --tokens 3 --folder a/b --no-verify --names a --names b"
    assert read([*arguments.split(), "--title", "7"]) == EXPECTED


def test_the_environment_sets_every_kind_of_field():
    environment = {
        "LONGCTX_GIB": "2",
        "LONGCTX_MODE": "100%",
        "LONGCTX_TOKENS": "3",
        "LONGCTX_FOLDER": "a/b",
        "LONGCTX_VERIFY": "off",
        "LONGCTX_NAMES": "a,b",
        "LONGCTX_TITLE": "7",
        "HOME": "elsewhere",
    }
    assert read(environment=environment) == EXPECTED


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_a_toml_file_sets_every_kind_of_field(tmp_path, named_by):
    text = 'gib = 2\nmode = "100%"\ntokens = 3\nfolder = "a/b"\nverify = false\n'
    file = write(tmp_path, text + 'names = ["a", "b"]\ntitle = "7"\n')
    if named_by == "argument":
        assert read(toml=file) == EXPECTED
    else:
        assert read(environment={"LONGCTX_CONFIG": str(file)}) == EXPECTED


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path):
    file = write(tmp_path, 'tokens = 1\ntitle = "file"\nmode = "100%"\n')
    environment = {"LONGCTX_TOKENS": "2", "LONGCTX_TITLE": "environment"}
    tree = read(["--tokens", "3"], environment, file)
    assert (tree.tokens, tree.title, tree.group.mode) == (3, "environment", "100%")


def test_the_config_option_names_the_file(tmp_path):
    parser = argparse.ArgumentParser()
    add_options(parser, Tree)
    assert parser.parse_args(["--config", "a.toml"]).config == Path("a.toml")


@pytest.mark.parametrize(
    ("arguments", "environment", "toml", "line"),
    [
        ([], {"LONGCTX_TOKEN": "1"}, "", "unknown variable LONGCTX_TOKEN; did you mean LONGCTX_TO"),
        ([], {"LONGCTX_QQQQ": "1"}, "", "unknown variable LONGCTX_QQQQ; see --help"),
        ([], {}, "tokns = 1", "did you mean tokens?"),
        ([], {}, "[group]\ngib = 1", "unknown key 'group'"),
        ([], {"LONGCTX_TOKENS": "many"}, "", "LONGCTX_TOKENS is 'many', it must be an integer"),
        ([], {"LONGCTX_VERIFY": "maybe"}, "", "it must be true or false"),
        ([], {"LONGCTX_MODE": "slow"}, "", "choose from fast, 100%"),
        ([], {}, 'tokens = "3"', "it must be an integer"),
        ([], {}, "tokens = true", "it must be an integer"),
        ([], {}, "names = [1]", "must be a list of texts"),
        ([], {}, "tokens = ", "is not TOML"),
        (["--gib", "-1"], {}, "", "gib=-1.0 must be positive"),
    ],
)
def test_a_mistake_ends_in_one_clear_line(tmp_path, arguments, environment, toml, line):
    with pytest.raises(SystemExit) as caught:
        read(arguments, environment, write(tmp_path, toml))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match="absent"):
        read(toml=tmp_path / "absent")


def test_two_trees_share_one_command_line_and_one_environment():
    parser = argparse.ArgumentParser()
    add_options(parser, Tree)
    add_options(parser, Other)
    namespace = parser.parse_args(["--port", "1", "--tokens", "2"])
    environment = {"LONGCTX_TITLE": "t"}
    tree = read_options(namespace, Tree, environment=environment, file=None)
    other = read_options(namespace, Other, environment=environment, file=None)
    assert (tree.tokens, tree.title, other.port) == (2, "t", 1)


def test_another_commands_variables_are_known_but_not_this_commands_options(tmp_path):
    parser = argparse.ArgumentParser()
    add_options(parser, Tree)
    environment = {"LONGCTX_PORT": "1"}
    namespace = parser.parse_args([])
    tree = read_options(namespace, Tree, environment=environment, file=None, others=[Other])
    assert tree == Tree()
    with pytest.raises(SystemExit, match="LONGCTX_PORT"):
        read_options(namespace, Tree, environment=environment, file=None)


def test_one_name_in_two_groups_is_a_bug():
    @dataclass(frozen=True)
    class Clash:
        group: Group = field(default_factory=Group)
        gib: Annotated[int, "again"] = 0

    with pytest.raises(AssertionError, match="gib"):
        add_options(argparse.ArgumentParser(), Clash)


def test_help_says_what_an_option_is_for_and_its_default():
    parser = argparse.ArgumentParser()
    add_options(parser, Tree)
    text = parser.format_help()
    assert "tokens per step (default: 8)" in text
    assert "--verify, --no-verify" in text
    assert "100%" in text


def test_the_engines_options_have_the_names_of_its_fields():
    parser = argparse.ArgumentParser()
    add_options(parser, EngineConfig)
    namespace = parser.parse_args(["--max-context", "4096", "--kv-codec", "int8"])
    config = read_options(namespace, EngineConfig, environment={}, file=None)
    assert (config.model.max_context, config.cache.kv_codec) == (4096, "int8")
    assert all(len(line) < 200 for line in parser.format_help().splitlines())


@pytest.mark.parametrize("argv", [("--disk-compress",), ("--host-pool-gib", "1")])
def test_what_many_ranks_cannot_do_is_refused(argv: tuple[str, ...]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, EngineConfig)
    namespace = parser.parse_args([*argv, "--ranks", "2"])
    with pytest.raises(SystemExit, match="is for one rank; with ranks=2 blocks"):
        read_options(namespace, EngineConfig, environment={}, file=None)


def test_the_names_that_options_offer_are_those_of_the_registries() -> None:
    assert get_args(KVCodec) == ("auto", *CODECS)
    assert get_args(EvictionPolicyName) == tuple(POLICIES)
    # These are known everywhere, and registered where their kernels can run.
    assert set(get_args(AttentionBackendName)) == {"auto", "cpu", "cuda", *BACKENDS}


@pytest.mark.parametrize("name", ["kv_codec", "eviction_policy", "attention_backend"])
@pytest.mark.parametrize("by", ["argument", "environment", "file"])
def test_a_name_that_no_registry_holds_is_refused_before_anything_starts(
    name: str, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, EngineConfig)
    arguments = [f"--{name.replace('_', '-')}", "zfs"] if by == "argument" else []
    environment = {f"LONGCTX_{name.upper()}": "zfs"} if by == "environment" else {}
    file = write(tmp_path, f'{name} = "zfs"' if by == "file" else "")
    with pytest.raises(SystemExit) as refused:
        namespace = parser.parse_args(arguments)
        read_options(namespace, EngineConfig, environment=environment, file=file)
    said = capsys.readouterr().err if by == "argument" else str(refused.value)
    assert "zfs" in said and "choose from" in said


def test_a_name_that_no_registry_holds_is_refused_by_the_configuration_itself() -> None:
    with pytest.raises(ValueError, match="kv_codec='zfs' is unknown; choose from auto, raw, bf16"):
        CacheConfig(kv_codec="zfs")
    with pytest.raises(ValueError, match="eviction_policy='zfs' is unknown; choose from lru, gdsf"):
        CacheConfig(eviction_policy="zfs")
    with pytest.raises(ValueError, match="attention_backend='zfs' is unknown; choose from auto, r"):
        ModelConfig(attention_backend="zfs")


def test_addresses_of_services_in_kubernetes_are_no_options() -> None:
    services = {
        "LONGCTX_SERVICE_HOST": "10.96.0.12",
        "LONGCTX_SERVICE_PORT": "80",
        "LONGCTX_SERVICE_PORT_HTTP": "80",
        "LONGCTX_PORT": "tcp://10.96.0.12:80",
        "LONGCTX_PORT_80_TCP": "tcp://10.96.0.12:80",
        "LONGCTX_PORT_80_TCP_PROTO": "tcp",
        "LONGCTX_PORT_80_TCP_ADDR": "10.96.0.12",
        "LONGCTX_WEB_SERVICE_HOST": "10.96.0.13",
        "LONGCTX_WEB_PORT": "udp://10.96.0.13:53",
    }
    for config_type in CONFIGS:
        parser = argparse.ArgumentParser()
        add_options(parser, config_type)
        namespace = parser.parse_args([])
        for name, text in services.items():
            read_options(
                namespace, config_type, environment={name: text}, file=None, others=CONFIGS
            )
    parser = argparse.ArgumentParser()
    add_options(parser, ServerConfig)
    namespace, environment = parser.parse_args([]), {"LONGCTX_PORT": "8123"}
    config = read_options(namespace, ServerConfig, environment=environment, file=None)
    assert config.port == 8123


FLOATS = [
    (config_type, each.name)
    for config_type in CONFIGS
    for each in _options(config_type)
    if each.kind is float
]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("config_type", "name"), FLOATS)
def test_a_number_that_is_none_is_refused_wherever_it_comes_from(
    tmp_path: Path, config_type: type, name: str, number: str
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, config_type)
    flag = f"--{name.replace('_', '-')}={number}"
    toml = write(tmp_path, f"{name} = {number}")
    for argv, environment, file in (
        ([flag], {}, None),
        ([], {f"LONGCTX_{name.upper()}": number}, None),
        ([], {}, toml),
    ):
        namespace = parser.parse_args(argv)
        with pytest.raises(SystemExit, match=f"{name}={number} must be a finite number"):
            read_options(namespace, config_type, environment=environment, file=file, others=CONFIGS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelConfig(threads=0),
        lambda: ModelConfig(max_context=0),
        lambda: SchedulerConfig(max_sequences=0),
        lambda: SchedulerConfig(max_waiting=-1),
        lambda: CacheConfig(disk_ttl_days=float("nan")),
    ],
)
def test_a_number_outside_its_range_is_refused_by_the_configuration_itself(
    make: Callable[[], object],
) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()
