"""cloud-init's seed: what is in the image, read back by the same library and by the volume's label."""

import io
import json

import pycdlib

from hypervisor.agent.drivers.libvirt.seed import build_seed
from hypervisor.core.machines import CloudInit

HOSTILE = 'a"b\'c\\d: {x} &<> ü\n- !!python/object/apply:os.system ["id"]'


def _files(image: bytes) -> dict[str, bytes]:
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(image))
    found = {}
    for child in iso.list_children(rr_path="/"):
        name = child.rock_ridge.name().decode() if child.rock_ridge is not None else ""
        if child.is_file():
            out = io.BytesIO()
            iso.get_file_from_iso_fp(out, rr_path=f"/{name}")
            found[name] = out.getvalue()
    iso.close()
    return found


def test_the_volume_has_the_label_that_cloud_init_looks_for() -> None:
    image = build_seed(CloudInit(), instance_id="i-1", name="box")

    assert image[0x8001:0x8006] == b"CD001"
    assert image[0x8028:0x8048].rstrip() == b"cidata"


def test_the_guest_is_told_its_id_its_name_and_its_keys() -> None:
    image = build_seed(CloudInit(ssh_authorized_keys=("ssh-ed25519 AAAA me",)), instance_id="i-1", name="box")

    files = _files(image)

    assert sorted(files) == ["meta-data", "user-data"]
    assert json.loads(files["meta-data"]) == {
        "instance-id": "i-1",
        "local-hostname": "box",
        "public-keys": ["ssh-ed25519 AAAA me"],
    }
    assert files["user-data"].startswith(b"#cloud-config\n")


def test_the_users_bytes_are_handed_on_as_they_are() -> None:
    cloud_init = CloudInit(hostname="web-1", user_data=HOSTILE, network_config=HOSTILE)

    files = _files(build_seed(cloud_init, instance_id="i-1", name="box"))

    assert files["user-data"] == HOSTILE.encode()
    assert files["network-config"] == HOSTILE.encode()
    assert json.loads(files["meta-data"])["local-hostname"] == "web-1"


def test_a_value_cannot_become_another_key() -> None:
    files = _files(build_seed(CloudInit(hostname=HOSTILE), instance_id="i-1", name="box"))

    assert json.loads(files["meta-data"]) == {"instance-id": "i-1", "local-hostname": HOSTILE}


def test_a_large_user_data_fits() -> None:
    content = "x" * (1 << 20)

    assert (
        _files(build_seed(CloudInit(user_data=content), instance_id="i", name="n"))["user-data"]
        == content.encode()
    )
