"""Turn the output of aarch64_frames.c into aarch64_frames.json. Arguments: NAME=FILE, one per recording."""

from __future__ import annotations

import base64
import json
import sys
import zlib
from pathlib import Path


def main() -> None:
    frames = []
    for argument in sys.argv[1:]:
        source, _, path = argument.partition("=")
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.startswith("frame_record "):
                fields = dict(field.split("=") for field in line.split()[1:])
                stack = zlib.compress(bytes.fromhex(fields["stack"]), 9)
                fields["stack"] = base64.b85encode(stack).decode()
                frames.append(json.dumps({"source": source, **fields}))
    Path(__file__).with_name("aarch64_frames.json").write_text("[\n" + ",\n".join(frames) + "\n]\n")


if __name__ == "__main__":
    main()
