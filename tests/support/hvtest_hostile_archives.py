"""Image archives that must be refused, each made out of a good one; and the same image as ``docker save`` writes it."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["HOSTILE_ARCHIVES", "docker_archive"]

Files = dict[str, bytes]


def _read(archive: Path) -> Files:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]


def _write(files: Mapping[str, bytes], out: Path, *, extra: tuple[tarfile.TarInfo, ...] = ()) -> None:
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"\0" * info.size))


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _parts(files: Files) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    index = json.loads(files["index.json"])
    manifest = json.loads(files[_blob(index["manifests"][0]["digest"])])
    config = json.loads(files[_blob(manifest["config"]["digest"])])
    return index, manifest, config


def _rebuild(files: Files, *, manifest: dict[str, Any], config: dict[str, Any] | None = None) -> Files:
    """The layout with a changed manifest (and configuration), digests made right again."""
    index, _, _ = _parts(files)
    result = dict(files)
    if config is not None:
        data = json.dumps(config).encode()
        result[_blob(_digest(data))] = data
        manifest = manifest | {"config": manifest["config"] | {"digest": _digest(data), "size": len(data)}}
    data = json.dumps(manifest).encode()
    result[_blob(_digest(data))] = data
    index["manifests"][0] |= {"digest": _digest(data), "size": len(data)}
    result["index.json"] = json.dumps(index).encode()
    return result


def _not_a_tar(_: Path, out: Path) -> None:
    out.write_bytes(b"\x7fELF" + bytes(4096))


def _empty(_: Path, out: Path) -> None:
    out.write_bytes(b"")


def _directory(_: Path, out: Path) -> None:
    (out.parent / "a-directory").mkdir(exist_ok=True)
    out.symlink_to("a-directory")


def _symlink(good: Path, out: Path) -> None:
    out.symlink_to(good)


def _truncated(good: Path, out: Path) -> None:
    data = good.read_bytes()
    out.write_bytes(data[: len(data) // 2])


def _compressed(good: Path, out: Path) -> None:
    out.write_bytes(gzip.compress(good.read_bytes(), 1))


def _other_tar(_: Path, out: Path) -> None:
    _write({"readme.txt": b"no image"}, out)


def _traversal(good: Path, out: Path) -> None:
    _write(_read(good) | {"../../etc/cron.d/evil": b"* * * * * root true\n"}, out)


def _absolute(good: Path, out: Path) -> None:
    _write(_read(good) | {"/etc/cron.d/evil": b"* * * * * root true\n"}, out)


def _link_for_a_blob(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    name = _blob(manifest["layers"][0]["digest"])
    del files[name]
    _write(files, out, extra=(_member(name, tarfile.SYMTYPE, "/etc/shadow"),))


def _device(good: Path, out: Path) -> None:
    _write(_read(good), out, extra=(_member("blobs/sha256/null", tarfile.CHRTYPE),))


def _twice(good: Path, out: Path) -> None:
    files = _read(good)
    _write(files, out, extra=(tarfile.TarInfo("index.json"),))


def _layer_with_wrong_bytes(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    # Packed differently, so that containerd does not have the right bytes already.
    layer = gzip.compress(gzip.decompress(files[_blob(manifest["layers"][0]["digest"])]), 1)
    manifest["layers"][0] |= {"digest": _digest(layer), "size": len(layer)}
    wrong = bytearray(layer)
    wrong[len(wrong) // 2] ^= 0xFF
    _write(_rebuild(files, manifest=manifest) | {_blob(_digest(layer)): bytes(wrong)}, out)


def _config_with_wrong_bytes(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    name = _blob(manifest["config"]["digest"])
    _write(files | {name: files[name].replace(b"linux", b"linuy")}, out)


def _layer_missing(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    del files[_blob(manifest["layers"][0]["digest"])]
    _write(files, out)


def _layer_size_lies(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    manifest["layers"][0]["size"] += 1
    _write(_rebuild(files, manifest=manifest), out)


def _wrong_diff_id(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, config = _parts(files)
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    _write(_rebuild(files, manifest=manifest, config=config), out)


def _digest_is_a_path(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    manifest["layers"][0]["digest"] = "sha256:../../../etc/passwd"
    _write(_rebuild(files, manifest=manifest), out)


def _no_layers(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    _write(_rebuild(files, manifest=manifest | {"layers": []}), out)


def _layer_is_no_tar(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, config = _parts(files)
    data = b"this is no layer" * 100
    manifest["layers"] = [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": _digest(data), "size": len(data)}
    ]
    config["rootfs"]["diff_ids"] = [_digest(data)]
    _write(_rebuild(files, manifest=manifest, config=config) | {_blob(_digest(data)): data}, out)


def _huge_manifest(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, _ = _parts(files)
    manifest["annotations"] = {"padding": "x" * (8 << 20)}
    _write(_rebuild(files, manifest=manifest), out)


def _deep_json(good: Path, out: Path) -> None:
    _write(_read(good) | {"index.json": b"[" * 1_000_000}, out)


def _other_architecture(good: Path, out: Path) -> None:
    files = _read(good)
    index, _, _ = _parts(files)
    index["manifests"][0]["platform"]["architecture"] = "mips64"
    _write(files | {"index.json": json.dumps(index).encode()}, out)


def _index_of_itself(good: Path, out: Path) -> None:
    files = _read(good)
    index, _, _ = _parts(files)
    listed = index["manifests"][0]
    for _ in range(5):
        data = json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode()
        files[_blob(_digest(data))] = data
        listed = {
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": _digest(data),
            "size": len(data),
            "platform": index["manifests"][0]["platform"],
        }
    _write(files | {"index.json": json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode()}, out)


def _unknown_user(good: Path, out: Path) -> None:
    files = _read(good)
    _, manifest, config = _parts(files)
    config["config"]["User"] = "nosuchuser"
    _write(_rebuild(files, manifest=manifest, config=config), out)


HOSTILE_ARCHIVES: Mapping[str, Callable[[Path, Path], None]] = {
    "absolute member": _absolute,
    "compressed": _compressed,
    "configuration with wrong bytes": _config_with_wrong_bytes,
    "deeply nested document": _deep_json,
    "device": _device,
    "digest that is a path": _digest_is_a_path,
    "empty": _empty,
    "huge manifest": _huge_manifest,
    "indexes nested without end": _index_of_itself,
    "layer cut out": _layer_missing,
    "layer of another size": _layer_size_lies,
    "layer that is no tar": _layer_is_no_tar,
    "layer with wrong bytes": _layer_with_wrong_bytes,
    "layer with wrong diff id": _wrong_diff_id,
    "link in place of a blob": _link_for_a_blob,
    "member twice": _twice,
    "no layers": _no_layers,
    "no tar": _not_a_tar,
    "other architecture": _other_architecture,
    "path is a link to a directory": _directory,
    "path is a symbolic link": _symlink,
    "tar of something else": _other_tar,
    "traversal": _traversal,
    "truncated": _truncated,
    "unknown user": _unknown_user,
}
"""Each takes the path of a good archive and writes a bad one to the second path."""


def docker_archive(good: Path, out: Path, *, tag: str) -> None:
    """The image of an OCI archive with one gzip layer, as ``docker save`` writes it."""
    files = _read(good)
    _, manifest, config = _parts(files)
    layer = gzip.decompress(files[_blob(manifest["layers"][0]["digest"])])
    listed = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer/layer.tar"]}]
    _write(
        {
            "manifest.json": json.dumps(listed).encode(),
            "config.json": json.dumps(config).encode(),
            "layer/layer.tar": layer,
        },
        out,
    )
