import json
from pathlib import Path

import pytest

from kvmkit.client.config import Disk, MachineConfig, Share, size_bytes


@pytest.mark.parametrize(
    ("text", "bytes_"), [("256M", 256 << 20), ("1g", 1 << 30), ("64MiB", 64 << 20), ("4096", 4096), (5, 5)]
)
def test_sizes(text: int | str, bytes_: int) -> None:
    assert size_bytes(text) == bytes_


@pytest.mark.parametrize("text", ["", "3X", "-1M", "1.5G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="256M or 1G"):
        size_bytes(text)


FULL = MachineConfig(
    root="debian:bookworm",
    memory="1G",
    cpus=2,
    disks=(Disk("/data.img", read_only=True),),
    shares=(Share(Path("/src"), "/src"),),
    network="user",
    environment={"A": "b"},
    name="web",
    engine="soft",
)


def test_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text("""
root = "debian:bookworm"
memory = "1G"
cpus = 2
network = "user"
name = "web"
engine = "soft"
environment = {A = "b"}
[[disks]]
path = "/data.img"
read_only = true
[[shares]]
directory = "/src"
path = "/src"
""")
    assert MachineConfig.from_toml(file).to_dict() == FULL.to_dict()


def test_json_there_and_back() -> None:
    again = MachineConfig.from_json(json.dumps(FULL.to_dict()))
    assert again.to_dict() == FULL.to_dict()
    assert MachineConfig().to_dict() == {}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"memoryy": 1}, "memoryy"),
        ({"cpus": "2"}, "cpus"),
        ({"disks": [{"path": "x", "ro": True}]}, "ro"),
        ({"shares": [{"directory": "x"}]}, "path"),
        ({"console_command": "ls"}, "console_command"),
    ],
)
def test_wrong_ones_are_named(values: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MachineConfig.from_dict(values)


def test_a_file_that_isn_t_toml(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text("root = ")
    with pytest.raises(ValueError, match=r"vm\.toml"):
        MachineConfig.from_toml(file)
    with pytest.raises(ValueError, match="object"):
        MachineConfig.from_json("[]")
