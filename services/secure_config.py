"""Writes everything that a secured NATS needs into one folder: `gorgon secure-config DIR`.

    nats.conf              accounts, users with their permissions, TLS
    keys/<user>.nk         seed of each user's nkey (Ed25519), for that process only
    keys/tenant-<name>.nk  the same for each tenant
    tls/ca.pem, server.pem, server-key.pem, client.pem, client-key.pem
    <user>.env             settings of a process that connects as that user
    options.json           what it was last called with

Run again it keeps what is there, options that are not given included: keys and certificates are made once (the server's certificate
anew for a host that it does not name).
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.bus import MAX_PAYLOAD
from shared.permissions import (
    ACCOUNT,
    ADMIN,
    STAGES,
    SYSTEM_ACCOUNT,
    exports,
    imports,
    inbox_prefix,
    permissions,
)
from shared.subjects import TOKEN_RULE, is_token

CONFIG = "nats.conf"
_DAYS = 825
_RESERVED = frozenset({ACCOUNT, SYSTEM_ACCOUNT, "default"})


@dataclass(frozen=True)
class Options:
    """How the server is reached, and by whom.

    hosts        names and addresses of the server; the first is that of the .env files
    store        JetStream's folder on the server's machine
    mutual_tls   the server takes only connections that show a certificate of this folder's CA
    at           where processes find this folder, in a container for instance; empty: where it is
    """

    hosts: list[str] = field(default_factory=lambda: ["localhost", "127.0.0.1"])
    port: int = 4222
    store: str = "/data"
    mutual_tls: bool = False
    at: str = ""


def write_config(folder: Path, tenants: Sequence[str] = (), **options: Any) -> Path:
    """Returns the server's configuration file. `options` are fields of Options: those not given are what they were the last time.
    Raises ValueError for a tenant's name that cannot be one."""
    for tenant in tenants:
        if not is_token(tenant) or tenant in _RESERVED:
            raise ValueError(f"tenant {tenant!r}: {TOKEN_RULE}, and not reserved")
    for name in ("keys", "tls"):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    remembered = folder / "options.json"
    kept = json.loads(remembered.read_text()) if remembered.exists() else {}
    chosen = Options(**kept | options)
    remembered.write_text(json.dumps(asdict(chosen), indent=2) + "\n")
    at = Path(chosen.at) if chosen.at else folder.resolve()
    known = sorted({path.stem.removeprefix("tenant-") for path in folder.glob("keys/tenant-*.nk")} | set(tenants))
    _write_certificates(folder / "tls", chosen.hosts)
    config = {
        "port": chosen.port,
        "http": "127.0.0.1:8222",
        "max_payload": MAX_PAYLOAD,
        "jetstream": {"store_dir": chosen.store},
        "tls": {
            "cert_file": str(at / "tls/server.pem"),
            "key_file": str(at / "tls/server-key.pem"),
            "ca_file": str(at / "tls/ca.pem"),
            "verify": chosen.mutual_tls,
            "timeout": 5,
        },
        "accounts": _accounts(folder, known),
        "system_account": SYSTEM_ACCOUNT,
    }
    path = folder / CONFIG
    path.write_text(json.dumps(config, indent=2) + "\n")
    for user in (*STAGES, ADMIN, *(f"tenant-{tenant}" for tenant in known)):
        settings = connection(at, user, mutual_tls=chosen.mutual_tls)
        settings["nats_url"] = f"tls://{chosen.hosts[0]}:{chosen.port}"
        lines = [f"GORGON_{name.upper()}={value}" for name, value in settings.items()]
        (folder / f"{user}.env").write_text("\n".join(lines) + "\n")
    return path


def connection(folder: Path, user: str, *, mutual_tls: bool = False) -> dict[str, Any]:
    """Settings (shared.config.StageSettings) with which a process connects as the user."""
    settings = {
        "nats_nkey": str(folder / "keys" / f"{user}.nk"),
        "nats_tls_ca": str(folder / "tls/ca.pem"),
    }
    if user in STAGES:
        settings["nats_inbox_prefix"] = inbox_prefix(user)
    if mutual_tls:
        settings["nats_tls_cert"] = str(folder / "tls/client.pem")
        settings["nats_tls_key"] = str(folder / "tls/client-key.pem")
    return settings


def _accounts(folder: Path, tenants: list[str]) -> dict[str, Any]:
    users = []
    for user in (*STAGES, ADMIN):
        allowed = permissions(user)
        users.append(
            {
                "nkey": _public_key(folder / "keys" / f"{user}.nk"),
                "permissions": {
                    "publish": {"allow": list(allowed.publish)},
                    "subscribe": {"allow": list(allowed.subscribe)},
                    "allow_responses": {"max": 1, "expires": "2m"},
                },
            }
        )
    accounts: dict[str, Any] = {
        SYSTEM_ACCOUNT: {"users": [{"nkey": _public_key(folder / "keys/system.nk")}]},
        ACCOUNT: {"jetstream": "enabled", "users": users, "exports": exports(tenants) if tenants else []},
    }
    for tenant in tenants:
        key = _public_key(folder / "keys" / f"tenant-{tenant}.nk")
        accounts[tenant] = {"users": [{"nkey": key}], "imports": imports(tenant)}
    return accounts


def _public_key(path: Path) -> str:
    """Of the seed in the file, which is made if it is not there. The server's configuration holds no secret of a user."""
    if not path.exists():
        _write_secret(path, nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    public: bytes = nkeys.from_seed(bytearray(path.read_bytes().strip())).public_key
    return public.decode()


def _write_secret(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _write_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """A CA of its own, whose key is kept, and certificates of the server and of clients."""
    ca_path = folder / "ca.pem"
    if ca_path.exists():
        ca = x509.load_pem_x509_certificate(ca_path.read_bytes())
        ca_key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    else:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        itself = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Gorgon CA")])
        ca = _builder(itself, itself, ca_key, x509.BasicConstraints(ca=True, path_length=0)).sign(
            ca_key, hashes.SHA256()
        )
        _write_key(folder / "ca-key.pem", ca_key)
        ca_path.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    for name, usage in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)):
        if (folder / f"{name}.pem").exists():
            if name == "client" or _names(folder / "server.pem") >= set(map(_alternative, hosts)):
                continue
            (folder / "server-key.pem").unlink()
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Gorgon {name}")])
        builder = _builder(subject, ca.subject, key, x509.BasicConstraints(ca=False, path_length=None))
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if name == "server":
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(h) for h in hosts]), critical=False
            )
        _write_key(folder / f"{name}-key.pem", key)
        certificate = builder.sign(ca_key, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, constraints: x509.BasicConstraints
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(constraints, critical=True)
    )


def _names(certificate: Path) -> set[x509.GeneralName]:
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    return set(loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    private = serialization.PrivateFormat.PKCS8
    _write_secret(path, key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
