#!/usr/bin/env bash
# Wheels for `python -m tests.bench.gpu` on a CUDA machine that reaches no package index but has Python 3.12, torch
# (CUDA 13), transformers and accelerate. Usage: tests/bench/device.sh [FOLDER], default .whl (ignored by git).
# Under 64 MiB in all: bitsandbytes keeps its CUDA 13.0 library alone, pyarrow loses what `datasets` never imports.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.whl}
mkdir -p "$folder"
rm -f "$folder"/*.whl

names=(trl peft bitsandbytes datasets pyarrow pandas multiprocess dill xxhash math-verify latex2sympy2_extended
  antlr4-python3-runtime rich markdown-it-py mdurl Pygments python-dateutil six)
platforms=()
for p in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${p}_x86_64")
done
pins=()
for name in "${names[@]}"; do
  pins+=("$(grep -i "^${name//_/[-_]}==" constraints.txt)")
done
python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" -d "$folder" "${pins[@]}"

python3 - "$folder" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

DROP = {
    "bitsandbytes": r"bitsandbytes/libbitsandbytes_(?!cuda130|cpu)",
    "pyarrow": r"pyarrow/(tests|include|src)/|pyarrow/.*(flight|s3|gcsfs|azurefs|gandiva|_cpp_tests|encryption)",
}
for name, pattern in DROP.items():
    (wheel,) = Path(sys.argv[1]).glob(f"{name}-*.whl")
    slim = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for item in old.infolist():
            if re.match(pattern, item.filename):
                continue
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not re.match(pattern, line)).encode()
            new.writestr(item, content)
    slim.replace(wheel)
PYTHON

# The target must be called site-packages: `datasets` would otherwise pickle the carried pyarrow by value, and fail.
du -ch --apparent-size "$folder"/*.whl | tail -1
cat <<TEXT
Carry $folder and run there:
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site-packages $folder/*.whl && export PYTHONPATH=/tmp/site-packages:. PYTHONUNBUFFERED=1 || exit; python3 -m tests.bench.gpu --out \$OUT
Then copy gpu.json from \$OUT to tests/bench/results.
TEXT
