"""Engines for other GPUs or another TensorRT, put into a bundle that is there, from its own graphs and weights.

All is made in the hidden folder beside the bundle in which builds work, on hard links to the graphs and weights. The
bundle changes at one moment, when its manifest is replaced: before that it names none of the new files, and after it
none of the old ones. Needs neither torch nor onnx nor the checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from rich.console import Console

from densegeo.backends import ENGINES
from densegeo.errors import ConfigError, KernelError, ResourceError
from densegeo.export.cubins import check_architectures, write_cubins
from densegeo.export.display import Display
from densegeo.export.engine_builder import EngineOptions, PlannedEngine, build_engines, planned_engines
from densegeo.export.machine import GIB
from densegeo.export.staging import locked
from densegeo.extras import install_hint
from densegeo.files import atomic_write, read_record
from densegeo.kernels.contract import LaunchContract
from densegeo.runtime import measured
from densegeo.runtime.backends.tensorrt_kernels import launched
from densegeo.runtime.bundle import (
    KERNELS,
    MANIFEST,
    STAGES,
    Engine,
    FileDigest,
    Manifest,
    check_files,
    read_manifest,
    sha256_file,
    write_manifest,
)
from densegeo.runtime.engines import FOLDER, reusable
from densegeo.runtime.ready import FOLDER as READY

WORK = "renewal"  # the folder within that of builds
RECORD = "renewal.json"  # a manifest of the engines that an interrupted run has finished
LOG_BYTES = 1 << 20  # of an engine besides its weights: its code and its log


class Renewed(msgspec.Struct, frozen=True):
    """What was done to a bundle: its manifest now, and what is new or gone."""

    manifest: Manifest
    added: list[Engine]
    replaced: list[Engine]
    kernels: list[LaunchContract]


def renew(bundle: Path, architectures: Sequence[int], options: EngineOptions | None, console: Console) -> Renewed:
    """Add or renew a bundle's engines, and the kernels around them, for these architectures (89 is sm_89).

    options: None for the kernels alone. Engines of other architectures, and of another library, stay. Interrupted or
    failed, the bundle is what it was; after an interruption the next run goes on from the engines that are finished.
    Raises BundleError, ConfigError, EngineError, KernelError and ResourceError.
    """
    bundle = bundle.resolve()
    manifest = read_manifest(bundle)
    if bundle.parent == READY.resolve():
        raise ConfigError(
            f"{bundle.name} comes with densegeo, and stays as it is: copy it, `cp -r {bundle} {bundle.name}`, and name "
            f"the copy, ./{bundle.name}"
        )
    check_architectures(architectures)
    planned: list[PlannedEngine] = []
    if options is not None:
        options = options.validated()
        planned = planned_engines(manifest.buckets, manifest.precision, architectures, options, manifest.files)
    if not os.access(bundle, os.W_OK):
        raise ResourceError(f"{bundle} cannot be written: change its permissions, or copy the bundle and name the copy")
    with locked(bundle) as staging, Display(console) as display:
        return _Renewal(bundle, manifest, staging, display).run(architectures, planned, options)


class _Renewal:
    """One run, which has the bundle's staging folder for itself."""

    def __init__(self, bundle: Path, manifest: Manifest, staging: Path, display: Display) -> None:
        self.bundle, self.manifest, self.display = bundle, manifest, display
        self.work, self.record = staging / WORK, staging / RECORD

    def run(
        self, architectures: Sequence[int], planned: Sequence[PlannedEngine], options: EngineOptions | None
    ) -> Renewed:
        with self._resumable():
            finished = self._prepare()
            prints = {item.engine.fingerprint for item in planned}
            reused = [reusable(self.bundle, self.manifest, item) for item in sorted(prints)]
            current = [engine for engine in reused if engine is not None]
            built_before = {engine.fingerprint for engine in current}
            self._check_disk([item for item in planned if item.engine.fingerprint not in built_before])
            contracts = self._make_kernels(architectures)
            built: list[Engine] = []
            if options is not None:
                built = self._make_engines(planned, options, current, finished)
            added = [engine for engine in built if engine not in current]
            renewed = self._put_together(architectures, built, added, contracts)
            if added or contracts:
                self._publish(renewed)
                measured.forget({engine.fingerprint for engine in renewed.replaced})
        self._discard()
        return renewed

    def _prepare(self) -> list[Engine]:
        """Link graphs and weights, checked first; returns what an interrupted run has finished. Raises BundleError."""
        graphs = {getattr(bucket, stage).file for bucket in self.manifest.buckets for stage in STAGES}
        names = sorted(graphs | {f"{stage}.safetensors" for stage in STAGES})
        sources = {name: self.manifest.files[name] for name in names}
        with self.display.bar("checking graphs and weights", sum(file.bytes for file in sources.values())) as bar:
            check_files(self.bundle, msgspec.structs.replace(self.manifest, files=sources), progress=bar.advance)
        finished = self._finished()
        self._prune(finished)
        (self.work / FOLDER).mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                os.link(self.bundle / name, self.work / name)
            except OSError:  # file systems without hard links, and files of others
                shutil.copyfile(self.bundle / name, self.work / name)
        if finished:
            self.display.say(f"{_engines(finished)} taken over from an interrupted run, where they are still wanted")
        return finished

    def _check_disk(self, missing: Sequence[PlannedEngine]) -> None:
        """Raises ResourceError where the engines will not fit."""
        constant = [item.engine.stage for item in missing if item.engine.weights == "constant"]
        needed = sum(self.manifest.files[f"{stage}.safetensors"].bytes for stage in constant)
        needed, free = needed + LOG_BYTES * len(missing), shutil.disk_usage(self.work).free
        if needed > free:
            raise ResourceError(
                f"the engines need about {needed / GIB:.1f} GiB on disk, {self.bundle.parent} has {free / GIB:.1f} GiB "
                "free: free some space, or say --weights input (engines that take them from the bundle's weight files)"
            )

    def _make_kernels(self, architectures: Sequence[int]) -> list[LaunchContract]:
        """Compile the kernels that the bundle lacks for these architectures. Raises KernelError without Triton."""
        names = launched(self.manifest.decode, self.manifest.buckets[0].decoder.outputs[0].shape[1])
        existing = {(contract.name, contract.architecture) for contract in self.manifest.kernels if self._has(contract)}
        lacking = [number for number in architectures if any((name, number) not in existing for name in names)]
        if not lacking:
            return []
        with self.display.bar("compiling kernels", 1):
            try:
                return write_cubins(self.work, lacking, names)
            except KernelError as error:
                number = lacking[0]
                raise KernelError(
                    f"{self.bundle} has no GPU kernels for sm_{number}, which go with its engines, and they cannot be "
                    f"made here: {error}\nInstall Triton ({install_hint('kernels')}), or run `densegeo engines "
                    f"BUNDLE --gpu-arch {number} --kernels-only` where Triton is, and copy the bundle here."
                ) from error

    def _has(self, contract: LaunchContract) -> bool:
        """Whether a kernel's binary is there, and the one that its contract and the manifest speak of."""
        name = f"{KERNELS}/{contract.file}"
        path, listed = self.bundle / name, self.manifest.files.get(name)
        return listed is not None and path.is_file() and sha256_file(path) == contract.digest == listed.sha256

    def _make_engines(
        self, planned: Sequence[PlannedEngine], options: EngineOptions, current: list[Engine], finished: list[Engine]
    ) -> list[Engine]:
        """All that are wanted, in that order; each that is new is recorded when it is whole. Raises EngineError."""
        reusable_engines, new_engines, engines = [*current, *finished], list(finished), []
        with self.display.bar("engines", len(planned)) as bar:
            for engine in build_engines(
                self.work, planned, options, old=None, finished=reusable_engines, progress=bar.describe
            ):
                engines.append(engine)
                bar.advance()
                if engine not in reusable_engines:
                    new_engines.append(engine)
                    self._keep(new_engines)
                    self.display.say(f"{engine.file}: {engine.seconds:.1f} s")
        return engines

    def _keep(self, new_engines: list[Engine]) -> None:
        """From now on these are finished."""
        so_far = msgspec.structs.replace(self.manifest, engines=new_engines, files=self._described(new_engines))
        with atomic_write(self.record) as partial:
            partial.write_bytes(msgspec.json.encode(so_far))

    def _finished(self) -> list[Engine]:
        """Engines of an interrupted run that are still what its record says."""
        before = read_record(self.record, Manifest)
        if before is None:
            return []
        return [engine for engine in before.engines if reusable(self.work, before, engine.fingerprint)]

    def _described(self, engines: Iterable[Engine]) -> dict[str, FileDigest]:
        paths = {name: self.work / name for engine in engines for name in (engine.file, engine.log)}
        return {name: FileDigest(path.stat().st_size, sha256_file(path)) for name, path in sorted(paths.items())}

    def _put_together(
        self,
        architectures: Sequence[int],
        built: list[Engine],
        added: list[Engine],
        contracts: list[LaunchContract],
    ) -> Renewed:
        """The manifest with what was made: new engines first, which the runtime then takes."""
        old, places = self.manifest, {_place(engine) for engine in built}
        replaced = [engine for engine in old.engines if _place(engine) in places and engine not in built]
        unchanged = [engine for engine in old.engines if engine not in [*built, *replaced]]
        compiled = {(contract.name, contract.architecture) for contract in contracts}
        unchanged_kernels = [
            contract for contract in old.kernels if (contract.name, contract.architecture) not in compiled
        ]
        targets = {*old.target_architectures, *(f"sm_{number}" for number in architectures)}
        obsolete = {name for engine in replaced for name in (engine.file, engine.log)}
        files = {name: file for name, file in old.files.items() if name not in obsolete} | self._described(added)
        for contract in contracts:
            path = self.work / KERNELS / contract.file
            files[f"{KERNELS}/{contract.file}"] = FileDigest(path.stat().st_size, contract.digest)
        changed = msgspec.structs.replace(
            old,
            engines=[*built, *unchanged],
            kernels=sorted(
                [*unchanged_kernels, *contracts], key=lambda contract: (contract.architecture, contract.name)
            ),
            files=dict(sorted(files.items())),
            target_architectures=sorted(targets, key=lambda name: int(name.removeprefix("sm_"))),
            build_key=_key(old, replaced),
            options=old.options | _as_built(old, architectures, built),
        )
        return Renewed(changed, added, replaced, contracts)

    def _publish(self, renewed: Renewed) -> None:
        """Move new files into the bundle, then the manifest in place of the old one; then remove what is in neither.

        A process that is killed before the manifest is replaced leaves files that no manifest names.
        """
        new = [name for engine in renewed.added for name in (engine.file, engine.log)]
        new += [f"{KERNELS}/{contract.file}" for contract in renewed.kernels]
        try:
            for name in new:
                (self.bundle / name).parent.mkdir(exist_ok=True)
                (self.work / name).chmod(0o644)
                os.replace(self.work / name, self.bundle / name)
            write_manifest(self.work, renewed.manifest)
            (self.work / MANIFEST).chmod(0o644)
            os.replace(self.work / MANIFEST, self.bundle / MANIFEST)
        except BaseException:
            self._remove_unlisted(self.manifest)
            raise
        self._remove_unlisted(renewed.manifest)

    def _remove_unlisted(self, manifest: Manifest) -> None:
        """From the bundle's folders of engines and kernels."""
        for path in [path for folder in (FOLDER, KERNELS) for path in (self.bundle / folder).glob("*")]:
            if path.relative_to(self.bundle).as_posix() not in manifest.files:
                path.unlink(missing_ok=True)
        for folder in (FOLDER, KERNELS):
            with suppress(OSError):  # not there, or not empty
                (self.bundle / folder).rmdir()

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """When the block is left by an interruption, finished engines stay for the next run; after errors, nothing."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            finished = self._finished()
            self._prune(finished)
            if finished:
                self.display.say(
                    f"The bundle is what it was. Finished: {_engines(finished)}. The same command goes on from there; "
                    f"to give up, delete {self.record.parent}."
                )
            else:
                self._discard()
            raise
        except OSError as error:
            self._discard()
            raise ResourceError(f"cannot write the engines: {error}. The bundle is what it was.") from error
        except BaseException:
            self._discard()
            raise

    def _prune(self, finished: Iterable[Engine]) -> None:
        """Remove all but these engines from the work's folder."""
        names = {name for engine in finished for name in (engine.file, engine.log)}
        for path in [path for path in self.work.rglob("*") if path.is_file()]:
            if path.relative_to(self.work).as_posix() not in names:
                path.unlink()

    def _discard(self) -> None:
        self.record.unlink(missing_ok=True)
        if self.work.exists():
            shutil.rmtree(self.work)


def _place(engine: Engine) -> tuple[str, str, str, tuple[str, ...]]:
    """What there is one engine of in a bundle."""
    return engine.stage, engine.bucket, engine.library, tuple(engine.architectures)


def _key(manifest: Manifest, replaced: Sequence[Engine]) -> str:
    """The build's key, as long as everything that the build made is there: the same build is a no-op then, or not."""
    if not replaced:
        return manifest.build_key
    fields = [manifest.build_key, *(engine.fingerprint for engine in replaced)]
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


def _as_built(manifest: Manifest, architectures: Sequence[int], built: list[Engine]) -> dict[str, list[str]]:
    """What to change in the options of `densegeo build` so that it makes these engines or kernels too."""
    before = manifest.options.get("--gpu-arch", [])
    changes = {"--gpu-arch": list(dict.fromkeys([*before, *map(str, architectures)]))}
    return changes | ({"--backend": [ENGINES.name], "--builder": [built[0].library]} if built else {})


def _engines(engines: Sequence[Engine]) -> str:
    return f"{len(engines)} engine" + ("s" if len(engines) != 1 else "")
