"""Last step of the embedded base model: its parts in half precision, where the package keeps them.

    python examples/tiny_base/keep_model.py MODEL build/tiny_base/model

What is shipped is that folder as `disttrain/assets/tiny_base`.
The tokenizer is kept in the two files that every version reads; the third says the same in 3.6 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from disttrain.models.base import load_base


def main() -> None:
    """Command line: a trained diffusers folder in, the embedded one out."""
    parser = argparse.ArgumentParser(description="Put a trained model where the package keeps it.")
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    load_base(str(arguments.model)).save(arguments.output, half=True)
    (arguments.output / "tokenizer" / "tokenizer.json").unlink()
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
