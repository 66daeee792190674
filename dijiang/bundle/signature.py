"""Who made a bundle: a signature over its manifest, made and checked by ssh-keygen of OpenSSH."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..environment import SIGNERS, value_of
from ..errors import BundleError, InputError
from ..files import temporary_folder
from ..reading import read_regular

#: A signature for anything else is none for a bundle; the name that every key has in the question.
NAMESPACE, SIGNER = "dijiang-bundle", "signer"
#: How a public key begins.
KINDS = ("ssh-", "ecdsa-", "sk-")
#: Seconds to check one.
PATIENCE = 60


def required_signers() -> Path | None:
    """The public keys that this process asks for, whatever it opens."""
    found = value_of(SIGNERS)
    return Path(found) if found else None


def sign(data: bytes, key: str | Path) -> str:
    """A signature over data.

    Args:
        key: file of a private key; or of a public one, whose private key the ssh-agent holds.

    Raises:
        InputError: there is no such key, it does not sign, or OpenSSH is not installed.
    """
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], data, None)
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split()) or f"exit {done.returncode}"
        raise InputError(f"{key}: does not sign ({reason}); give a key that ssh-keygen made")
    return done.stdout.decode()


def check_signature(data: bytes, signature: str | None, signers: Path, where: str) -> None:
    """BundleError, which begins with `where`, unless one of the keys signed the data.

    Args:
        signers: file of public keys, one a line, as ssh-keygen writes them.

    Raises:
        InputError: that file cannot be read or holds no key, or OpenSSH is not installed.
    """
    keys = _public_keys(signers)
    if signature is None:
        raise BundleError(f"{where}: not signed, expected a signature by a key of {signers}; do not use it")
    with temporary_folder() as folder:
        allowed, file = folder / "signers", folder / "signature"
        allowed.write_text("".join(f'{SIGNER} namespaces="{NAMESPACE}" {key}\n' for key in keys), encoding="utf-8")
        file.write_text(signature, encoding="utf-8")
        question = ["-Y", "verify", "-f", str(allowed), "-I", SIGNER, "-n", NAMESPACE, "-s", str(file)]
        done = _ssh_keygen(question, data, PATIENCE)
    if done.returncode:
        raise BundleError(
            f"{where}: its signature is by no key of {signers}, or it was changed since; do not use it"
        )


def _public_keys(file: Path) -> list[str]:
    try:
        lines = read_regular(file).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: public keys cannot be read ({error}); give a file of public keys") from error
    keys = [line.strip() for line in lines if line.strip().startswith(KINDS)]
    if not keys:
        raise InputError(f"{file}: no public key in it, expected a line such as ssh-ed25519 AAAA...")
    return keys


def _ssh_keygen(arguments: list[str], data: bytes, seconds: float | None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", *arguments], input=data, capture_output=True, timeout=seconds)
    except (OSError, ValueError) as error:
        raise InputError(
            f"signatures need ssh-keygen, which cannot be run ({error}); install OpenSSH's client"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"ssh-keygen did not end in {seconds} s; try again") from error
