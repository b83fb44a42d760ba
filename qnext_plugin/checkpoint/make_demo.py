"""Write the small trained checkpoint that comes with the package; ``scripts/train_demo`` trains it."""

import shutil
from pathlib import Path

from qnext_plugin.checkpoint.make_random import check_target

DIRECTORY = Path(__file__).parent.parent / "data" / "demo"


def write_demo_checkpoint(directory: str | Path) -> None:
    """Copy the demo checkpoint to an empty or new directory.

    Raises ``ValueError`` if the directory has files or its disk has too little space.
    """
    directory = Path(directory).absolute()
    files = sorted(DIRECTORY.iterdir(), key=lambda file: file.name == "config.json")  # last, as in make_random
    check_target(directory, sum(file.stat().st_size for file in files))
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, directory / file.name)
