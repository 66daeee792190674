"""A bundle folder: opened, checked, and its manifest replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BundleError, DijiangError
from ..files import write_file
from ..hidden import locked, recover
from ..hub import is_own
from ..reading import given, read_json
from .graphs import check_graphs
from .integrity import check_file
from .manifest import AGAIN, DATA, GENERATION, MANIFEST, PARITY, SAMPLING, Manifest
from .signature import check_signature, required_signers, sign


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its files are all present and whole, its graphs are ours and fit the manifest."""

    path: Path
    manifest: Manifest

    def graph_file(self, graph: str) -> Path:
        """The ONNX file of one of its graphs."""
        return self.path / self.manifest.graphs[graph].file

    @property
    def data_bytes(self) -> int:
        """Size of the weights, which all graphs share."""
        return self.manifest.files[DATA].bytes

    @property
    def stamp(self) -> tuple[int, int, int, int] | None:
        """Which file the weights are in, and its size and time: (device, inode, bytes, ns); None: it is away."""
        try:
            found = (self.path / DATA).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    @property
    def nbytes(self) -> int:
        """Size of all files but reports, bytes."""
        listed = sum(record.bytes for record in self.manifest.files.values())
        return listed + (self.path / MANIFEST).stat().st_size

    @property
    def parity(self) -> dict[str, Any] | None:
        """The stored report of the last verification, or None."""
        path = self.path / PARITY
        if PARITY not in self.manifest.reports or not os.path.isfile(path):
            return None
        return given(path, read_json, BundleError, "run dijiang verify again")

    @property
    def sampling(self) -> dict[str, Any]:
        """What generation_config.json of the checkpoint says about sampling; `chat` and `serve` use it."""
        if GENERATION not in self.manifest.files:
            return {}
        found = given(self.path / GENERATION, read_json, BundleError, AGAIN)
        return {name: found[name] for name in SAMPLING if isinstance(found, dict) and name in found}

    def require_graph(self, graph: str, error: type[DijiangError] = BundleError) -> None:
        """Raises `error` unless it has a graph of this name."""
        if graph not in self.manifest.graphs:
            raise error(
                f"{self.path} has no {graph} graph, it has {', '.join(self.manifest.graphs)}; choose one of them, "
                f"or export with --graph {graph}"
            )

    @property
    def passed(self) -> bool | None:
        """Whether every graph met its gates; None: one was never verified, or not judged."""
        found = [record.passed for record in self.manifest.graphs.values()]
        return None if None in found else all(found)

    def with_manifest(self, manifest: Manifest) -> Bundle:
        """The bundle after its manifest was replaced, in one step."""
        write_file(self.path / MANIFEST, manifest.to_json().encode(), BundleError)
        return Bundle(self.path, manifest)

    def edited(self, edit: Callable[[Manifest], Manifest]) -> Bundle:
        """The bundle after an edit of the manifest that it has by now; nobody else edits it meanwhile.

        An edit of what was signed takes the signature away.

        Raises:
            BundleError: another bundle stands there by now, or the manifest cannot be written.
        """
        try:
            with locked(self.path / MANIFEST):
                found = read_manifest(self.path)
                if (found.fingerprint, found.graphs.keys()) != (
                    self.manifest.fingerprint,
                    self.manifest.graphs.keys(),
                ):
                    raise BundleError(f"{self.path}: another bundle was written there meanwhile; run this again")
                changed = edit(found)
                if changed.signed_part() != found.signed_part():
                    changed = replace(changed, signature=None)
                return Bundle(self.path, found) if changed == found else self.with_manifest(changed)
        except OSError as error:
            raise BundleError(
                f"{self.path / MANIFEST}: unreadable ({error}); export the checkpoint again"
            ) from error

    def signed(self, key: str | Path) -> Bundle:
        """The bundle after it was signed, see `signature.sign`.

        Raises:
            BundleError: it was changed since it was opened, or the manifest cannot be written.
            InputError: the key does not sign.
        """
        part = self.manifest.signed_part()
        signature = sign(part, key)

        def edit(found: Manifest) -> Manifest:
            if found.signed_part() != part:
                raise BundleError(f"{self.path}: it was changed meanwhile; run this again")
            return replace(found, signature=signature)

        return self.edited(edit)

    def announced(self, names: Iterable[str]) -> Bundle:
        """The bundle after its manifest says that these files may be there, whole or not.

        So every file that a killed process leaves in the folder is listed.
        """
        added = tuple(names)
        return self.edited(lambda m: replace(m, reports=tuple(dict.fromkeys([*m.reports, *added]))))


def open_bundle(
    path: str | Path, *, check_hashes: bool = True, require_signature: str | Path | None = None
) -> Bundle:
    """Open and check a bundle folder.

    Args:
        path: folder written by `dijiang export`.
        check_hashes: read every file once and compare its sha256 with the manifest.
        require_signature: file of public keys; one of them must have signed the bundle, and the hashes are
            compared in any case. None: the file that DIJIANG_REQUIRE_SIGNATURE names, if that is set.

    Raises:
        BundleError: missing, damaged, of another format, with files outside the folder, with a graph that
            dijiang does not write (`graphs.check_graphs`), or not signed as it must be.
        InputError: the public keys cannot be read.

    A bundle that a killed `export --force` had put aside is brought back first.
    """
    signers = required_signers() if require_signature is None else Path(require_signature)
    return open_any(Path(path), signers, check_hashes=check_hashes)


def open_any(folder: Path, signers: Path | None, *, check_hashes: bool = True) -> Bundle:
    """`open_bundle`, with the keys that must have signed it; None: whoever signed it or not."""
    if not os.path.exists(folder):
        recover(folder)
    manifest = read_manifest(folder)
    if signers is not None:
        check_signature(manifest.signed_part(), manifest.signature, signers, str(folder))
        check_hashes = True
    for name, expected in manifest.files.items():
        _check_name(folder, name, hashes=check_hashes)
        file = folder / name
        if not os.path.isfile(file):
            raise BundleError(f"{folder}: {name} is missing; copy or export the bundle again")
        try:
            check_file(file, expected, hashes=check_hashes)
        except OSError as error:
            raise BundleError(f"{file}: unreadable ({error.strerror or error}); copy the bundle again") from error
    needed = {DATA, *(record.file for record in manifest.graphs.values())}
    needed |= {str(record.get("file")) for record in manifest.engines.values()}
    absent = sorted(needed - set(manifest.files))
    if absent or not manifest.graphs:
        raise BundleError(f"{folder}: {', '.join(absent) or 'no graph'} not in {MANIFEST}; export the bundle again")
    check_graphs(folder, manifest)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, its files unseen; BundleError if it has none that is whole."""
    try:
        return Manifest.from_dict(read_json(folder / MANIFEST), str(folder / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder}: no {MANIFEST}, so not a bundle; run dijiang export first") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder / MANIFEST}: unreadable ({error}); export the checkpoint again") from error


def _check_name(folder: Path, name: str, *, hashes: bool) -> None:
    """A plain name. It may be a link to a file of the folder, or of the Hub's cache; to any, where hashes vouch."""
    plain = Path(name).name == name and name not in ("", "..") and name.isprintable()
    if not plain or not (hashes or is_own(folder / name)):
        raise BundleError(
            f"{folder}: file name {name!r} leaves the bundle folder, expected a plain name; do not use this bundle"
        )


def store_parity(bundle: Bundle, report: dict[str, Any], passed: Iterable[tuple[str, bool | None]]) -> Bundle:
    """Keep the report of a verification, and of each graph whether it passed.

    The report is outside of the hashed files, listed before it is written, and the verdicts come last:
    whatever stops this in between, the bundle loads.
    """
    verdicts = dict(passed)
    bundle = bundle.announced([PARITY])
    text = json.dumps(report, indent=1) + "\n"
    write_file(bundle.path / PARITY, text.encode(), BundleError)

    def judged(manifest: Manifest) -> Manifest:
        graphs = {
            name: replace(record, passed=verdicts.get(name, record.passed))
            for name, record in manifest.graphs.items()
        }
        return replace(manifest, graphs=graphs)

    return bundle.edited(judged)
