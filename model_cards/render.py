"""Render the cards of the published models, once they are converted.

    python model_cards/render.py ./converted          # ./converted/mamba2-130m/README.md, ...
    python model_cards/render.py --list

Each family is a JSON file beside this script: ids, sizes, license as published, and the command that converts one. A
model is looked for in a folder of its own name; ``mamba2-hf card`` renders a single one, also of a model of your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mamba2_hf.checkpoints import open_checkpoint
from mamba2_hf.checkpoints.cards import families, render_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="where the converted models are")
    parser.add_argument("--list", action="store_true", help="print the commands that convert them, and nothing else")
    args = parser.parse_args()
    for family in families().values():
        for model in family.models:
            name = model["id"].partition("/")[2]
            if args.list:
                print(family.command.format(id=model["id"], name=args.folder / name))
            elif (args.folder / name).is_dir():
                card = render_card(open_checkpoint(args.folder / name), base_model=model["id"])
                path = args.folder / name / "README.md"
                path.write_text(str(card), encoding="utf-8")
                print(path)


if __name__ == "__main__":
    main()
