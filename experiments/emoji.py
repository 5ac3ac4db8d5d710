"""A folder of captioned emoji, for `train.py --data folder:...`: the base emoji of the npm package emoji-datasource-google (64 x 64 PNG, with names).

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python experiments/emoji.py package runs/emoji-data
    python train.py --stage all --data folder:runs/emoji-data --out runs/emoji
"""

import json
import shutil
import sys
from pathlib import Path


def main(package, target):
    entries = json.loads((Path(package) / "emoji.json").read_text("utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for entry in entries:
        source = Path(package) / "img" / "google" / "64" / entry["image"]
        if entry.get("has_img_google") and source.exists():
            shutil.copyfile(source, target / entry["image"])
            lines.append(json.dumps({"file_name": entry["image"], "text": (entry["name"] or entry["short_name"]).lower()}))
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} emoji in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1], "emoji.json").exists():
        print("usage: python experiments/emoji.py PACKAGE-FOLDER TARGET-FOLDER", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
