"""Take some files out of one wheel on PyPI: ``wheel_files.py PINS OUT``. The wheel is neither installed nor run.

PINS is a JSON file: ``requirement`` and ``sha256`` of the wheel, ``python_version`` it is for, and ``files`` by the
name they get below OUT, each with its ``path`` in the wheel and ``sha256``. Both hashes have to be right. Runs the pip
of this interpreter, with its configuration.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def download(pins: dict[str, str], directory: Path) -> Path:
    """The wheel. SystemExit with what pip says."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pins['requirement']} --hash=sha256:{pins['sha256']}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", f"--python-version={pins['python_version']}"]
    command += [f"--dest={directory}", f"--requirement={requirements}"]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"pip could not download {pins['requirement']}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def main() -> None:
    """See the module."""
    pins = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as directory,
        zipfile.ZipFile(download(pins, Path(directory))) as archive,
    ):
        for name, pin in pins["files"].items():
            data = archive.read(pin["path"])
            found = hashlib.sha256(data).hexdigest()
            if found != pin["sha256"]:
                sys.exit(f"{pin['path']} has SHA-256 {found}, expected {pin['sha256']}")
            (out / name).unlink(missing_ok=True)
            (out / name).write_bytes(data)
            (out / name).chmod(0o755)


if __name__ == "__main__":
    main()
