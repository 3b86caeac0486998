"""cloud-init's NoCloud seed: a small ISO 9660 image with the label ``cidata``. Pure: bytes in, bytes out.

See https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html. The files are JSON where cloud-init reads
YAML: JSON is YAML, and quoting it needs no rules of its own. ``user-data`` and ``network-config`` are the user's own
bytes.
"""

import io
import json

import pycdlib

from hypervisor.core.machines import CloudInit

__all__ = ["MAX_FILE_BYTES", "build_seed", "meta_data"]

MAX_FILE_BYTES = 1 << 20


def meta_data(cloud_init: CloudInit, *, instance_id: str, name: str) -> bytes:
    """The file ``meta-data``: who the guest is. cloud-init runs its first-boot steps once for each instance id."""
    document: dict[str, object] = {
        "instance-id": instance_id,
        "local-hostname": cloud_init.hostname or name,
    }
    if cloud_init.ssh_authorized_keys:
        document["public-keys"] = list(cloud_init.ssh_authorized_keys)
    return json.dumps(document, indent=1).encode() + b"\n"


def build_seed(cloud_init: CloudInit, *, instance_id: str, name: str) -> bytes:
    """The ISO image. ``name`` is the instance's, its host name where the seed gives none."""
    files = {
        "meta-data": meta_data(cloud_init, instance_id=instance_id, name=name),
        # An empty one would be ignored, and cloud-init wants the file to be there.
        "user-data": cloud_init.user_data.encode() or b"#cloud-config\n{}\n",
    }
    if cloud_init.network_config:
        files["network-config"] = cloud_init.network_config.encode()
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (file, content) in enumerate(files.items()):
        iso.add_fp(
            io.BytesIO(content),
            len(content),
            f"/FILE{number}.;1",
            rr_name=file,
            joliet_path=f"/{file}",
        )
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()
