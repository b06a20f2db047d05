"""Readers of files and answers that come from outside, each with good inputs, as targets of fuzzing."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import MixtralRunError
from mixtral_run.fleet.hosts import hosts_of_inventory, parse_host, unresolved_variables
from mixtral_run.fleet.jobs.host_facts import parse_facts
from mixtral_run.fleet.jobs.jobs import list_jobs
from mixtral_run.fleet.jobs.transfer.unpack import unpack
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.status.page import page
from mixtral_run.fleet.status.read_fleet import read_fleet, summary_rows, to_json
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.reading.examples import read_examples
from mixtral_run.weights.convert import to_megatron
from mixtral_run.weights.convert.copy_plan import make_plan
from mixtral_run.weights.convert.journal import JobSums, Journal
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.manifest.manifest import is_kind, read_checkpoint_manifest
from mixtral_run.weights.manifest.proof import check_files
from mixtral_run.weights.torch_dist.metadata import read_metadata
from tests.soak.damage import Damage, damaged_bytes, damaged_json, damaged_lines
from tests.support.tiny import write_tiny

HOSTILE = Path(__file__).parents[1] / "unit" / "fleet" / "hostile"
CONVERSATION = json.dumps(
    {"messages": [{"role": role, "content": "t"} for role in ("system", "user", "assistant")]}
).encode()


@dataclass(frozen=True)
class Target:
    """A reader. read: takes damaged bytes, and may raise MixtralRunError or one of `allowed`."""

    name: str
    seeds: Sequence[bytes]
    damage: Damage
    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...] = ()

    def check(self, data: bytes) -> None:
        """Read the bytes. Raises whatever a user would see as a traceback."""
        try:
            self.read(data)
        except (MixtralRunError, *self.allowed) as error:
            str(error)  # a message is shown, so that it has to be made without an error


class AnsweringSsh(Ssh):
    """STAND-IN for ssh: every command of every host is answered with `output`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "known_hosts")
        self.output = b""

    def run(self, *_: Any, **__: Any) -> Answer:
        """Return the answer as the real connection decodes it."""
        return Answer(0, self.output.decode("utf-8", errors="replace"), "")


def all_targets(folder: Path) -> list[Target]:
    """Return the targets; their files are in `folder`, which must be empty."""
    model = folder / "model"
    write_tiny(model)
    base = folder / "base"
    to_megatron.convert(
        ConvertConfig(
            hf_model_path=str(model), output_path=base, tensor_model_parallel_size=1, expert_model_parallel_size=2
        ),
        Report.silent(),
    )
    return [
        *_model_targets(model),
        *_base_targets(base),
        _journal(folder, model),
        _data(folder),
        *_host_targets(folder),
    ]


def _model_targets(model: Path) -> list[Target]:
    shard = sorted(model.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header, rest = content[8:length], content[length:]

    def header_file(data: bytes) -> None:
        _with(shard, len(data).to_bytes(8, "little") + data + rest, lambda: open_hf_weights(model))

    def prefix(data: bytes) -> None:
        _with(shard, data + rest, lambda: open_hf_weights(model))

    names = {
        "config.json": model / "config.json",
        "model.safetensors.index.json": model / "model.safetensors.index.json",
    }
    targets = [
        Target("safetensors header", [header], damaged_json, header_file),
        Target("safetensors file", [content[:length]], damaged_bytes, prefix),
    ]
    for name, path in names.items():
        targets.append(
            Target(name, [path.read_bytes()], damaged_json, _file_reader(path, lambda: open_hf_weights(model)))
        )
    return targets


def _base_targets(base: Path) -> list[Target]:
    manifest, proof = base / "mixtral_run.json", base / "proof.json"
    iteration = next(path for path in base.rglob(".metadata")).parent
    metadata = iteration / ".metadata"

    def read_manifest() -> None:
        is_kind(base, "base")
        read_checkpoint_manifest(base)

    return [
        Target("mixtral_run.json", [manifest.read_bytes()], damaged_json, _file_reader(manifest, read_manifest)),
        Target("proof.json", [proof.read_bytes()], damaged_json, _file_reader(proof, lambda: check_files(base))),
        Target(
            ".metadata",
            [metadata.read_bytes()],
            damaged_bytes,
            _file_reader(metadata, lambda: read_metadata(iteration)),
        ),
    ]


def _journal(folder: Path, model: Path) -> Target:
    work = folder / "journal"
    work.mkdir()
    plan = make_plan(open_hf_weights(model), 1, 2, 1)
    journal = Journal(work, "wanted", plan.jobs)
    journal.start(plan.jobs)
    journal.add(
        (number, JobSums(dict.fromkeys(job.unit.sources, 1), (2,) * len(job.chunks)))
        for number, job in enumerate(plan.jobs[:3])
    )
    file = work / "journal.jsonl"
    seed = file.read_bytes()
    return Target("journal", [seed], damaged_lines, _file_reader(file, lambda: Journal(work, "wanted", plan.jobs)))


def _data(folder: Path) -> Target:
    path = folder / "data.jsonl"
    seeds = [b'{"instruction": "q", "response": "a"}\n' + CONVERSATION + b"\n"]
    return Target("data file", seeds, damaged_lines, _file_reader(path, lambda: read_examples([str(path)]).check()))


def _host_targets(folder: Path) -> list[Target]:
    ssh, host = AnsweringSsh(folder), parse_host("gpu-01")

    def answered(call: Callable[[], object]) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            ssh.output = data
            call()

        return read

    def status() -> None:
        with patch("mixtral_run.fleet.status.read_fleet.status_payload", return_value=b""):
            statuses = read_fleet([host], ssh)
        page(statuses), to_json(statuses), summary_rows(statuses)

    def inventory(data: bytes) -> None:
        variables = json.loads(data.decode("utf-8"))
        if isinstance(variables, dict):  # `ansible-inventory` prints an object
            listing = {"mixtral_hosts": {"hosts": ["gpu-01"]}, "_meta": {"hostvars": {"gpu-01": variables}}}
            unresolved_variables(listing), hosts_of_inventory(listing, Path("hosts.yml"))

    return [
        Target("status answer", [(HOSTILE / "status_good.json").read_bytes()], damaged_json, answered(status)),
        Target(
            "list of jobs",
            [(HOSTILE / "rows_good.txt").read_bytes()],
            damaged_bytes,
            answered(lambda: list_jobs([host], ssh)),
        ),
        Target(
            "facts of a host",
            [_FACTS],
            damaged_bytes,
            lambda data: parse_facts(data.decode("utf-8", "replace")),
            (ValueError,),
        ),
        Target("tar archive", [_tar()], damaged_bytes, _unpacker(folder), (ValueError,)),
        Target("variables of an inventory", [_VARIABLES], damaged_json, _json_only(inventory)),
    ]


_FACTS = (
    b"docker=docker\nuid=1\ngid=1\ngroup=\nfolder=/j\nkernels=/k\ngpus=8\ncdi=1\nimage=1\ncheckpoints=1\ncordon=\n"
    b"address=10.0.0.1\ninterface=e\nrdma=mlx5_0\nbridges=\nrdma_group=1\n"
)
_VARIABLES = json.dumps(
    {"ansible_host": "10.0.0.1", "ansible_port": 22, "ansible_user": "u", "ansible_ssh_private_key_file": "~/k",
     "ansible_ssh_common_args": "-o A=b -J 'x y'"}
).encode()  # fmt: skip


def _json_only(call: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Return a reader that skips what is not JSON, for input that a program of this machine writes."""

    def read(data: bytes) -> None:
        try:
            json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            return
        call(data)

    return read


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, content in (
            ("peft", tarfile.DIRTYPE, b""),
            ("peft/a", tarfile.REGTYPE, b"abc"),
            ("peft/l", tarfile.SYMTYPE, b""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "a" * (kind == tarfile.SYMTYPE)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _unpacker(folder: Path) -> Callable[[bytes], None]:
    target, outside = folder / "unpacked", folder

    def read(data: bytes) -> None:
        before = sorted(entry.name for entry in outside.iterdir())
        target.mkdir()
        try:
            unpack(io.BytesIO(data), target, "peft", limit_bytes=1 << 20)
        finally:
            shutil.rmtree(target)
        assert sorted(entry.name for entry in outside.iterdir()) == before, "something was written elsewhere"

    return read


def _file_reader(path: Path, call: Callable[[], object]) -> Callable[[bytes], None]:
    return lambda data: _with(path, data, call)


def _with(path: Path, data: bytes, call: Callable[[], object]) -> None:
    """Call with another content of a file, whose own content is put back."""
    found = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        call()
    finally:
        if found is None:
            path.unlink()
        else:
            path.write_bytes(cast("bytes", found))
