"""``image``: import, list, get, delete."""

from collections.abc import Sequence
from pathlib import Path

import click

from hypervisor.ctl.bulk import Task, run_tasks
from hypervisor.ctl.display.columns import image_columns
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import NAME, connected, formatted, listed, project_option
from hypervisor.ctl.output import ProgressLine, now_s, show_list, show_one
from hypervisor.ctl.paging import joined, list_all
from hypervisor.ctl.session import READ_TIMEOUT_S
from hypervisor.v1.image_pb2 import (
    DeleteImageRequest,
    GetImageRequest,
    Image,
    ImageKind,
    ListImagesRequest,
)

__all__ = ["image"]

_KINDS = {
    "auto": ImageKind.IMAGE_KIND_UNSPECIFIED,
    "oci-archive": ImageKind.IMAGE_KIND_OCI_ARCHIVE,
    "disk": ImageKind.IMAGE_KIND_DISK,
    "kernel": ImageKind.IMAGE_KIND_KERNEL,
    "initrd": ImageKind.IMAGE_KIND_INITRD,
}
_image = click.argument("image", type=NAME("image"))


@click.group()
def image() -> None:
    """What instances boot or run. IMAGE is a name or an id; instances name one as image:NAME."""


@image.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, metavar="NAME", help="Name of the image, such as debian-12.")
@click.option(
    "--kind",
    type=click.Choice(list(_KINDS)),
    default="auto",
    help="What it is. Default: auto, as its content says; a raw disk without a partition table needs it.",
)
@click.option("--sha256", metavar="DIGEST", default="", help="Only if FILE has this SHA-256.")
@click.option(
    "--resume/--no-resume",
    "resume",
    default=True,
    help="Go on with what an earlier try of the same file has sent (the default), or begin anew.",
)
@project_option
@formatted
@connected
@pass_invocation
def import_image(
    invocation: Invocation, *, file: Path, name: str, kind: str, sha256: str, resume: bool, project: str
) -> None:
    """Give the cluster an image: an OCI archive, a qcow2 or raw disk, a kernel or an initial RAM disk.

    FILE is sent to the server, which checks digest and content; nodes fetch it when an instance needs it. A broken
    connection is taken up again, and so is a command that was interrupted: run it again.
    """
    from hypervisor.ctl.image_upload import ImageUpload, plan_upload
    from hypervisor.ctl.quantities import readable_bytes

    line = ProgressLine.for_terminal()
    shown = [-1]

    def progress(what: str, done: int, size: int) -> None:
        percent = done * 100 // max(size, 1)
        if line is not None and percent != shown[0]:
            shown[0] = percent
            line.say(f"{what} {file.name}: {percent}% of {readable_bytes(size)}")

    try:
        plan = plan_upload(
            file,
            name=name,
            project=project,
            kind=_KINDS[kind],
            sha256=sha256,
            resume=resume,
            progress=progress,
        )
        found = ImageUpload(invocation.session(), plan, progress=progress).run(
            deadline=invocation.deadline(None)
        )
    finally:
        if line is not None:
            line.clear()
    _show(invocation, found)


@image.command("list")
@listed
@project_option
@formatted
@connected
@pass_invocation
def list_images(
    invocation: Invocation, *, filters: Sequence[str], sort: str | None, limit: int | None, project: str
) -> None:
    """Show images.

    Fields for --filter: id, name (a trailing * matches any end), kind, format, sha256, state. For --sort: name,
    created_at, size_bytes, kind.
    """
    session = invocation.session()
    found = list_all(
        session,
        session.images.ListImages,
        ListImagesRequest(filter=joined(filters), order_by=sort or "", project=project),
        lambda page: page.images,
        limit=limit,
        deadline=invocation.deadline(READ_TIMEOUT_S),
    )
    show_list(
        invocation,
        found,
        lambda: image_columns(now_s()),
        name=lambda item: item.name,
        empty="No images match." if filters else "No images: 'hypervisor-ctl image import FILE --name NAME'.",
    )


@image.command("get")
@_image
@project_option
@formatted
@connected
@pass_invocation
def get_image(invocation: Invocation, *, image: str, project: str) -> None:
    """Show one image, and which servers have it."""
    session = invocation.session()
    request = GetImageRequest(image=image, project=project)
    deadline = invocation.deadline(READ_TIMEOUT_S)
    _show(invocation, session.read(session.images.GetImage, request, deadline=deadline))


@image.command("delete")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=NAME("image"))
@click.option(
    "--force", is_flag=True, help="Also while instances use it; they run on, and cannot be made again."
)
@click.option(
    "--if-version",
    "resource_version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only if the image still has this resource_version.",
)
@project_option
@formatted
@connected
@pass_invocation
def delete_images(
    invocation: Invocation,
    *,
    images: Sequence[str],
    force: bool,
    resource_version: int | None,
    project: str,
) -> None:
    """Remove images. Nodes keep what their instances use."""
    session = invocation.session()
    tasks = [
        Task(
            name,
            session.images.DeleteImage,
            DeleteImageRequest(
                image=name, project=project, force=force, resource_version=resource_version or 0
            ),
        )
        for name in images
    ]
    run_tasks(invocation, tasks, done="deleted")


def _show(invocation: Invocation, found: Image) -> None:
    def text() -> str:
        from hypervisor.ctl.display.details import image_details

        return image_details(found, now_s=now_s())

    show_one(invocation, found, text, name=lambda item: item.name)
